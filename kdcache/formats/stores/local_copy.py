"""The local copy: files of remote caches on the local disk, bounded, shared by all processes.

    FOLDER/.lock                  held while room is made and while a file gets its name
    FOLDER/.incoming/KEY          a file that is being fetched, locked by who fetches it; as long
                                  as the file will be, so that its room counts as taken
    FOLDER/<digest of URL>/PATH   a file that was checked, under its path in the cache

A file gets its name when all its bytes were compared with their record; what a killed process
leaves in `.incoming` is locked by nobody and removed by the next that makes room. Handles survive
eviction, so a file may go while others have it mapped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, cast

import xxhash

from kdcache.errors import IntegrityError, KDCacheError, StorageError
from kdcache.formats.integrity import Digester
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores.store import CHUNK_BYTES, REPAIR

FOLDER_VARIABLE = "KDCACHE_LOCAL_COPY"
BYTES_VARIABLE = "KDCACHE_LOCAL_COPY_BYTES"
DEFAULT_FOLDER = "~/.cache/kdcache"
#: Bound where the environment names none: this, but no more than half of the free disk.
DEFAULT_BYTES = 100 * 10**9

#: Times that a file with wrong bytes is fetched before it is called broken.
FETCHES = 3
#: How often to look again while others fetch and nothing can make room.
POLL_SECONDS = 0.05

_LOCK, _INCOMING, _TOKENIZERS = ".lock", ".incoming", "tokenizers"
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it: "200GB", "1.5 TiB", "1000000".

    Raises:
        ValueError: it is none.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number of bytes; write one like 200GB")
    number, unit = match.group(1), (match.group(2) or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(number) * base ** _POWERS.get(unit[:1], 0))


class LocalCopy:
    """Local copies of one remote cache's files, in a folder that all remote caches share.

    Attributes:
        folder: the shared folder.
        max_bytes: most bytes of all files in it.
        root: folder of this cache's files, which lie there under their paths.
    """

    def __init__(self, folder: Path, max_bytes: int, url: str) -> None:
        """Name the folder; nothing is touched before the first file.

        Args:
            folder: the shared folder, on a local disk.
            max_bytes: most bytes of all files in it; tokenizers count, but are never evicted.
            url: of the cache.
        """
        self.folder, self.max_bytes = folder, max_bytes
        self.root = folder / xxhash.xxh3_128_hexdigest(url.encode())
        self._url = url
        #: Path to the xxh3 that was found, and the inode it was found in.
        self._checked: dict[str, tuple[str, int]] = {}

    @classmethod
    def from_environment(cls, url: str) -> LocalCopy:
        """The local copy that $KDCACHE_LOCAL_COPY and $KDCACHE_LOCAL_COPY_BYTES set.

        Without them it lies in ~/.cache/kdcache and holds 100 GB, or half of what the disk has
        free (with what the copy has taken) if that is less.

        Raises:
            StorageError: a variable holds no such thing, or the disk refused.
        """
        folder = Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()
        text = os.environ.get(BYTES_VARIABLE)
        if text:
            try:
                return cls(folder, parse_bytes(text), url)
            except ValueError as error:
                raise StorageError(f"${BYTES_VARIABLE}: {error}") from None
        with _errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            taken = sum(entry.bytes for entry in _entries(folder))
            free = shutil.disk_usage(folder).free
        return cls(folder, min(DEFAULT_BYTES, (free + taken) // 2), url)

    def ensure(self, file: FileRecord, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """A handle to the checked bytes of a file; fetches them where they are not here.

        One process fetches a file at a time, and others that want it wait.

        Args:
            file: its record.
            fetch: writes the file's bytes to a stream, from the beginning.

        Returns:
            An unbuffered file, which survives the file's eviction.

        Raises:
            IntegrityError: what was fetched is not what the record says, time after time.
            StorageError: the disk refused, the file is larger than the bound, or `fetch` failed.
        """
        with _errors(self.folder):
            handle = self._standing(file)
            if handle is None:
                with self._turn(file) as incoming:
                    # Who had the turn before may have fetched it.
                    handle = self._standing(file) or self._fetched(file, incoming, fetch)
            return handle

    def _standing(self, file: FileRecord) -> BinaryIO | None:
        """The copy that is here, if it is right; a wrong one is removed."""
        path = self.root / file.path
        try:
            handle = _reading(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            state = os.fstat(handle.fileno())
            # A disk may forget, so bytes are looked at, once per process. Names of data files hold
            # their digest; those of tokenizers may stand for other bytes by now.
            known = self._checked.get(file.path) == (file.xxh3, state.st_ino)
            known = known and not file.path.startswith(f"{_TOKENIZERS}/")
            if state.st_size == file.bytes and (known or _matches(handle, file)):
                self._checked[file.path] = file.xxh3, state.st_ino
                _touch(handle)
                return handle
            path.unlink(missing_ok=True)
        except BaseException:
            handle.close()
            raise
        handle.close()
        return None

    @contextmanager
    def _turn(self, file: FileRecord) -> Iterator[_Incoming]:
        """The temporary of a file, locked once who has it lets go; removed if it keeps its name."""
        folder = self.folder / _INCOMING
        folder.mkdir(parents=True, exist_ok=True)
        key = xxhash.xxh3_128_hexdigest(f"{self.root.name}/{file.path}".encode())
        while True:
            with _Incoming(folder / key) as incoming:
                fcntl.flock(incoming.fileno(), fcntl.LOCK_EX)
                if not incoming.stands():
                    continue  # renamed or removed while we waited
                try:
                    yield incoming
                finally:
                    if incoming.stands():
                        incoming.path.unlink(missing_ok=True)
                return

    def _fetched(
        self, file: FileRecord, incoming: _Incoming, fetch: Callable[[BinaryIO], None]
    ) -> BinaryIO:
        """Fetch into a locked temporary until the bytes are right, and give it its name."""
        self._make_room(file, incoming)
        fault: str | None = None
        for _ in range(FETCHES):
            sink = _Sink(incoming.stream, file.bytes)
            with contextlib.suppress(_OverlongError):
                fetch(cast(BinaryIO, sink))
            fault = sink.fault(file)
            if fault is None:
                os.fsync(incoming.fileno())
                handle = _reading(incoming.path)
                _touch(handle)
                path = self.root / file.path
                with self._locked():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    incoming.path.rename(path)
                self._checked[file.path] = file.xxh3, os.fstat(handle.fileno()).st_ino
                return handle
        raise IntegrityError(f"{self._url}/{file.path}: {fault}, {FETCHES} times fetched; {REPAIR}")

    def _make_room(self, file: FileRecord, incoming: _Incoming) -> None:
        """Take the room of a file, and evict until it is there; wait for others' fetches.

        Raises:
            StorageError: the bound is too small for it.
        """
        while True:
            with self._locked():
                held = [entry for entry in _entries(self.folder) if entry.path != incoming.path]
                excess = sum(entry.bytes for entry in held) + file.bytes - self.max_bytes
                old = sorted(entry for entry in held if entry.evictable)
                if excess <= sum(entry.bytes for entry in old):
                    for entry in old:
                        if excess <= 0:
                            break
                        _evict(entry.path)
                        excess -= entry.bytes
                    os.ftruncate(incoming.fileno(), file.bytes)
                    return
                pinned = sum(e.bytes for e in held if not e.evictable and not e.incoming)
            if file.bytes + pinned > self.max_bytes:
                raise StorageError(
                    f"{self._url}/{file.path}: {file.bytes} bytes do not fit into the local copy "
                    f"{self.folder}, which may hold {self.max_bytes}"
                    + (f" ({pinned} of them tokenizers)" if pinned else "")
                    + f"; set ${BYTES_VARIABLE} to more"
                )
            time.sleep(POLL_SECONDS)  # others fetch; what they have fetched can be evicted

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder to ourselves, for the moment that room is made or a name given."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class _Incoming:
    """The temporary of a file that is being fetched."""

    def __init__(self, path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> None:
        self.path = path
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
        self.stream = cast(BinaryIO, os.fdopen(descriptor, "rb+", buffering=0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of it and of its lock."""
        self.stream.close()

    def fileno(self) -> int:
        """Its descriptor, which holds the lock."""
        return self.stream.fileno()

    def stands(self) -> bool:
        """Whether it is what others find under its name."""
        try:
            return os.path.samestat(os.fstat(self.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


class _OverlongError(Exception):
    """More bytes came than the record promises."""


class _Sink:
    """A stream that digests what is fetched, and takes no more than the record promises."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        stream.seek(0)
        self._stream, self._size = stream, size
        self._overlong = False
        self._digester = Digester()

    def write(self, piece: bytes | memoryview) -> int:
        """Append bytes."""
        view = memoryview(piece)
        if self._digester.bytes + len(view) > self._size:
            self._overlong = True
            raise _OverlongError
        self._digester.update(view)
        done = 0
        while done < len(view):  # an unbuffered file may take less than it is given
            done += self._stream.write(view[done:])
        return done

    def fault(self, file: FileRecord) -> str | None:
        """How the bytes differ from the record; None if they do not."""
        found = self._digester.record(file.path)
        if self._overlong:
            return f"more than the {file.bytes} bytes expected"
        for what in ("bytes", "xxh3", "crc32c"):
            have, want = getattr(found, what), getattr(file, what)
            if have != want:
                shown = f"{have} bytes" if what == "bytes" else f"{what} {have}"
                return f"{shown}, expected {want}"
        return None


@dataclass(frozen=True, order=True)
class _Entry:
    """One file in the folder; the least recently used sorts first."""

    used: int
    path: Path
    bytes: int
    evictable: bool
    incoming: bool


def _entries(folder: Path) -> list[_Entry]:
    """All files; what killed processes left behind is removed and not among them."""
    found = []
    for place, _, names in os.walk(folder):
        at = Path(place)
        incoming = at == folder / _INCOMING
        if at == folder:  # the lock
            continue
        pinned = len(at.parts) > len(folder.parts) + 1 and (
            at.parts[len(folder.parts) + 1] == _TOKENIZERS
        )
        for name in names:
            path = at / name
            with contextlib.suppress(FileNotFoundError):
                if incoming and _swept(path):
                    continue
                state = path.stat(follow_symlinks=False)
                evictable = not incoming and not pinned
                found.append(_Entry(state.st_mtime_ns, path, state.st_size, evictable, incoming))
    return found


def _swept(path: Path) -> bool:
    """Remove a temporary if nobody holds its lock; return whether it is gone.

    It is removed under its lock: who opened it a moment ago and waits for the lock must find it
    gone, and a temporary that has taken its name since is not ours to remove.
    """
    with _Incoming(path, os.O_RDWR) as incoming:
        try:
            fcntl.flock(incoming.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not incoming.stands():
            return False
        path.unlink()
        return True


def _evict(path: Path) -> None:
    """Remove a file, and folders that are empty without it."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for folder in path.parents:
            folder.rmdir()


def _reading(path: Path) -> BinaryIO:
    return cast(BinaryIO, path.open("rb", buffering=0))


def _touch(handle: BinaryIO) -> None:
    """Note that a file was used now; the last to be used is the last to be evicted."""
    now = time.time_ns()  # finer than the kernel's own
    os.utime(handle.fileno(), ns=(now, now))


def _matches(handle: BinaryIO, file: FileRecord) -> bool:
    """Whether the bytes have the record's xxh3; the handle stands at the beginning afterwards."""
    digester = Digester(crc32c=False)
    while piece := handle.read(CHUNK_BYTES):
        digester.update(piece)
    handle.seek(0)
    return digester.xxh3 == file.xxh3


@contextmanager
def _errors(folder: Path) -> Iterator[None]:
    """Report what the operating system refuses as one StorageError that names the local copy."""
    try:
        yield
    except KDCacheError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"free some space or set ${BYTES_VARIABLE} to less"
        else:
            advice = f"set ${FOLDER_VARIABLE} to a folder on a local disk"
        raise StorageError(f"local copy {folder}: {reason}; {advice}") from error
