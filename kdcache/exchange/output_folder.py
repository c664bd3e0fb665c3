"""A folder that is there when it is whole, and not before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcache.errors import StorageError


@contextmanager
def output_folder(out: str | Path) -> Iterator[Path]:
    """Work in a folder beside `out`, which becomes it at the end; by an exception it is removed.

    Raises:
        StorageError: there is something at `out`.
    """
    path = Path(out)
    if "://" in str(out):
        raise StorageError(f"{out}: exports go to a folder of this machine; name one, and copy it")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise StorageError(f"{out}: there is something already; choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
        for file in work.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        work.chmod(0o777 & ~mask)  # a temporary folder is its owner's alone
        try:
            work.rename(path)
        except OSError as error:
            raise StorageError(f"{out}: cannot be put in place: {error.strerror}") from None
    finally:
        if work.is_dir():
            shutil.rmtree(work)


def written_files(out: str | Path) -> list[dict[str, object]]:
    """Name and size of every file of an output, in order of name."""
    files = sorted(Path(out).iterdir())
    return [{"name": file.name, "bytes": file.stat().st_size} for file in files]
