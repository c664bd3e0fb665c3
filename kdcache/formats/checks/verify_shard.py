"""What `verify` checks of one shard: its samples, then every signal part against what it describes.

# M samples
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from kdcache.errors import FormatError, StorageError
from kdcache.formats.cache import Cache
from kdcache.formats.checks.structure import sample_faults, stream_faults
from kdcache.formats.checks.structure_dense import dense_faults
from kdcache.formats.checks.structure_ragged import ragged_faults
from kdcache.formats.checks.verify_findings import CorpusSums, Findings, num_records
from kdcache.formats.checks.verify_reading import Buffers, read_checked
from kdcache.formats.dense import DenseRecord, open_dense_part
from kdcache.formats.listing import part_of, unnamed_in
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    SAMPLES,
    CommitRecord,
    FileRecord,
    PartRecord,
    commit_path,
)
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import STREAM_PREFIX, ragged_columns
from kdcache.formats.shard import SampleShard, SignalShard, open_part, sample_shard
from kdcache.formats.signals import AttentionRecord, HiddenRecord, SignalRecord
from kdcache.formats.units import MAIN_COLUMN, label_counts


@dataclass
class _Signal:
    """What is under way of one signal of the shard.

    Attributes:
        commit: of the shard.
        left: parts that are not checked yet.
        entries: column to its records in the parts that were; None after one that is broken.
        columns: part to its ragged columns, where another signal is made from this one.
    """

    commit: CommitRecord
    left: int
    entries: dict[str, int] | None = field(default_factory=dict)
    columns: dict[int, dict[str, Ragged]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Demand:
    """What the parts of a signal must have.

    Attributes:
        counts: [M] records of the main column; None where nothing is demanded.
        lengths: [M] tokens in the signal's stream.
    """

    counts: np.ndarray | None
    lengths: np.ndarray


class ShardCheck:
    """The checks of one shard, each a task of its own.

    `read` gets the files of a part. What the others need of one another they wait for: `samples`
    before all else, a signal's `demand` before its parts, all parts of the signals that it was
    made from before that.

    Attributes:
        path: of the cache, for messages.
        inputs: signals that others of the shard are made from.
    """

    def __init__(
        self,
        cache: Cache,
        shard: int,
        commits: Mapping[str, CommitRecord],
        findings: Findings,
        buffers: Buffers,
    ) -> None:
        """Name the shard.

        Args:
            cache: the cache; only its records are read.
            shard: shard number.
            commits: signal (or "samples") to its commit, of those whose structure is checked.
            findings: get the faults.
            buffers: what files are read into.
        """
        self.path, self._buffers = cache.path, buffers
        self._cache, self._shard, self._findings = cache, shard, findings
        self._signals = {name: _Signal(c, len(c.parts)) for name, c in commits.items()}
        made = [cache.signals[name].inputs for name in commits if name != SAMPLES]
        self.inputs = {name for inputs in made for name in inputs}
        self._files: dict[str, memoryview] = {}
        self._samples: SampleShard | None = None
        self._lock = Lock()

    def signal(self, name: str) -> SignalRecord:
        """The record of a signal."""
        return self._cache.signal(name)

    def samples(self, shard: int) -> SampleShard:
        """The samples, which are open."""
        assert self._samples is not None
        return self._samples

    def signal_shard(self, name: str, shard: int) -> SignalShard:
        """A signal that another was made from, all of whose parts are open."""
        signal = self._signals[name]
        parts = [
            (part.start, part.stop, signal.columns[number])
            for number, part in enumerate(signal.commit.parts)
        ]
        return SignalShard(signal.commit.start, signal.commit.stop, parts)

    def read(
        self,
        signal: str,
        number: int,
        files: Sequence[FileRecord],
        advance: Callable[[int], object],
        keep: bool,
    ) -> bool:
        """Read and digest the files of a part; whether all are what the commit says.

        Args:
            signal: signal name, or "samples".
            number: part number.
            files: their records.
            advance: told how many bytes came.
            keep: hold the bytes for the checks; they hold nothing that is not sound.
        """
        sound = True
        for file in files:
            try:
                data = read_checked(self._cache.store, file, self._buffers, advance)
                self._files[file.path] = data
            except (FormatError, StorageError) as error:
                named_by = commit_path(signal, self._shard)
                line = f"{error} ({named_by} names it)"
                self._findings.add(signal, self._shard, number, line)
                sound = False
            if not (keep and sound):
                self._drop(files)
        return sound

    def _drop(self, files: Iterable[FileRecord]) -> None:
        for file in files:
            data = self._files.pop(file.path, None)
            if data is not None:
                self._buffers.give(data)

    def close(self) -> None:
        """Give back the memory of what was kept for other checks, when all of them are done."""
        self._samples = None
        for signal in self._signals.values():
            signal.columns.clear()
            self._drop(file for part in signal.commit.parts for file in part.files)

    def open_samples(self, reading: Future[bool]) -> bool:
        """Open the samples; whether the lengths of their streams can be relied on."""
        if not reading.result():
            return False
        commit = self._signals[SAMPLES].commit
        place = (SAMPLES, self._shard, 0)
        found: list[SampleShard] = []
        part, schema = commit.parts[0], self._cache.samples_schema

        def open_it() -> None:
            where = self._cache.store.at(part.files[0].path)
            data = self._files[part.files[0].path]
            found.append(sample_shard(part, open_part(data, where, part, schema, checked=False)))

        if not self._findings.guarded(place, open_it):
            return False
        faults = stream_faults(found[0], self._cache.manifest.streams)
        self._tell(SAMPLES, 0, part.files[0].path, faults)
        if not faults:
            self._samples = found[0]
        return not faults

    def check_samples(self, opened: Future[bool], sums: CorpusSums, taken: Future[None]) -> None:
        """Check everything of the samples, and add them to the sums over the corpus.

        Args:
            opened: `open_samples`.
            sums: over the corpus.
            taken: is done when the sums no longer need the samples.
        """
        if not opened.result():
            sums.add(self._shard, None, taken)
            return
        samples, manifest = self.samples(self._shard), self._cache.manifest
        commit = self._signals[SAMPLES].commit
        vocab_sizes = {name: stream.vocab_size for name, stream in manifest.streams.items()}
        faults = sample_faults(samples, manifest.corpus, vocab_sizes)
        self._tell(SAMPLES, 0, commit.parts[0].files[0].path, faults)
        sums.add(self._shard, None if faults else samples, taken)
        if not faults:
            entries = {STREAM_PREFIX + name: num_records(c) for name, c in samples.streams.items()}
            tokens = sum(entries.values())
            plan = manifest.shards[self._shard].tokens
            place = (SAMPLES, self._shard, 0)
            what = f"tokens of shard {self._shard}"
            self._findings.compare(place, what, tokens, plan, MANIFEST_NAME)
            self._counts(commit, entries, tokens)

    def demand(self, name: str, before: Sequence[Future[bool]]) -> _Demand | None:
        """What the parts of a signal must have; None where that cannot be known.

        Args:
            name: of the signal.
            before: the samples' `open_samples`, and all parts of what it was made from.
        """
        if not all(future.result() for future in before):
            return None
        signal = self._cache.signals[name]
        found: list[np.ndarray | None] = []
        place = (name, self._shard, 0)
        if not self._findings.guarded(
            place, lambda: found.append(label_counts(self, signal, self._shard))
        ):
            return None
        return _Demand(found[0], self.samples(self._shard).streams[signal.stream].lengths)

    def check_part(
        self, name: str, number: int, reading: Future[bool], demand: Future[_Demand | None]
    ) -> bool:
        """Check the structure of a part; whether it could be opened.

        Args:
            name: of the signal.
            number: of the part.
            reading: its `read`.
            demand: of its signal.
        """
        part = self._signals[name].commit.parts[number]
        entries: dict[str, int] | None = None
        try:
            wanted = demand.result()
            if reading.result() and wanted is not None:
                entries = self._checked_entries(name, number, part, wanted)
        finally:
            if name not in self.inputs:
                self._drop(part.files)
        self._count_part(name, entries)
        return entries is not None

    def _checked_entries(
        self, name: str, number: int, part: PartRecord, demand: _Demand
    ) -> dict[str, int] | None:
        """Records of every column of a part, after its checks; None where it cannot be opened."""
        signal = self._cache.signals[name]
        start = self._signals[name].commit.start
        mine = slice(part.start - start, part.stop - start)
        counts = None if demand.counts is None else demand.counts[mine]
        check = self._dense if isinstance(signal, HiddenRecord | AttentionRecord) else self._ragged
        found: list[dict[str, int]] = []
        self._findings.guarded(
            (name, self._shard, number),
            lambda: found.append(check(signal, number, part, counts, demand.lengths[mine])),
        )
        return found[0] if found else None

    def _ragged(
        self,
        signal: SignalRecord,
        number: int,
        part: PartRecord,
        counts: np.ndarray | None,
        lengths: np.ndarray,
    ) -> dict[str, int]:
        """A part that is kept in Arrow."""
        path = part.files[0].path
        schema = self._cache.signal_schema(signal.name)
        where = self._cache.store.at(path)
        batch = open_part(self._files[path], where, part, schema, checked=False)
        columns = ragged_columns(batch)
        self._tell(signal.name, number, path, ragged_faults(signal, columns, counts, lengths))
        if signal.name in self.inputs:
            self._signals[signal.name].columns[number] = columns
        return {column: num_records(ragged) for column, ragged in columns.items()}

    def _dense(
        self,
        signal: SignalRecord,
        number: int,
        part: PartRecord,
        counts: np.ndarray | None,
        lengths: np.ndarray,
    ) -> dict[str, int]:
        """A part that is kept in Zarr: its files, every chunk and value."""
        assert isinstance(signal, DenseRecord)
        assert counts is not None, "dense signals have a row for each thing described"
        group = part_of(part.files[0].path)
        folder, rows = self._cache.store.at(group), int(counts.sum())
        named = {file.path for file in part.files}

        def opened(path: str, bytes_too: bool) -> memoryview:
            if f"{group}/{path}" not in named:
                raise FormatError(f"{folder}: its commit names no {path}")
            return self._files[f"{group}/{path}"]

        array = open_dense_part(opened, folder, part.start, part.stop, signal, rows)
        for path in unnamed_in(self._cache.store, group, named):
            self._tell(signal.name, number, path, [_NOT_NAMED])
        self._tell(signal.name, number, group, dense_faults(signal, array, counts, lengths))
        return {MAIN_COLUMN[signal.kind]: rows}

    def _count_part(self, name: str, entries: dict[str, int] | None) -> None:
        """Take in a part that was checked; after the last compare with what the commit counts."""
        signal = self._signals[name]
        with self._lock:
            signal.left -= 1
            if signal.entries is None or entries is None:
                signal.entries = None
                return
            for column, count in entries.items():
                signal.entries[column] = signal.entries.get(column, 0) + count
            if signal.left:
                return
        main = MAIN_COLUMN[self._cache.signals[name].kind]
        self._counts(signal.commit, signal.entries, signal.entries[main])

    def _counts(self, record: CommitRecord, entries: dict[str, int], tokens: int) -> None:
        """What a commit counts must be what its files hold."""
        where = f"the commit of {record.signal!r} shard {record.shard}"
        path = commit_path(record.signal, record.shard)
        place = (record.signal, record.shard, len(record.parts))
        self._findings.compare(place, f"entries in {where}", entries, record.entries, path)
        self._findings.compare(place, f"tokens in {where}", tokens, record.tokens, path)

    def _tell(self, signal: str, number: int, path: str, faults: Iterable[str]) -> None:
        for fault in faults:
            line = f"{self._cache.store.at(path)}: {fault}"
            self._findings.add(signal, self._shard, number, line)


_NOT_NAMED = "its commit does not name this file; remove it"
