"""Reading a cache: records at once, data files when they are first asked for.

# M samples, N positions
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import pyarrow as pa

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.dense import DenseShard, open_dense_part
from kdcache.formats.integrity import check_opened, check_opened_size, mapped
from kdcache.formats.listing import list_commits, part_of, read_commit
from kdcache.formats.manifest import (
    SAMPLES,
    CommitRecord,
    FileRecord,
    PartRecord,
    StreamRecord,
    TokenizerRecord,
    commit_path,
    signal_path,
)
from kdcache.formats.opening import read_manifest, read_signals
from kdcache.formats.ragged import offsets_of
from kdcache.formats.schema import ragged_columns, samples_schema, signal_schema, stream_extras
from kdcache.formats.shard import SampleShard, SignalShard, open_part, sample_shard
from kdcache.formats.signals import (
    AttentionRecord,
    HiddenRecord,
    LogitsRecord,
    SignalRecord,
)
from kdcache.formats.stores.store import REPAIR, Store, open_store
from kdcache.formats.units import label_counts
from kdcache.formats.vocabulary import decode_tokens

if TYPE_CHECKING:
    from kdcache.train.batches.batches import Batches

#: Commits that are held; a window of shards needs some for each of its shards.
MOST_COMMITS = 4096


def open_cache(location: str | Path) -> Cache:
    """Open a cache for reading.

    Args:
        location: directory of the cache, or its URL ("s3://bucket/caches/deen").

    Raises:
        FormatError: there is no cache whose samples are all there, or a record is damaged.
        StorageError: the location cannot be read.
    """
    return Cache(open_store(location))


class Cache:
    """A cache that is read. Every file is checked once, before its first use.

    Attributes:
        store: where the cache lies.
        path: its directory or URL, for messages.
        manifest: what kdcache.json says.
        signals: name to record of every signal.
    """

    def __init__(self, store: Store, skip_broken: bool = False) -> None:
        """Read the records.

        Args:
            store: where the cache lies.
            skip_broken: leave out signals whose record is damaged or does not fit, for a repair.

        Raises:
            FormatError: there is no cache whose samples are all there, or a record is damaged.
            StorageError: a record cannot be read.
        """
        self.store = store
        self.path = store.name
        self.manifest = read_manifest(store)
        self.signals = read_signals(store, self.manifest, skip_broken)
        self._commits: dict[tuple[str, int], CommitRecord] = {}
        self._checked: set[str] = set()
        # A file that somebody still reads is mapped once: its pages are there already.
        self._maps: WeakValueDictionary[str, mmap.mmap] = WeakValueDictionary()
        self._valid: set[str] = set()

    @property
    def num_samples(self) -> int:
        """Samples of the corpus."""
        return self.manifest.corpus.num_samples

    @property
    def num_shards(self) -> int:
        """Shards of the plan."""
        return len(self.manifest.shards)

    def signal(self, name: str) -> SignalRecord:
        """The record of a signal.

        Raises:
            FormatError: the cache has none of that name.
        """
        if name not in self.signals:
            raise FormatError(
                f"{self.path}: cache has no signal {name!r}; it has {sorted(self.signals)}"
            )
        return self.signals[name]

    def logits(self, name: str) -> LogitsRecord:
        """The record of a signal of soft labels.

        Raises:
            FormatError: the cache has none of that name, or it is of another kind.
        """
        record = self.signal(name)
        if not isinstance(record, LogitsRecord):
            kinds = sorted(n for n, r in self.signals.items() if isinstance(r, LogitsRecord))
            raise FormatError(
                f"{self.path}: signal {name!r} is of kind {record.kind}, expected logits; "
                f"those are {kinds}"
            )
        return record

    def stream(self, name: str) -> StreamRecord:
        """The record of a stream.

        Raises:
            FormatError: the cache has none of that name.
        """
        if name not in self.manifest.streams:
            raise FormatError(
                f"{self.path}: cache has no stream {name!r}; it has {sorted(self.manifest.streams)}"
            )
        return self.manifest.streams[name]

    def batches(
        self, streams: Sequence[str] | None = None, signals: Sequence[str] = (), **options: Any
    ) -> Batches:
        """Shuffled batches for a training loop, as torch tensors: see `kdcache.batches`.

        Args:
            streams: names of the streams to read.
            signals: names of the signals to read.
            options: of `kdcache.batches`.

        Raises:
            FormatError: the cache lacks a stream or a signal, or its dump is unfinished.
        """
        from kdcache.train.batches.batches import batches  # torch is needed from here on

        return batches(self, streams, signals, **options)

    def committed(self, signal: str) -> set[int]:
        """Shards of a signal (or of "samples") whose commit stands now."""
        return list_commits(self.store).get(signal, set())

    def complete(self, signal: str) -> bool:
        """Whether every shard of a signal (or of "samples") is committed."""
        return self.committed(signal) >= set(range(self.num_shards))

    def require_complete(self, signal: str) -> None:
        """Refuse a signal whose dump has not finished.

        Raises:
            FormatError: with the number of shards that are committed.
        """
        if signal != SAMPLES:
            self.signal(signal)
        have = len(self.committed(signal) & set(range(self.num_shards)))
        if have < self.num_shards:
            raise FormatError(
                f"{self.path}: dump is unfinished: {have} of {self.num_shards} shards of "
                f"{signal!r} are committed; run the same `kdcache dump` again to finish"
            )

    def commit_record(self, signal: str, shard: int) -> CommitRecord:
        """The commit of one shard, checked against the shard plan.

        Raises:
            FormatError: there is none, it is damaged, or it covers other samples.
        """
        key = (signal, shard)
        record = self._commits.get(key)
        if record is None:
            if not 0 <= shard < self.num_shards:
                raise FormatError(f"{self.path}: no shard {shard}; the cache has {self.num_shards}")
            record = read_commit(self.store, signal, shard)
            plan = self.manifest.shards[shard]
            if (record.start, record.stop) != (plan.start, plan.stop):
                raise FormatError(
                    f"{self.path}: commit of {signal!r} shard {shard} holds the samples "
                    f"{record.start} to {record.stop}, the plan {plan.start} to {plan.stop}"
                )
            if signal == SAMPLES and len(record.parts) != 1:
                raise FormatError(
                    f"{self.path}: samples shard {shard} has {len(record.parts)} parts, expected 1"
                )
            # Of a hundred thousand shards not every commit can be held.
            while len(self._commits) >= MOST_COMMITS:
                oldest, *_ = list(self._commits)  # at once: threads may add meanwhile
                self._commits.pop(oldest, None)
            self._commits[key] = record
        return record

    @cached_property
    def samples_schema(self) -> pa.Schema:
        """Schema of the samples shards."""
        streams = {name: s.vocab_size for name, s in self.manifest.streams.items()}
        extras = {
            name: stream_extras(s.pair, s.template) for name, s in self.manifest.streams.items()
        }
        corpus = self.manifest.corpus
        return samples_schema(corpus.fields, streams, extras, tasks=bool(corpus.tasks))

    def signal_schema(self, name: str) -> pa.Schema:
        """Schema of a signal's shards."""
        return signal_schema(self.signal(name))

    def samples(self, shard: int) -> SampleShard:
        """The samples of one shard, mapped.

        Raises:
            IntegrityError: bytes are not those committed, or the commit is missing.
            FormatError: the file is not what its schema says.
        """
        part = self.commit_record(SAMPLES, shard).parts[0]
        return sample_shard(part, self._open(part, self.samples_schema))

    def signal_shard(self, name: str, shard: int) -> SignalShard:
        """One signal of one shard, mapped.

        Raises:
            IntegrityError: bytes are not those committed, or the commit is missing.
            FormatError: a file is not what its schema says.
        """
        schema = self.signal_schema(name)
        record = self.signal_commit(name, shard)
        parts = [
            (part.start, part.stop, ragged_columns(self._open(part, schema)))
            for part in record.parts
        ]
        return SignalShard(record.start, record.stop, parts)

    def dense_shard(self, name: str, shard: int) -> DenseShard:
        """One dense signal of one shard, mapped; its chunks are checked as they are read.

        Raises:
            IntegrityError: files are not those committed, or the commit is missing.
            FormatError: the signal is not dense, or its arrays are not what its record says.
        """
        signal = self.signal(name)
        if not isinstance(signal, HiddenRecord | AttentionRecord):
            raise FormatError(
                f"{self.path}: signal {name!r} is of kind {signal.kind}, which has no dense arrays"
            )
        record = self.signal_commit(name, shard)
        counts = label_counts(self, signal, shard)
        assert counts is not None, "dense signals have a row for each thing described"
        offsets = offsets_of(counts)
        parts = []
        for part in record.parts:
            first, last = offsets[part.start - record.start], offsets[part.stop - record.start]
            group = part_of(part.files[0].path)
            files = {file.path.removeprefix(f"{group}/"): file for file in part.files}
            folder, rows = self.store.at(group), int(last - first)
            opened = partial(self._file_of, files, folder)
            parts.append(open_dense_part(opened, folder, part.start, part.stop, signal, rows))
        return DenseShard(record.start, record.stop, offsets, parts)

    def signal_commit(self, name: str, shard: int) -> CommitRecord:
        """The commit of a signal's shard, if it fits the signal's record and inputs that stand.

        Raises:
            FormatError: it does not, or is missing or damaged.
        """
        signal, record = self.signal(name), self.commit_record(name, shard)
        found = {put: self.commit_record(put, shard).digest for put in signal.inputs}
        if found != record.inputs:
            wrong = next(
                put
                for put in {**found, **record.inputs}
                if found.get(put) != record.inputs.get(put)
            )
            raise IntegrityError(
                f"{self.path}: signal {name!r} shard {shard} was made from {wrong!r} of digest "
                f"{record.inputs.get(wrong)}, the cache has {found.get(wrong)}: delete "
                f"{name!r} and dump it again"
            )
        ending = ".zarr" if isinstance(signal, HiddenRecord | AttentionRecord) else ".arrow"
        for part in record.parts:
            path = part_of(part.files[0].path)
            if not path.endswith(ending):
                raise FormatError(
                    f"{self.store.at(path)}: a part of {name!r}, whose kind {signal.kind} is kept "
                    f"as {ending}"
                )
        if record.record != signal.digest:
            raise IntegrityError(
                f"{self.store.at(signal_path(name))}: its digest is {signal.digest}, "
                f"{commit_path(name, shard)} was made under {record.record}: one of both belongs "
                f"elsewhere; {REPAIR}"
            )
        return record

    def _open(self, part: PartRecord, schema: pa.Schema) -> pa.RecordBatch:
        file = part.files[0]
        valid, where = file.path in self._valid, self.store.at(file.path)
        batch = open_part(self._mapped(file), where, part, schema, checked=valid)
        self._valid.add(file.path)
        return batch

    def _mapped(self, file: FileRecord, bytes_too: bool = True) -> memoryview:
        """All bytes of a file, mapped, compared with its record the first time.

        Args:
            file: its record.
            bytes_too: compare the bytes; else the size alone.
        """
        held = self._maps.get(file.path)
        if held is not None:
            return memoryview(held)
        with self.store.open(file) as stream:
            if file.path not in self._checked:
                where = self.store.at(file.path)
                if bytes_too:
                    check_opened(stream, where, file)
                else:
                    check_opened_size(stream, where, file)
                self._checked.add(file.path)
            data = mapped(stream)
        if isinstance(data.obj, mmap.mmap):
            self._maps[file.path] = data.obj
        return data

    def _file_of(
        self, files: Mapping[str, FileRecord], folder: str, path: str, bytes_too: bool
    ) -> memoryview:
        """A file of a Zarr group that its commit must name."""
        if path not in files:
            raise FormatError(f"{folder}: its commit names no {path}")
        return self._mapped(files[path], bytes_too)

    def tokenizer(self, name: str) -> TokenizerRecord:
        """The record of a tokenizer.

        Raises:
            FormatError: the cache has none of that name.
        """
        if name not in self.manifest.tokenizers:
            raise FormatError(
                f"{self.path}: cache has no tokenizer {name!r}; "
                f"it has {sorted(self.manifest.tokenizers)}"
            )
        return self.manifest.tokenizers[name]

    def tokenizer_dir(self, name: str) -> Path:
        """Directory of a tokenizer, as transformers loads it; its files are checked first.

        Raises:
            FormatError: no such tokenizer, or a file is not what was committed.
        """
        files = self.tokenizer(name).files
        for file in files:
            self._mapped(file)
        return self.store.folder(files) / "tokenizers" / name

    def tokens(self, name: str) -> list[str]:
        """Token string of every id of a tokenizer, from its tokens.json.

        Raises:
            FormatError: no such tokenizer, or the file is not what was committed.
        """
        path = f"tokenizers/{name}/tokens.json"
        if path not in {file.path for file in self.tokenizer(name).files}:
            raise FormatError(f"{self.path}: tokenizer {name!r} has no tokens.json")
        file = next(file for file in self.tokenizer(name).files if file.path == path)
        data = bytes(self._mapped(file))
        return decode_tokens(data, self.store.at(path), self.tokenizer(name).vocab_size)
