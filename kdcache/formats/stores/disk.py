"""The primitives of the local disk that a cache is written with, each of which can be watched.

Everything that writes goes through here, so that a test can let any single step fail, or end the
process right before it: `observer` is called with the step's name and the path it is about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

#: Names of the steps, as `observer` is told them.
STEPS = ("mkdir", "create", "write", "fsync", "rename", "link", "unlink", "sync_folder")

#: Called before every step; what it raises, the step raises.
observer: Callable[[str, Path], None] | None = None


def note(step: str, path: Path) -> None:
    """Tell the observer of a step that comes next."""
    if observer is not None:
        observer(step, path)


class OutputFile:
    """A file that is being written; every write is a step."""

    closed = False

    def __init__(self, path: Path) -> None:
        """Create the file, in place of one that an interrupted write left.

        Args:
            path: its path.
        """
        self.path = path
        note("create", path)
        # Never write into it: it may be a second name of a record that was linked into place.
        path.unlink(missing_ok=True)
        self._stream: BinaryIO = path.open("xb")

    def write(self, data: Any) -> int:
        """Append bytes."""
        note("write", self.path)
        return self._stream.write(data)

    def flush(self) -> None:
        """Hand the bytes to the operating system."""
        self._stream.flush()

    def writable(self) -> bool:
        """It is."""
        return True

    def finish(self) -> None:
        """Make the bytes durable."""
        self._stream.flush()
        note("fsync", self.path)
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Give the handle back; what cannot be flushed by then is lost with the error before."""
        self._stream.close()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    if not path.is_dir():
        note("mkdir", path)
        path.mkdir(parents=True, exist_ok=True)


def rename(path: Path, target: Path) -> None:
    """Give a file or folder its final name; a file that has it is replaced."""
    note("rename", target)
    path.rename(target)


def link(path: Path, target: Path) -> None:
    """Give a file a second name, which must be free."""
    note("link", target)
    os.link(path, target)


def unlink(path: Path) -> None:
    """Remove a file, if it is there."""
    note("unlink", path)
    path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for item in sorted(path.iterdir()):
            remove(item)
        note("unlink", path)
        path.rmdir()
    else:
        unlink(path)


def sync_folder(path: Path) -> None:
    """Make the names durable that were added to or taken from a folder."""
    note("sync_folder", path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
