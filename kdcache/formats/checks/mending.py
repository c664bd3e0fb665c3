"""Putting parts of a cache back from a place that has them: checked, and nothing sound touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from kdcache.errors import FormatError, IdentityError, IntegrityError, StorageError
from kdcache.formats.identity import differences
from kdcache.formats.integrity import Digester, check_file
from kdcache.formats.listing import (
    leftovers_of,
    list_commits,
    part_of,
    read_commit,
    read_signal,
    unnamed_in,
)
from kdcache.formats.manifest import MANIFEST_NAME, CommitRecord, FileRecord, Manifest, commit_path
from kdcache.formats.record import Record, encode_record, read_record
from kdcache.formats.signals import SignalRecord
from kdcache.formats.stores.claims import claim_name
from kdcache.formats.stores.store import Store, open_store


class Source(Protocol):
    """Where parts of a cache can be had again.

    Attributes:
        how: what was done, for the report.
    """

    how: str

    def manifest(self) -> Manifest:
        """The cache's manifest.

        Raises:
            KDCacheError: it cannot be had.
        """

    def signal(self, name: str) -> SignalRecord:
        """The record of a signal.

        Raises:
            KDCacheError: it cannot be had.
        """

    def tokenizer_file(self, name: str, file: FileRecord) -> bytes:
        """Bytes of a file of a tokenizer; they are compared with its record.

        Raises:
            KDCacheError: they cannot be had.
        """

    def offers(self, signal: str, number: int, has_data: bool) -> bool:
        """Whether to ask for a shard that is not committed.

        Args:
            signal: of the shard.
            number: of the shard.
            has_data: whether files of it lie there, so that a commit was lost or its dump killed.
        """

    def prepare(self, signal: str, shards: list[int]) -> None:
        """Get ready to give shards of a signal (or of "samples").

        Raises:
            KDCacheError: none of them can be had.
        """

    def shard(self, signal: str, number: int) -> Store:
        """A store that has the commit and files of a shard that was prepared.

        Raises:
            KDCacheError: it cannot be had.
        """

    def done(self, signal: str, number: int) -> None:
        """A shard was taken; what was kept of it may go."""


class Mirror:
    """A copy of the cache at another place."""

    def __init__(self, location: str | Path) -> None:
        """Name the place.

        Args:
            location: directory or URL of the copy.
        """
        self._store = open_store(location)
        self.how = f"fetched from {self._store.name}"

    @cached_property
    def _commits(self) -> dict[str, set[int]]:
        return list_commits(self._store)

    def manifest(self) -> Manifest:
        """The mirror's manifest."""
        try:
            return read_record(Manifest, self._store, MANIFEST_NAME)
        except FileNotFoundError:
            raise FormatError(f"{self._store.name}: a mirror has a {MANIFEST_NAME}") from None

    def signal(self, name: str) -> SignalRecord:
        """The mirror's record of a signal."""
        return read_signal(self._store, name)

    def tokenizer_file(self, name: str, file: FileRecord) -> bytes:
        """What the mirror has at the same path."""
        try:
            return b"".join(bytes(piece) for piece in self._store.pieces(file.path))
        except FileNotFoundError:
            raise IntegrityError(f"{self._store.at(file.path)}: missing in the mirror") from None

    def offers(self, signal: str, number: int, has_data: bool) -> bool:
        """Whether the mirror has it."""
        return number in self._commits.get(signal, set())

    def prepare(self, signal: str, shards: list[int]) -> None:
        """The mirror must be one of this cache; see `same_cache`."""

    def shard(self, signal: str, number: int) -> Store:
        """The mirror itself."""
        return self._store

    def done(self, signal: str, number: int) -> None:
        """It stays."""


def same_cache(source: Source, manifest: Manifest, where: str) -> None:
    """Refuse a mirror of something else.

    Raises:
        IdentityError: its samples are others; shows both sides.
    """
    kept = {"corpus", "streams", "shards", "shard_tokens"}
    stands, theirs = (
        one.model_dump(mode="json", include=kept) for one in (manifest, source.manifest())
    )
    faults = differences(stands, theirs)
    if faults:
        raise IdentityError(
            f"{where}: the mirror is of another cache: {'; '.join(faults[:3])}: name a copy of this"
        )


def copy_file(source: Store, target: Store, file: FileRecord) -> None:
    """Copy one data file; it gets its name when its bytes were found right.

    Raises:
        IntegrityError: the source lacks it, or has other bytes.
        StorageError: a store refused.
    """

    def write(stream: BinaryIO) -> str:
        digester = Digester()
        try:
            for piece in source.pieces(file.path):
                digester.update(piece)
                stream.write(piece)
        except FileNotFoundError:
            raise IntegrityError(f"{source.at(file.path)}: missing there too") from None
        if digester.record(file.path) != file:
            raise IntegrityError(f"{source.at(file.path)}: damaged there too")
        return file.path

    target.put_file(file.path, write)


def put_record(target: Store, path: str, record: Record) -> None:
    """Put a record in the place of a broken one, whole or not at all."""
    target.replace(path, encode_record(record))


def is_sound(store: Store, file: FileRecord) -> bool:
    """Whether a file is what its record says."""
    try:
        check_file(store, file, full=True)
    except (IntegrityError, StorageError):
        return False
    return True


def standing_commit(store: Store, signal: str, number: int) -> CommitRecord | None:
    """The commit of a shard; None where there is none that can be read."""
    try:
        return read_commit(store, signal, number)
    except (FormatError, StorageError):
        return None


@contextmanager
def exclusive(store: Store, signal: str, number: int) -> Iterator[bool]:
    """Keep others from writing a shard.

    Yields:
        Whether it was got; another process writes it otherwise.
    """
    claim = store.claim(claim_name(signal, number))
    try:
        yield claim is not None
    finally:
        if claim is not None:
            claim.release()


def install_shard(source: Store, target: Store, commit: CommitRecord) -> list[str]:
    """Make a shard of a cache what a commit says; files that are right already are left alone.

    Data files come first, then the commit, then what it does not name goes: a shard that was
    sound before, in another form, is never without a commit whose files are there.

    Args:
        source: has the shard.
        target: gets it; nobody else writes the shard.
        commit: what the source says of it.

    Returns:
        Paths of what was written.

    Raises:
        KDCacheError: the source lacks a file, or a store refused.
    """
    files = [file for part in commit.parts for file in part.files]
    named = {file.path for file in files}
    written = []
    for file in files:
        if not is_sound(target, file):
            copy_file(source, target, file)
            written.append(file.path)
    if standing_commit(target, commit.signal, commit.shard) != commit:
        path = commit_path(commit.signal, commit.shard)
        put_record(target, path, commit)
        written.append(path)
    groups = {part_of(path) for path in named if part_of(path) != path}
    strangers = [path for group in sorted(groups) for path in unnamed_in(target, group, named)]
    for path in [*leftovers_of(target, commit.signal, commit.shard, named), *strangers]:
        target.remove(path)
    return written
