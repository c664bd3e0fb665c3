"""Local folders for what is on its way to a remote store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.formats.stores.commit import storage_errors

_PREFIX = "kdcache-upload-"
_LOCK = "lock"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder below $TMPDIR that is gone afterwards, also where the process was killed.

    The next one to be made sweeps what a killed process left: a folder whose lock nobody holds.
    """
    place = Path(tempfile.gettempdir())
    _sweep(place)
    with storage_errors(place):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        # The lock appears under its name when it is held, so that no sweep finds it free.
        handle = os.open(folder / ".new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            (folder / ".new").rename(folder / _LOCK)
            inner = folder / "files"
            inner.mkdir()
            yield inner
        finally:
            os.close(handle)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Remove folders of processes that died; what another user made stays."""
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
