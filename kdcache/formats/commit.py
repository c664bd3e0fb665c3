"""Files that appear whole or not at all, and the lock that one writer holds."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from kdcache.errors import KDCacheError, StorageError

LOCK_NAME = ".lock"

R = TypeVar("R")

_TEMPORARY = ".tmp-"
_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EACCES: "no permission to write; choose another output",
    errno.EPERM: "no permission to write; choose another output",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Report what the operating system refuses as one StorageError that names `path`.

    FileExistsError passes: to a create-only write it is an answer.
    """
    try:
        yield
    except (KDCacheError, FileExistsError):
        raise
    except OSError as error:
        reason = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(f"{path}: cannot be written: {reason}") from error


def is_temporary(name: str) -> bool:
    """Whether a file name is one that an interrupted write leaves behind."""
    return name.startswith(_TEMPORARY)


def create_file(path: Path, data: bytes) -> None:
    """Create a file with all its bytes, durably; never replace one.

    Raises:
        FileExistsError: it is there.
        StorageError: the disk refused.
    """
    with storage_errors(path):
        temporary = _temporary_beside(path)
        try:
            _write_durably(temporary, lambda stream: _write_all(stream, data))
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_data(path: Path, write: Callable[[BinaryIO], Path]) -> Path:
    """Write a file under a temporary name, make it durable, then give it its name.

    Args:
        path: a path in the folder of the file; names the temporary.
        write: writes the bytes and returns the file's final path, which may depend on them.

    Returns:
        The final path.

    Raises:
        StorageError: the disk refused; the temporary is gone.
    """
    with storage_errors(path):
        temporary = _temporary_beside(path)
        try:
            final = _write_durably(temporary, write)
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(final.parent)
    return final


def write_directory(path: Path, write: Callable[[Path], Path]) -> Path:
    """Fill a folder under a temporary name, make it durable, then give it its name.

    Args:
        path: a path beside the folder; names the temporary.
        write: fills the folder it is given, every file through `write_file`, and returns the
            folder's final path. What stands there is replaced.

    Returns:
        The final path.

    Raises:
        StorageError: the disk refused; the temporary is gone.
    """
    with storage_errors(path):
        temporary = _temporary_beside(path)
        try:
            temporary.mkdir()
            final = write(temporary)
            for folder in [*(item for item in temporary.rglob("*") if item.is_dir()), temporary]:
                sync(folder)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(final.parent)
    return final


def write_file(path: Path, pieces: Iterable[memoryview]) -> None:
    """Write a file of a folder that is not yet named, durably.

    Args:
        path: of the file; its folders are made.
        pieces: its bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(stream: BinaryIO) -> None:
        for piece in pieces:
            stream.write(piece)

    _write_durably(path, write)


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names that were added to or taken from a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f"{_TEMPORARY}{os.getpid()}-{path.name}"


def _write_all(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


def _write_durably(path: Path, write: Callable[[BinaryIO], R]) -> R:
    with path.open("wb") as stream:
        result = write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    return result


class Lock:
    """The right to write a cache, held through CACHE/.lock until released.

    The operating system frees it when the process ends, however it ends.
    """

    def __init__(self, root: Path) -> None:
        """Name the lock of a cache; `acquire` takes it.

        Args:
            root: the cache.
        """
        self._path = root / LOCK_NAME
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock at once or fail.

        Raises:
            StorageError: another process has it, or the disk refused.
        """
        with storage_errors(self._path):
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise StorageError(
                    f"{self._path.parent}: another dump is writing here; wait for it to end, "
                    "or choose another output"
                ) from None
            except BaseException:
                os.close(handle)
                raise
            self._handle = handle
            if not self._stands():
                self.release()
                raise StorageError(
                    f"{self._path.parent}: another dump has just left here; run the same "
                    "command again"
                )

    def _stands(self) -> bool:
        """Whether the file that is locked is the one that others would find."""
        assert self._handle is not None
        try:
            return os.path.samestat(os.fstat(self._handle), self._path.stat())
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Take the lock's file away while it is held."""
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
