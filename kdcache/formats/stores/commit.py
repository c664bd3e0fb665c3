"""Files that appear whole or not at all, and claims that one writer holds."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from kdcache.errors import KDCacheError, StorageError
from kdcache.formats.stores import disk

R = TypeVar("R")

_TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(r"\.tmp-\d+-(.+)", re.DOTALL)
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
        mend = "mend that and run the same command again"
        reason = _ADVICE.get(error.errno or 0, f"{error.strerror or error}; {mend}")
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
            _write_durably(temporary, lambda stream: stream.write(data))
            disk.link(temporary, path)
        finally:
            disk.unlink(temporary)
        disk.sync_folder(path.parent)


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
            disk.rename(temporary, final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        disk.sync_folder(final.parent)
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
            disk.remove(temporary)
            disk.make_folder(temporary)
            final = write(temporary)
            for folder in [*(item for item in temporary.rglob("*") if item.is_dir()), temporary]:
                disk.sync_folder(folder)
            if final.exists():
                disk.remove(final)
            disk.rename(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        disk.sync_folder(final.parent)
    return final


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file of a folder that is not yet named, durably.

    Args:
        path: of the file; its folders are made.
        pieces: its bytes.
    """
    disk.make_folder(path.parent)

    def write(stream: BinaryIO) -> None:
        for piece in pieces:
            stream.write(piece)

    _write_durably(path, write)


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the names that were added to or taken from a folder."""
    disk.sync_folder(path)


def temporary_of(name: str) -> str | None:
    """The name that a temporary file stands for; None where it is none."""
    match = _TEMPORARY_NAME.fullmatch(name)
    return match.group(1) if match else None


def make_durably(folder: Path) -> None:
    """Make a folder, and those above it, whose name the disk keeps as it does the files in it."""
    if not folder.is_dir():
        make_durably(folder.parent)
        try:
            disk.make_folder(folder)
        except FileExistsError as error:  # which to a create-only write would be an answer
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        disk.sync_folder(folder.parent)


def _temporary_beside(path: Path) -> Path:
    make_durably(path.parent)
    return path.parent / f"{_TEMPORARY}{os.getpid()}-{path.name}"


def _write_durably(path: Path, write: Callable[[BinaryIO], R]) -> R:
    stream = disk.OutputFile(path)
    try:
        result = write(cast(BinaryIO, stream))
        stream.finish()
    finally:
        stream.close()
    return result


class LocalClaim:
    """The right to write one thing of a cache, held through a locked file until released.

    The operating system frees the lock when the process ends, however it ends; the file that stays
    behind then says that something may be left over, and `stale` that it was found there.
    """

    def __init__(self, path: Path, handle: int, stale: bool) -> None:
        """Keep what `take_claim` got.

        Args:
            path: of the locked file.
            handle: descriptor that holds the lock.
            stale: whether the file was there before.
        """
        self.stale = stale
        self._path, self._handle = path, handle

    def release(self, tidy: bool = True) -> None:
        """Give the claim back.

        Args:
            tidy: whether everything under it is; else the file stays, and `stale` says so then.

        Raises:
            StorageError: its file cannot be removed; the claim is given back all the same.
        """
        try:
            if tidy:
                with storage_errors(self._path):
                    disk.unlink(self._path)
        finally:
            os.close(self._handle)


def take_claim(path: Path) -> LocalClaim | None:
    """Lock a file that stands for something to be written, at once.

    Args:
        path: of the file; made where there is none.

    Returns:
        The claim; None where another holds it.

    Raises:
        StorageError: the disk refused.
    """
    with storage_errors(path):
        while True:
            try:
                make_durably(path.parent)
                flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
                try:
                    disk.note("create", path)
                    handle, stale = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), False
                except FileExistsError:
                    handle, stale = os.open(path, flags), True
            except FileNotFoundError:
                continue  # its holder, or the whole cache, has gone in between
            held = False
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = os.path.samestat(os.fstat(handle), path.stat())
                if held:
                    if not stale:
                        disk.sync_folder(path.parent)
                    return LocalClaim(path, handle, stale)
            except BlockingIOError:
                os.close(handle)
                return None
            except FileNotFoundError:
                pass  # released between our two calls
            except BaseException:
                if held and not stale:
                    path.unlink(missing_ok=True)
                os.close(handle)
                raise
            os.close(handle)
