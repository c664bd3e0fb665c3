"""A cache that is compressed for transfer, read as if it were not.

transfer.json                   created first: that the data files are compressed, and how
commits/logits.00000.zst.json   create-only, before the commit it stands beside: the compressed
                                files of that shard, their sizes and checksums
commits/tokenizers.zst.json     the same of all tokenizers
logits/00000.0-<xxh3>.arrow.zst a data file, Zstandard; the other records stand as they were
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NoReturn

from pydantic import Field

from kdcache.errors import FormatError, IntegrityError, StorageError
from kdcache.formats.integrity import Digester, compare
from kdcache.formats.manifest import MANIFEST_NAME, Count, Digest, FileRecord
from kdcache.formats.record import Record, read_record
from kdcache.formats.stores.commit import is_temporary
from kdcache.formats.stores.local_copy import LocalCopy
from kdcache.formats.stores.store import CHUNK_BYTES, REPAIR, Claim, Store
from kdcache.formats.stores.zstd import MAX_LEVEL, MIN_LEVEL, decompressed

TRANSFER_NAME = "transfer.json"
#: What the name of a compressed file ends with.
SUFFIX = ".zst"
TOKENIZERS = "tokenizers"

#: Files expanded at a time.
THREADS = 8
#: How much of the local copy may be filled ahead of need.
_AHEAD = 0.5
#: Shards whose records of compressed files are held.
_HELD = 256

_RECORD_NAME = re.compile(r"[a-z][a-z0-9_]*(\.\d{5,12})?\.zst\.json")
_DATA_PATH = re.compile(r"([a-z][a-z0-9_]*)/(\d{5,12})\.\d{1,6}-[0-9a-f]{16}\.(arrow|zarr/.+)")


class TransferRecord(Record):
    """transfer.json: the data files of the cache are compressed. `corpus` is the corpus digest."""

    codec: Literal["zstd"]
    level: Annotated[int, Field(ge=MIN_LEVEL, le=MAX_LEVEL)]
    corpus: Digest


class CompressedFile(FileRecord):
    """One compressed file, and the bytes that it expands to."""

    expands_to: Count


class CompressedFiles(Record):
    """commits/SIGNAL.SHARD.zst.json, commits/tokenizers.zst.json."""

    files: list[CompressedFile]


def compressed_path(signal: str, shard: int) -> str:
    """Path of the record of a shard's compressed files."""
    return f"commits/{signal}.{shard:05d}{SUFFIX}.json"


TOKENIZERS_PATH = f"commits/{TOKENIZERS}{SUFFIX}.json"


def expanding(store: Store) -> Store:
    """The store of a cache: itself, or what expands it if the cache is compressed.

    Raises:
        FormatError: its transfer.json is damaged.
        StorageError: the store cannot be read.
    """
    try:
        read_record(TransferRecord, store, TRANSFER_NAME)
    except FileNotFoundError:
        return store
    return TransferStore(store)


class TransferStore(Store):
    """A compressed cache; every path is that of the cache it was made from.

    Files are expanded into the bounded local copy when they are first opened, also those of a
    cache on the local disk. Nothing can be written.
    """

    def __init__(self, packed: Store) -> None:
        """Read through another store.

        Args:
            packed: where the compressed files lie.
        """
        self.packed = packed
        self.name, self.exclusive = packed.name, packed.exclusive
        self._local: LocalCopy | None = None
        self._records: dict[str, dict[str, CompressedFile]] = {}

    @property
    def local(self) -> LocalCopy:
        """Where files are kept that were expanded."""
        if self._local is None:
            place = self.name if "://" in self.name else os.path.realpath(self.name)
            self._local = LocalCopy.from_environment(place)
        return self._local

    def exists(self) -> bool:
        """Whether anything is there."""
        return self.packed.exists()

    def read(self, path: str) -> bytes:
        """All bytes of a small file."""
        if _record_of(path) is not None:
            return b"".join(self.pieces(path))
        try:
            return self.packed.read(path)
        except FileNotFoundError:
            if path != MANIFEST_NAME:
                raise
        raise FormatError(
            f"{self.name}: its compression is unfinished: there is no {MANIFEST_NAME} yet; run the "
            "same `kdcache compile --compress` again to finish"
        )

    def pieces(self, path: str, chunk: int = CHUNK_BYTES) -> Iterator[bytes]:
        """All bytes of a file in order, expanded as they are read, never to more than expected."""
        if _record_of(path) is None:
            yield from self.packed.pieces(path, chunk)
            return
        file = self._compressed(path)
        left = file.expands_to
        for piece in decompressed(self._packed_pieces(file, chunk), self.at(file.path)):
            left -= len(piece)
            if left < 0:
                break
            yield piece
        if left:
            found = "more" if left < 0 else f"{file.expands_to - left} bytes"
            raise IntegrityError(
                f"{self.at(file.path)}: expands to {found}, expected {file.expands_to}; {REPAIR}"
            )

    def _packed_pieces(self, file: CompressedFile, chunk: int) -> Iterator[bytes]:
        """A compressed file's own bytes, compared with their record at the end."""
        digester = Digester()
        for piece in self.packed.pieces(file.path, chunk):
            digester.update(piece)
            yield piece
        compare(self.at(file.path), digester, file)

    def _compressed(self, path: str) -> CompressedFile:
        """The compressed file of a path.

        Raises:
            FileNotFoundError: there is none.
            FormatError: the record that names it is damaged.
        """
        record = _record_of(path)
        assert record is not None, "asked for data files alone"
        if record not in self._records:
            files = read_record(CompressedFiles, self.packed, record).files
            if len(self._records) >= _HELD:
                self._records.clear()
            self._records[record] = {file.path: file for file in files}
        try:
            return self._records[record][path + SUFFIX]
        except KeyError:
            raise FileNotFoundError(self.at(path)) from None

    def size(self, path: str) -> int:
        """Bytes of a file, expanded; the compressed one must have the size of its record."""
        if _record_of(path) is None:
            return self.packed.size(path)
        file = self._compressed(path)
        found = self.packed.size(file.path)
        if found != file.bytes:
            raise IntegrityError(
                f"{self.at(file.path)}: {found} bytes, expected {file.bytes}; {REPAIR}"
            )
        return file.expands_to

    def names(self, folder: str) -> list[str]:
        """Names in a folder, sorted, as if nothing were compressed."""
        return sorted(set(self._shown(folder, self.packed.names(folder))))

    def _shown(self, folder: str, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            if folder == "commits" and _RECORD_NAME.fullmatch(name):
                continue
            if folder or name != TRANSFER_NAME:
                yield name if is_temporary(name) else name.removesuffix(SUFFIX)

    def walk(self, folder: str) -> list[str]:
        """Paths of all files below a folder, sorted, as if nothing were compressed."""
        found = set()
        for path in self.packed.walk(folder):
            place, _, name = path.rpartition("/")
            found |= {
                f"{place}/{shown}" if place else shown for shown in self._shown(place, [name])
            }
        return sorted(found)

    def open(self, file: FileRecord) -> BinaryIO:
        """The expanded file in the local copy; the handle survives its eviction."""
        return self.local.ensure(file, lambda stream: self._expand(file, stream))

    def _expand(self, file: FileRecord, stream: BinaryIO) -> None:
        try:
            for piece in self.pieces(file.path):
                stream.write(piece)
        except FileNotFoundError:
            raise IntegrityError(f"{self.at(file.path + SUFFIX)}: missing; {REPAIR}") from None

    def folder(self, files: Sequence[FileRecord]) -> Path:
        """The folder of the local copy in which the files lie under their paths."""
        for file in files:
            self.open(file).close()
        return self.local.root

    def fetch(self, files: Iterable[FileRecord]) -> None:
        """Expand into the local copy, several at a time, no more than a part of its bound."""
        room = int(_AHEAD * self.local.max_bytes)
        with ThreadPoolExecutor(THREADS, "kdcache-expand") as threads:
            for _ in threads.map(lambda file: self.open(file).close(), _within(files, room)):
                pass

    def create(self, path: str, data: bytes) -> NoReturn:
        """Nothing can be written."""
        self._refuse()

    def replace(self, path: str, data: bytes) -> NoReturn:
        """Nothing can be written."""
        self._refuse()

    def put_file(self, hint: str, write: Callable[[BinaryIO], str]) -> NoReturn:
        """Nothing can be written."""
        self._refuse()

    def put_folder(self, hint: str, write: Callable[[Path], str]) -> NoReturn:
        """Nothing can be written."""
        self._refuse()

    def remove(self, path: str) -> NoReturn:
        """Nothing can be removed."""
        self._refuse()

    def claim(self, name: str) -> Claim | None:
        """Nothing can be claimed."""
        self._refuse()

    def stale_claims(self) -> list[str]:
        """There are none."""
        return []

    def make(self) -> bool:
        """Nothing can be made; every writer begins with this."""
        self._refuse()

    def discard(self, root: bool) -> None:
        """There is nothing of a writer to remove."""

    def _refuse(self) -> NoReturn:
        raise StorageError(
            f"{self.name}: compressed for transfer, so it can be read alone; expand it first: "
            f"`kdcache compile {self.name} --out CACHE --expand`"
        )


def _record_of(path: str) -> str | None:
    """The record that names the compressed file of a path; None of a file that is as it was."""
    if path.startswith(f"{TOKENIZERS}/"):
        return TOKENIZERS_PATH
    match = _DATA_PATH.fullmatch(path)
    return None if match is None else compressed_path(match.group(1), int(match.group(2)))


def _within(files: Iterable[FileRecord], room: int) -> Iterator[FileRecord]:
    """The first files that have so many bytes at most."""
    for file in files:
        room -= file.bytes
        if room < 0:
            return
        yield file
