"""Writers of a cache: data files first, then the record that makes them real."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import pyarrow as pa

from kdcache.errors import FormatError, IdentityError, KDCacheError, StorageError
from kdcache.formats.data_files import write_group, write_ipc
from kdcache.formats.dense import SCALE, VALUES
from kdcache.formats.identity import differences
from kdcache.formats.integrity import check_file, check_size, digest_bytes
from kdcache.formats.listing import (
    list_commits,
    list_signals,
    part_of,
    read_signal,
)
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    RESERVED,
    SAMPLES,
    CommitRecord,
    FileRecord,
    Manifest,
    PartRecord,
    commit_path,
    inside,
    part_digest,
    part_path,
    signal_path,
)
from kdcache.formats.record import Record, encode_record, read_record
from kdcache.formats.signals import SignalRecord
from kdcache.formats.stores.claims import Claims, standing_manifest
from kdcache.formats.stores.commit import is_temporary
from kdcache.formats.stores.store import CLAIMS, STATUS, open_store

R = TypeVar("R", bound=Record)

#: Names in a cache's folder that are no part of the format.
HIDDEN = frozenset({CLAIMS, STATUS})

#: Keys that may differ between two dumps of the same thing.
_MANIFEST_IGNORES = ("recipe", "versions")
SIGNAL_IGNORES = ("recipe", "versions", "teacher.path", "teacher.revision")


class CacheWriter(Claims):
    """Writes a cache; any number of processes may do so at once.

    What is written is claimed first: the samples as a whole, then each shard of a signal. On a disk
    a claim keeps others out; an object store has none, and there the commit decides. Used as a
    context manager: entering sweeps what writers that died have left behind; leaving, by an
    exception or not, commits nothing, and where nothing was committed nothing stays.
    """

    def __init__(self, location: str | Path) -> None:
        """Name the cache; nothing is touched before the context is entered.

        Args:
            location: directory or URL of the cache; made where there is none.
        """
        super().__init__(open_store(location))
        self.path = self.store.name
        self._made = False

    def __enter__(self) -> Self:
        """Read what stands and sweep what died.

        Raises:
            StorageError: the directory holds something else than a cache, or the store refused.
            FormatError: the manifest, or a commit whose writer died, is damaged.
        """
        self._made = self.store.make()
        self._refuse_others()
        self.manifest = standing_manifest(self.store)
        self.tidy()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take away a cache that this writer made and that holds nothing."""
        # What led here matters more than a tidy end.
        with contextlib.suppress(KDCacheError, OSError):
            if not self._names():
                self.store.remove(STATUS)
                self.store.discard(self._made)

    def _names(self) -> set[str]:
        """Names in the cache that are part of the format."""
        return {name for name in self.store.names("") if name not in HIDDEN}

    def _refuse_others(self) -> None:
        """A directory is ours if it is empty, has a manifest, or a dump that began left claims."""
        names = self._names()
        if not names or MANIFEST_NAME in names:
            return
        others = sorted(name for name in names - RESERVED if not is_temporary(name))
        # An object store has no claims, and a copy of an unfinished cache may have left them out.
        begun = not self.store.exclusive or CLAIMS in self.store.names("")
        if not begun and not list_commits(self.store):
            others = others or sorted(names)
        if others:
            raise StorageError(
                f"{self.path}: output already holds other files ({', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}); choose an empty or new directory"
            )

    def write_manifest(self, manifest: Manifest) -> Manifest:
        """Create kdcache.json, or find that the same stands already.

        Recipe and library versions may differ from those that stand; the first ones are kept.

        Returns:
            The manifest that stands.

        Raises:
            IdentityError: a different one stands; the message shows both sides.
        """
        self.manifest = self._create(MANIFEST_NAME, manifest, self._manifest_ignores(manifest))
        return self.manifest

    @staticmethod
    def _manifest_ignores(manifest: Manifest) -> tuple[str, ...]:
        """A tokenizer is its digest, its other files change with versions; sources may move."""
        files = tuple(f"tokenizers.{name}.files" for name in manifest.tokenizers)
        sources = manifest.lineage.sources if manifest.lineage else []
        moved = tuple(f"lineage.sources.{number}.name" for number in range(len(sources)))
        return (*_MANIFEST_IGNORES, *files, *moved)

    def write_signal(
        self, record: SignalRecord, waiting: Callable[[], object] = lambda: None
    ) -> SignalRecord:
        """Create a signal's record, or find that the same stands already.

        Args:
            record: the signal's.
            waiting: called again and again while another process writes it.

        Returns:
            The record that stands.

        Raises:
            IdentityError: a different one stands; the message shows both sides.
        """
        path = signal_path(record.name)
        if record.name in list_signals(self.store):
            return self._stands(path, record, SIGNAL_IGNORES, "give the signal another name")
        claim = self.wait(record.name, waiting)
        try:
            return self._create(path, record, SIGNAL_IGNORES, "give the signal another name")
        finally:
            if claim is not None:
                self.release(claim, record.name)

    def put_tokenizer(self, name: str, files: Mapping[str, bytes]) -> list[FileRecord]:
        """Write the files of a tokenizer, before the manifest that names them.

        Where the manifest stands, nothing is written and its own records are returned.

        Args:
            name: tokenizer name.
            files: file name to bytes.
        """
        if self.manifest is not None:
            if name not in self.manifest.tokenizers:
                raise IdentityError(
                    f"{self.path}: the cache has the tokenizers "
                    f"{sorted(self.manifest.tokenizers)}, not {name!r}; choose another output"
                )
            return list(self.manifest.tokenizers[name].files)
        if self.store.exclusive:
            self.store.remove(f"tokenizers/{name}")  # of a dump that was killed here
        records = []
        for file, data in sorted(files.items()):
            try:
                path = inside(f"tokenizers/{name}/{file}")
            except ValueError as error:
                raise FormatError(f"tokenizer {name}: {error}") from None
            self._put(path, data)
            records.append(digest_bytes(data, path))
        return records

    def _put(self, path: str, data: bytes) -> None:
        """Create a file; where claims keep nobody out, another may have put the same bytes."""
        try:
            self.store.create(path, data)
        except FileExistsError:
            if self.store.exclusive or self.store.read(path) != data:
                raise StorageError(
                    f"{self.store.at(path)}: a dump that was not finished left other bytes here; "
                    "remove them, or choose another output"
                ) from None

    def write_part(
        self, signal: str, shard: int, part: int, start: int, stop: int, batch: pa.RecordBatch
    ) -> PartRecord:
        """Write one data file of a shard that is to be committed.

        Where the shard's commit stands, nothing is kept: the bytes must be those committed.

        Args:
            signal: signal name, or "samples".
            shard: shard number.
            part: part number, from 0.
            start: first sample, counted over the corpus.
            stop: sample after the last.
            batch: stop - start rows.

        Raises:
            IdentityError: the shard is committed with other bytes.
            StorageError: the disk refused; nothing is left behind.
        """
        if batch.num_rows != stop - start:
            raise FormatError(
                f"{signal} shard {shard} part {part}: {batch.num_rows} rows given for the "
                f"samples {start} to {stop}"
            )
        if self.is_committed(signal, shard):
            return self._compare_part(signal, shard, part, [write_ipc(batch, None)])
        record: list[FileRecord] = []

        def write(stream: BinaryIO) -> str:
            found = write_ipc(batch, stream)
            path = part_path(signal, shard, part, [found])
            record.append(found.model_copy(update={"path": path}))
            return path

        self.store.put_file(f"{signal}/{shard:05d}.{part}.arrow", write)
        return PartRecord(start=start, stop=stop, files=record)

    def write_dense_part(
        self,
        signal: str,
        shard: int,
        part: int,
        start: int,
        stop: int,
        values: np.ndarray,
        scale: np.ndarray | None = None,
    ) -> PartRecord:
        """Write one Zarr group of a shard that is to be committed.

        Where the shard's commit stands, nothing is written: the bytes must be those committed.

        Args:
            signal: signal name.
            shard: shard number.
            part: part number, from 0.
            start: first sample, counted over the corpus.
            stop: sample after the last.
            values: [rows, layers, width] as `dense.dense_arrays` says, for all of the samples.
            scale: [rows, layers] float32, for int8.

        Raises:
            IdentityError: the shard is committed with other bytes.
            StorageError: the disk refused; nothing is left behind.
        """
        arrays = {VALUES: values} | ({} if scale is None else {SCALE: scale})
        if self.is_committed(signal, shard):
            return self._compare_part(signal, shard, part, write_group(None, arrays))
        files: list[FileRecord] = []

        def write(folder: Path) -> str:
            found = write_group(folder, arrays)
            path = part_path(signal, shard, part, found)
            files.extend(f.model_copy(update={"path": f"{path}/{f.path}"}) for f in found)
            return path

        self.store.put_folder(f"{signal}/{shard:05d}.{part}.zarr", write)
        return PartRecord(start=start, stop=stop, files=files)

    def _compare_part(
        self, signal: str, shard: int, part: int, given: list[FileRecord]
    ) -> PartRecord:
        """The part that stands, if it has the bytes that are given."""
        standing = self.commit_record(signal, shard).parts
        if not self.store.exclusive and signal != SAMPLES and part < len(standing):
            return standing[part]  # another was first, and may differ by float noise
        found = "no such part"
        if part < len(standing):
            found = part_digest(standing[part].files)
        if found != part_digest(given):
            raise IdentityError(
                f"{self.path}: {signal} shard {shard} part {part} holds xxh3 {found} in the cache, "
                f"{part_digest(given)} given: corpus, tokenizer or recipe changed; use those the "
                "cache was begun with, or choose another output"
            )
        return standing[part]

    def commit(self, record: CommitRecord) -> CommitRecord:
        """Make one shard real: check that its files are there, then create the record.

        Returns:
            The commit that stands; where another process was first, its own.

        Raises:
            IdentityError: a commit of the shard stands that is of other samples or inputs.
        """
        for part in record.parts:
            for file in part.files:
                # What a disk kept can be read back for nothing; an upload was counted.
                check = check_file if self.store.exclusive else check_size
                check(self.store, file)
        path = commit_path(record.signal, record.shard)
        if record.signal == SAMPLES:
            return self._create(path, record, ())
        said = read_signal(self.store, record.signal).digest
        record = record.model_copy(update={"record": said})
        # Two teachers on two machines differ by float noise: whoever was first has said it.
        standing = self._create(path, record, ("entries", "parts"))
        named = {file.path for part in standing.parts for file in part.files}
        for part in record.parts:
            if part.files[0].path not in named:
                self.store.remove(part_of(part.files[0].path))
        return standing

    def _create(
        self,
        path: str,
        record: R,
        ignore: tuple[str, ...],
        otherwise: str = "choose another output",
    ) -> R:
        try:
            self.store.create(path, encode_record(record))
        except FileExistsError:
            return self._stands(path, record, ignore, otherwise)
        return record

    def _stands(self, path: str, record: R, ignore: tuple[str, ...], otherwise: str) -> R:
        """The record that stands, if it says the same."""
        standing = read_record(type(record), self.store, path)
        faults = differences(_tree(standing), _tree(record), ignore)
        if faults:
            shown = "; ".join(faults[:4]) + ("; ..." if len(faults) > 4 else "")
            raise IdentityError(
                f"{self.store.at(path)}: {shown}: use what the cache was made with, or {otherwise}"
            )
        return standing


def _tree(record: Record) -> dict[str, Any]:
    return record.model_dump(mode="json")
