"""Where a cache lies: a folder of the local disk, or any fsspec URL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

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
    from kdcache.formats.stores.local import LocalStore
    from kdcache.formats.stores.transfer_store import expanding

    text = str(location)
    if "://" not in text:
        return expanding(LocalStore(Path(location)))
    if text.startswith("file://"):
        return expanding(LocalStore(Path(text.removeprefix("file://"))))
    from kdcache.formats.stores.remote import RemoteStore

    return expanding(RemoteStore(text))
