"""A cache in a folder of the local disk."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.stores import disk
from kdcache.formats.stores.commit import (
    create_file,
    storage_errors,
    take_claim,
    write_data,
    write_directory,
)
from kdcache.formats.stores.store import (
    CHUNK_BYTES,
    CLAIMS,
    MAX_SMALL_BYTES,
    REPAIR,
    Claim,
    Store,
)

if TYPE_CHECKING:
    from kdcache.formats.manifest import FileRecord


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
