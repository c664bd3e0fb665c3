"""Where a cache lies: a folder of the local disk, or any fsspec URL."""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats import disk
from kdcache.formats.commit import (
    create_file,
    storage_errors,
    take_claim,
    write_data,
    write_directory,
)

if TYPE_CHECKING:
    from kdcache.formats.manifest import FileRecord

CHUNK_BYTES = 1 << 20

#: Most bytes of a file that is read whole: a record, and what the store keeps for itself.
MAX_SMALL_BYTES = 1 << 25

REPAIR = "`kdcache verify --repair` fetches it from a mirror or dumps it again"

#: Folder of a local cache whose files stand for what is being written.
CLAIMS = ".locks"

#: Folder of a cache in which dumps say how far they are.
STATUS = ".status"


class Claim(Protocol):
    """The right to write one thing.

    Attributes:
        stale: whether a holder before died, so that something of it may be left over.
    """

    stale: bool

    def release(self, tidy: bool = True) -> None:
        """Give it back; where not all under it is tidy, whoever claims it next is told."""


class Store(ABC):
    """A folder that holds a cache. Paths are those of a cache: relative, with "/" between parts.

    Attributes:
        name: the folder's path or URL, for messages.
        exclusive: whether a claim keeps other processes out.
    """

    name: str
    exclusive: bool

    def at(self, path: str) -> str:
        """A path as messages call it."""
        return f"{self.name}/{path}"

    @abstractmethod
    def exists(self) -> bool:
        """Whether the folder is there (an empty prefix of an object store is not)."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All bytes of a small file.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """

    @abstractmethod
    def pieces(self, path: str, chunk: int = CHUNK_BYTES) -> Iterator[bytes]:
        """All bytes of a file in order, straight from where it lies.

        Args:
            path: of the file.
            chunk: most bytes of a piece.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be looked at.
        """

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of files and folders in a folder, sorted; none where there is no such folder."""

    @abstractmethod
    def walk(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> None:
        """Create a file with all its bytes, durably; never replace one.

        Raises:
            FileExistsError: it is there.
            StorageError: the store refused.
        """

    @abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Write a small file whole in place of the one before; for what is no part of the format.

        Raises:
            StorageError: the store refused.
        """

    @abstractmethod
    def put_file(self, hint: str, write: Callable[[BinaryIO], str]) -> str:
        """Write a file whose name may depend on its bytes.

        Args:
            hint: a path in the same folder; names what is temporary.
            write: writes the bytes and returns the path.

        Returns:
            The path.

        Raises:
            StorageError: the store refused; nothing is left behind.
        """

    @abstractmethod
    def put_folder(self, hint: str, write: Callable[[Path], str]) -> str:
        """Write a folder of files whose name may depend on their bytes.

        Args:
            hint: a path beside it; names what is temporary.
            write: fills the local folder it is given, through `commit.write_file`, and returns
                the path.

        Returns:
            The path.

        Raises:
            StorageError: the store refused; nothing is left behind.
        """

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""

    @abstractmethod
    def open(self, file: FileRecord) -> BinaryIO:
        """A local file with the bytes, to be read or mapped; of a remote store its local copy.

        Raises:
            IntegrityError: it is missing, or what was fetched is not what the record says.
            StorageError: it cannot be read.
        """

    @abstractmethod
    def folder(self, files: Sequence[FileRecord]) -> Path:
        """A local folder in which the files lie under their paths."""

    @abstractmethod
    def fetch(self, files: Iterable[FileRecord]) -> None:
        """Make files local ahead of their use, several at a time."""

    @abstractmethod
    def claim(self, name: str) -> Claim | None:
        """Claim the right to write something.

        Args:
            name: what: a signal, or a signal's shard ("logits.00003").

        Returns:
            The claim; None where another process holds it.

        Raises:
            StorageError: the store refused.
        """

    @abstractmethod
    def stale_claims(self) -> list[str]:
        """Names of claims whose file stands, held or left by a process that died."""

    @abstractmethod
    def make(self) -> bool:
        """Make the folder where there is none; say whether it was made."""

    @abstractmethod
    def discard(self, root: bool) -> None:
        """Remove the folder of claims, and the whole where `root` says so, if nothing is there."""


def open_store(location: str | Path) -> Store:
    """The store at a path or URL.

    Args:
        location: a path, or what fsspec takes as a URL ("s3://bucket/caches/deen").

    Raises:
        StorageError: no driver for the URL is installed, or it refuses.
    """
    from kdcache.formats.transfer_store import expanding

    text = str(location)
    if "://" not in text:
        return expanding(LocalStore(Path(location)))
    if text.startswith("file://"):
        return expanding(LocalStore(Path(text.removeprefix("file://"))))
    from kdcache.formats.remote import RemoteStore

    return expanding(RemoteStore(text))


class LocalStore(Store):
    """A folder of the local disk, or of one that is mounted."""

    exclusive = True

    def __init__(self, root: Path) -> None:
        """Name the folder.

        Args:
            root: its path.
        """
        self.root = root
        self.name = str(root)

    def exists(self) -> bool:
        """Whether the folder is there."""
        return self.root.is_dir()

    def read(self, path: str) -> bytes:
        """All bytes of a small file."""
        pieces, total = [], 0
        for piece in self.pieces(path):
            pieces.append(piece)
            total += len(piece)
            if total > MAX_SMALL_BYTES:
                raise IntegrityError(
                    f"{self.at(path)}: over {MAX_SMALL_BYTES} bytes, a record has at most so many; "
                    f"{REPAIR}"
                )
        return b"".join(pieces)

    def pieces(self, path: str, chunk: int = CHUNK_BYTES) -> Iterator[bytes]:
        """All bytes of a file in order."""
        with self._reading(path) as stream:
            while piece := self._read(stream, path, chunk):
                yield piece

    def size(self, path: str) -> int:
        """Bytes of a file."""
        with self._reading(path) as stream:
            return os.fstat(stream.fileno()).st_size

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted."""
        try:
            return sorted(os.listdir(self.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(f"{self.at(folder)}: cannot be read: {error.strerror}") from None

    def walk(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted."""
        found = []
        for place, _, files in os.walk(self.root / folder):
            relative = Path(place).relative_to(self.root)
            found += [(relative / name).as_posix() for name in files]
        return sorted(found)

    def create(self, path: str, data: bytes) -> None:
        """Create a file; never replace one."""
        create_file(self._place(path), data)

    def replace(self, path: str, data: bytes) -> None:
        """Write a small file in place of the one before."""
        target = self._place(path)

        def write(stream: BinaryIO) -> Path:
            stream.write(data)
            return target

        write_data(target, write)

    def put_file(self, hint: str, write: Callable[[BinaryIO], str]) -> str:
        """Write a file under a temporary name, make it durable, then give it its name."""
        return self._path_of(write_data(self._place(hint), lambda s: self.root / write(s)))

    def put_folder(self, hint: str, write: Callable[[Path], str]) -> str:
        """Fill a folder under a temporary name, make it durable, then give it its name."""
        return self._path_of(write_directory(self._place(hint), lambda f: self.root / write(f)))

    def _path_of(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def remove(self, path: str) -> None:
        """Remove a file or a folder."""
        with storage_errors(self.root / path):
            disk.remove(self._place(path))

    def open(self, file: FileRecord) -> BinaryIO:
        """The file itself."""
        try:
            return self._reading(file.path)
        except FileNotFoundError:
            raise IntegrityError(f"{self.at(file.path)}: missing; {REPAIR}") from None

    def folder(self, files: Sequence[FileRecord]) -> Path:
        """The store's own folder."""
        for file in files:
            self._inside(file.path)
        return self.root

    def fetch(self, files: Iterable[FileRecord]) -> None:
        """They are local."""

    def claim(self, name: str) -> Claim | None:
        """Lock a file that stands for what is to be written."""
        return take_claim(self.root / CLAIMS / name)

    def stale_claims(self) -> list[str]:
        """Names in the folder of claims."""
        return self.names(CLAIMS)

    def make(self) -> bool:
        """Make the folder where there is none."""
        made = not self.root.exists()
        with storage_errors(self.root):
            try:
                disk.make_folder(self.root)
            except FileExistsError:
                raise StorageError(
                    f"{self.root}: output is a file, a cache is a directory; choose another output"
                ) from None
        return made

    def discard(self, root: bool) -> None:
        """Remove the folder of claims, and the whole, if nothing is there."""
        try:
            with contextlib.suppress(FileNotFoundError):
                (self.root / CLAIMS).rmdir()  # not while another process claims anything
            if root:
                self.root.rmdir()
        except OSError:
            return

    def _inside(self, path: str) -> Path:
        """A file that no link leads out of the cache.

        Raises:
            IntegrityError: it does.
        """
        file = self.root / path
        self._refuse_outside(file)
        return file

    def _place(self, path: str) -> Path:
        """Where a file is written or removed, in a folder that no link leads out of the cache to.

        Raises:
            IntegrityError: a link leads out of it.
        """
        file = self.root / path
        self._refuse_outside(file.parent)
        return file

    def _refuse_outside(self, file: Path) -> None:
        real, root = os.path.realpath(file), os.path.realpath(self.root)
        if not f"{real}/".startswith(root.rstrip("/") + "/"):
            raise IntegrityError(f"{file}: a link that leads out of the cache; {REPAIR}")

    def _reading(self, path: str) -> BinaryIO:
        """An unbuffered file, opened for reading."""
        try:
            # Without waiting: a pipe that lies there would keep its reader for ever.
            handle = os.open(self._inside(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            stream = cast(BinaryIO, os.fdopen(handle, "rb", buffering=0))
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                stream.close()
                raise IntegrityError(f"{self.at(path)}: not a file; {REPAIR}")
            return stream
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from None
        except (FileNotFoundError, IntegrityError):
            raise
        except OSError as error:
            raise StorageError(f"{self.at(path)}: cannot be read: {error.strerror}") from None

    def _read(self, stream: BinaryIO, path: str, chunk: int) -> bytes:
        try:
            return stream.read(chunk)
        except OSError as error:
            raise StorageError(f"{self.at(path)}: cannot be read: {error.strerror}") from None
