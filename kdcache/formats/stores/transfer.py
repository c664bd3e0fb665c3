"""Transfer: a cache compressed for the wire, and the ordinary cache of it again.

Both keep the records of the cache byte for byte, and write as a dump does: data files, then what
names them, the manifest last. So an interrupted one goes on where it was.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from kdcache.errors import IdentityError, IntegrityError, RecipeError, StorageError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.identity import differences
from kdcache.formats.integrity import Digester, compare
from kdcache.formats.listing import list_commits, list_signals, part_of, read_commit
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    CommitRecord,
    FileRecord,
    commit_path,
    signal_path,
)
from kdcache.formats.record import encode_record, read_record
from kdcache.formats.stores.commit import is_temporary, write_file
from kdcache.formats.stores.store import CLAIMS, REPAIR, STATUS, Store, open_store
from kdcache.formats.stores.transfer_store import (
    SUFFIX,
    TOKENIZERS_PATH,
    TRANSFER_NAME,
    CompressedFile,
    CompressedFiles,
    TransferRecord,
    TransferStore,
    compressed_path,
)
from kdcache.formats.stores.zstd import DEFAULT_LEVEL, MAX_LEVEL, MIN_LEVEL, compressed
from kdcache.progress import progress

T = TypeVar("T")
U = TypeVar("U")
#: Bytes of a file, in order.
Pieces = Generator[bytes, None, None]

#: Shards worked on at a time.
THREADS = min(8, os.cpu_count() or 1)

_CLAIM = "transfer"


def compress_cache(
    location: str | Path, out: str | Path, level: int = DEFAULT_LEVEL
) -> dict[str, Any]:
    """Write a copy of a cache for the wire: the same records, every data file compressed.

    Whatever reads a cache reads the copy too, through the bounded local copy.

    Args:
        location: directory or URL of the cache; shards that are not committed yet are left out.
        out: directory or URL of the copy; an unfinished one goes on.
        level: of Zstandard, from 1 (fast) to 22 (small).

    Returns:
        cache, source, level, files, bytes (expanded), compressed_bytes, ratio (of the two),
        shards_written, shards_skipped.

    Raises:
        FormatError: the cache is damaged.
        RecipeError: it is compressed already, or there is no such level.
        IdentityError: the output was begun from another cache.
        StorageError: a store refused.
    """
    if not MIN_LEVEL <= level <= MAX_LEVEL:
        raise RecipeError(f"compress: level {level}, expected {MIN_LEVEL} to {MAX_LEVEL}")
    cache = open_cache(location)
    if isinstance(cache.store, TransferStore):
        raise RecipeError(f"{cache.path}: compressed already; copy it as it is, or expand it")
    target = open_store(out)
    target = target.packed if isinstance(target, TransferStore) else target
    names = _visible(target)
    if names and TRANSFER_NAME not in names:
        _refuse(target, "a compressed cache", names)
    copy = _Compression(cache, target, level)
    copy.run()
    return {
        "cache": target.name,
        "source": cache.path,
        "level": level,
        **copy.told,
        "ratio": copy.told["bytes"] / max(1, copy.told["compressed_bytes"]),
    }


def expand_cache(location: str | Path, out: str | Path) -> dict[str, Any]:
    """Make the ordinary cache again of one that is compressed, equal to it bit for bit.

    Args:
        location: directory or URL of the compressed cache.
        out: directory or URL of the ordinary one; an unfinished one goes on.

    Returns:
        cache, source, files, bytes, shards_written, shards_skipped.

    Raises:
        FormatError: the cache is damaged.
        RecipeError: it is not compressed.
        IdentityError: the output was begun from another cache.
        StorageError: a store refused.
    """
    cache = open_cache(location)
    if not isinstance(cache.store, TransferStore):
        raise RecipeError(f"{cache.path}: not compressed (it has no {TRANSFER_NAME})")
    target = open_store(out)
    if isinstance(target, TransferStore):
        raise StorageError(f"{target.name}: a compressed cache; choose an empty or new directory")
    others = _visible(target) - set(cache.store.names(""))
    if others:
        _refuse(target, "this cache expanded", others)
    copy = _Expansion(cache, target)
    copy.run()
    return {"cache": target.name, "source": cache.path, **copy.told}


def _visible(store: Store) -> set[str]:
    """Names in a store, but for those of claims and of what is temporary."""
    return {n for n in store.names("") if n not in (CLAIMS, STATUS) and not is_temporary(n)}


def _refuse(store: Store, expected: str, names: set[str]) -> NoReturn:
    raise StorageError(
        f"{store.name}: not {expected} (it holds {', '.join(sorted(names)[:3])}); choose an empty "
        "or new directory"
    )


class _Copy(ABC):
    """A cache written to a store shard by shard.

    Attributes:
        told: what the summary says of files and shards.
    """

    def __init__(self, cache: Cache, target: Store) -> None:
        self.source, self.target = cache.store, target
        self.manifest = cache.manifest
        self.told = {"files": 0, "bytes": 0, "shards_written": 0, "shards_skipped": 0}

    def run(self) -> None:
        """Write what is not there yet."""
        made = self.target.make()
        claim = self.target.claim(_CLAIM)
        if claim is None:
            raise StorageError(
                f"{self.target.name}: another process writes it; wait until it has finished"
            )
        try:
            if claim.stale:
                self._sweep()
            self.begin()
            for name in list_signals(self.source):
                self._record(signal_path(name))
            commits = list_commits(self.source)
            shards = [(name, shard) for name in sorted(commits) for shard in sorted(commits[name])]
            with progress(len(shards), "copy", "shard") as bar:
                for written, files in _several(self._shard, shards):
                    self.told["shards_written" if written else "shards_skipped"] += 1
                    self.count(files)
                    bar.update()
            self._record(MANIFEST_NAME)
        finally:
            claim.release()
            self.target.discard(made)

    @abstractmethod
    def begin(self) -> None:
        """Write what belongs to no shard, but for the manifest."""

    @abstractmethod
    def write(self, record: CommitRecord) -> Sequence[FileRecord]:
        """Write the files of a shard, and what else must be there before its commit."""

    @abstractmethod
    def written(self, record: CommitRecord) -> Sequence[FileRecord]:
        """The files of a shard whose commit stands, as `write` returns them."""

    def count(self, files: Sequence[FileRecord]) -> None:
        """Add up what was written."""
        self.told["files"] += len(files)
        self.told["bytes"] += sum(file.bytes for file in files)

    def _sweep(self) -> None:
        """Remove what a copy that died was writing."""
        for path in self.target.walk(""):
            parts = path.split("/")
            temporary = [n for n, part in enumerate(parts) if is_temporary(part)]
            if temporary:
                self.target.remove("/".join(parts[: temporary[0] + 1]))

    def _shard(self, key: tuple[str, int]) -> tuple[bool, Sequence[FileRecord]]:
        """Write one shard of a signal; whether it was not there, and its files."""
        path = commit_path(*key)
        record = read_commit(self.source, *key)
        try:
            self.target.size(path)
        except FileNotFoundError:
            files = self.write(record)
            self._record(path)
            return True, files
        self._record(path)
        return False, self.written(record)

    def _record(self, path: str) -> None:
        """Create a record as it is, or find that the same stands already."""
        data = self.source.read(path)
        try:
            self.target.create(path, data)
        except FileExistsError:
            if self.target.read(path) != data:
                raise IdentityError(
                    f"{self.target.at(path)}: not what {self.source.at(path)} says: the output was "
                    "begun from another cache; choose another output"
                ) from None

    def pieces(self, file: FileRecord) -> Pieces:
        """A file of the source, expanded where it was compressed, compared with its record."""
        where, digester = self.source.at(file.path), Digester()
        try:
            for piece in self.source.pieces(file.path):
                digester.update(piece)
                yield piece
        except FileNotFoundError:
            raise IntegrityError(f"{where}: missing; {REPAIR}") from None
        compare(where, digester, file)

    def put(
        self, files: Sequence[FileRecord], suffix: str, become: Callable[[FileRecord], Pieces]
    ) -> None:
        """Write one file, or the files of a Zarr group, which appear together.

        Args:
            files: of the source.
            suffix: of their names in the target.
            become: the bytes that a file becomes.
        """
        if len(files) == 1:
            path = files[0].path + suffix

            def write_one(stream: BinaryIO) -> str:
                for piece in become(files[0]):
                    stream.write(piece)
                return path

            self.target.put_file(path, write_one)
            return
        group = part_of(files[0].path)

        def write_all(folder: Path) -> str:
            for file in files:
                inner = file.path.removeprefix(f"{group}/") + suffix
                write_file(folder / inner, become(file))
            return group

        self.target.put_folder(group, write_all)


class _Compression(_Copy):
    """Every file compressed, and listed in a record beside the commit."""

    def __init__(self, cache: Cache, target: Store, level: int) -> None:
        super().__init__(cache, target)
        self.level = level
        self.told["compressed_bytes"] = 0

    def begin(self) -> None:
        """That the cache is compressed, then its tokenizers."""
        record = TransferRecord(codec="zstd", level=self.level, corpus=self.manifest.corpus.digest)
        try:
            self.target.create(TRANSFER_NAME, encode_record(record))
        except FileExistsError:
            standing = read_record(TransferRecord, self.target, TRANSFER_NAME)
            faults = differences(standing.model_dump(), record.model_dump())
            if faults:
                raise IdentityError(
                    f"{self.target.at(TRANSFER_NAME)}: {'; '.join(faults)}: compress as the output "
                    "was begun, or choose another output"
                ) from None
        try:
            self.count(self._standing(TOKENIZERS_PATH))
        except FileNotFoundError:
            files = [file for t in self.manifest.tokenizers.values() for file in t.files]
            self.count(self._write([[file] for file in files], TOKENIZERS_PATH))

    def write(self, record: CommitRecord) -> Sequence[CompressedFile]:
        """The files of a shard and the record that lists them."""
        path = compressed_path(record.signal, record.shard)
        return self._write([part.files for part in record.parts], path)

    def written(self, record: CommitRecord) -> Sequence[CompressedFile]:
        """The files of a shard that was compressed."""
        return self._standing(compressed_path(record.signal, record.shard))

    def _standing(self, path: str) -> Sequence[CompressedFile]:
        return read_record(CompressedFiles, self.target, path).files

    def _write(self, parts: Sequence[Sequence[FileRecord]], path: str) -> Sequence[CompressedFile]:
        found: list[CompressedFile] = []

        def become(file: FileRecord) -> Pieces:
            digester = Digester()
            for piece in compressed(self.pieces(file), self.level):
                digester.update(piece)
                yield piece
            record = digester.record(file.path + SUFFIX)
            found.append(CompressedFile(**record.model_dump(), expands_to=file.bytes))

        for files in parts:
            self.put(files, SUFFIX, become)
        data = encode_record(CompressedFiles(files=found))
        try:
            self.target.create(path, data)
        except FileExistsError:
            # Of a process that died before the commit; another Zstandard gives other bytes.
            if self.target.read(path) != data:
                self.target.remove(path)
                self.target.create(path, data)
        return found

    def count(self, files: Sequence[FileRecord]) -> None:
        """Add up what was compressed."""
        for file in files:
            assert isinstance(file, CompressedFile), "what `write` returns"
            self.told["files"] += 1
            self.told["bytes"] += file.expands_to
            self.told["compressed_bytes"] += file.bytes


class _Expansion(_Copy):
    """Every file as it was."""

    def begin(self) -> None:
        """The tokenizers."""
        for tokenizer in self.manifest.tokenizers.values():
            for file in tokenizer.files:
                self.put([file], "", self.pieces)
            self.count(tokenizer.files)

    def write(self, record: CommitRecord) -> Sequence[FileRecord]:
        """The files of a shard."""
        for part in record.parts:
            self.put(part.files, "", self.pieces)
        return self.written(record)

    def written(self, record: CommitRecord) -> Sequence[FileRecord]:
        """The files of a shard."""
        return [file for part in record.parts for file in part.files]


def _several(call: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """What a call returns for some items, several at a time, in the order in which they end."""
    running: set[Future[U]] = set()
    with ThreadPoolExecutor(THREADS, "kdcache-transfer") as threads:
        for item in items:
            running.add(threads.submit(call, item))
            if len(running) >= 2 * THREADS:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        for future in as_completed(running):
            yield future.result()
