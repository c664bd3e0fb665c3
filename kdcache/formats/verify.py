"""Verification: every checksum and every structural promise of a cache.

# M samples, N positions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kdcache.errors import FormatError, StorageError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.dense import DenseRecord
from kdcache.formats.identity import CorpusDigest, StreamDigest
from kdcache.formats.integrity import check_file
from kdcache.formats.listing import leftovers, list_commits, list_signals, unnamed_in
from kdcache.formats.manifest import SAMPLES, CommitRecord, FileRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import STREAM_PREFIX, extra_fields, join_ids
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import AttentionRecord, HiddenRecord, SignalRecord
from kdcache.formats.structure import sample_faults
from kdcache.formats.structure_dense import dense_faults
from kdcache.formats.structure_ragged import ragged_faults
from kdcache.formats.units import MAIN_COLUMN, label_counts
from kdcache.progress import progress


@dataclass
class VerifyReport:
    """What `verify_cache` found.

    Attributes:
        files: files checked.
        bytes: their bytes.
        faults: one line each; none where the cache is whole.
        leftovers: files that no record names: what an interrupted dump left, no fault.
    """

    files: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


def verify_cache(path: str | Path) -> VerifyReport:
    """Check a whole cache: crc32c, xxh3, sizes, schemas, structure, digests and coverage.

    A cache whose records cannot be read at all is a report with that one fault.

    Args:
        path: directory of the cache.

    Raises:
        FormatError: there is no cache there.
    """
    root = Path(path)
    if not root.is_dir():
        open_cache(root)  # raises: what is missing is no cache with a fault
    report = VerifyReport()
    try:
        cache = open_cache(root)
    except FormatError as error:
        if not (root / "kdcache.json").exists():
            raise
        report.faults.append(str(error))
        return report
    _Verifier(cache, report).run()
    return report


class _Verifier:
    """One pass over a cache: samples first, then each signal against them."""

    def __init__(self, cache: Cache, report: VerifyReport) -> None:
        self.cache = cache
        self.report = report
        self.named: set[str] = set()
        self.unread: set[str] = set()  # what files of shards with a damaged commit begin with
        self.lengths: dict[int, dict[str, np.ndarray]] = {}

    def run(self) -> None:
        """Fill the report."""
        commits = list_commits(self.cache.path)
        self._records(commits)
        for name, tokenizer in self.cache.manifest.tokenizers.items():
            if self._files(tokenizer.files):
                self._guarded(partial(self.cache.tokens, name))
        total = self.cache.num_shards * (1 + len(self.cache.signals))
        with progress(total, "verify", "shard") as bar:
            self._samples(commits.get(SAMPLES, set()), bar.update)
            for name in self.cache.signals:
                self._signal(name, commits.get(name, set()), bar.update)
        # What a damaged commit named is not known, so nothing of its shard is called left over.
        unread = tuple(self.unread)
        found = leftovers(self.cache.path, self.named)
        self.report.leftovers = [path for path in found if not path.startswith(unread)]

    def _fault(self, where: str, what: str) -> None:
        self.report.faults.append(f"{self.cache.path / where}: {what}")

    def _guarded(self, check: Callable[[], object]) -> bool:
        """Run a check that raises; its error is a fault."""
        try:
            check()
        except (FormatError, StorageError) as error:
            self.report.faults.append(str(error))
            return False
        return True

    def _files(self, files: Sequence[FileRecord]) -> bool:
        """Checksums of some files; whether all are sound."""
        sound = True
        for file in files:
            self.named.add(file.path)
            self.report.files += 1
            self.report.bytes += file.bytes
            sound &= self._guarded(partial(check_file, self.cache.path, file, full=True))
        return sound

    def _records(self, commits: dict[str, set[int]]) -> None:
        """JSON files: those read when the cache was opened, and commits that belong to nothing."""
        known = {SAMPLES, *self.cache.signals}
        files = ["kdcache.json"]
        files += [f"signals/{name}.json" for name in list_signals(self.cache.path)]
        for signal, shards in sorted(commits.items()):
            for shard in sorted(shards):
                path = f"commits/{signal}.{shard:05d}.json"
                files.append(path)
                if signal not in known:
                    self._fault(path, f"a commit of {signal!r}, which has no record in signals/")
                elif shard >= self.cache.num_shards:
                    self._fault(path, f"beyond the plan of {self.cache.num_shards} shards")
        for path in files:
            self.report.files += 1
            self._guarded(partial(self._count, path))

    def _count(self, path: str) -> None:
        try:
            self.report.bytes += (self.cache.path / path).stat().st_size
        except OSError as error:
            raise StorageError(f"{self.cache.path / path}: {error.strerror}") from None

    def _covered(self, signal: str, shards: set[int]) -> bool:
        """Whether every shard of the plan is committed."""
        missing = sorted(set(range(self.cache.num_shards)) - shards)
        if missing:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            self.report.faults.append(
                f"{self.cache.path}: {signal!r} is unfinished: {len(missing)} of "
                f"{self.cache.num_shards} shards are not committed ({shown}); run the same "
                "`kdcache dump` again to finish"
            )
        return not missing

    def _commit(self, signal: str, shard: int) -> CommitRecord | None:
        """The commit of a shard if it and its files are sound."""
        record: list[CommitRecord] = []
        if not self._guarded(lambda: record.append(self.cache.commit_record(signal, shard))):
            self.unread.add(f"{signal}/{shard:05d}.")
            return None
        sound = self._files([file for part in record[0].parts for file in part.files])
        return record[0] if sound else None

    def _samples(self, shards: set[int], advance: Callable[[], object]) -> None:
        manifest = self.cache.manifest
        corpus = CorpusDigest()
        digests = {
            name: StreamDigest(manifest.tokenizers[stream.tokenizer].digest)
            for name, stream in manifest.streams.items()
        }
        totals = dict.fromkeys(manifest.streams, 0)
        whole = self._covered(SAMPLES, shards)
        for shard in sorted(shards & set(range(self.cache.num_shards))):
            advance()
            record = self._commit(SAMPLES, shard)
            samples = self._open_samples(shard, record) if record else None
            if record is None or samples is None:
                whole = False
                continue
            corpus.update(samples.sample_id, samples.row)
            for name, column in samples.streams.items():
                ids, extras = join_ids(column.fields), extra_fields(column.fields)
                digests[name].update(column.lengths, ids, extras)
                totals[name] += _records(column)
        if whole:
            self._compare("corpus digest", corpus.hexdigest(), manifest.corpus.digest)
            for name, stream in manifest.streams.items():
                found = digests[name].hexdigest()
                self._compare(f"digest of stream {name!r}", found, stream.digest)
                self._compare(f"tokens of stream {name!r}", totals[name], stream.num_tokens)

    def _open_samples(self, shard: int, record: CommitRecord) -> SampleShard | None:
        """A samples shard whose structure holds."""
        opened: list[SampleShard] = []
        if not self._guarded(lambda: opened.append(self.cache.samples(shard))):
            return None
        samples, manifest = opened[0], self.cache.manifest
        vocab_sizes = {name: stream.vocab_size for name, stream in manifest.streams.items()}
        where = record.parts[0].files[0].path
        faults = sample_faults(samples, manifest.corpus, vocab_sizes)
        for fault in faults:
            self._fault(where, fault)
        if faults:
            return None
        self.lengths[shard] = {name: column.lengths for name, column in samples.streams.items()}
        entries = {STREAM_PREFIX + name: _records(c) for name, c in samples.streams.items()}
        tokens = sum(entries.values())
        self._compare(f"entries in the commit of samples shard {shard}", entries, record.entries)
        plan = manifest.shards[shard]
        self._compare(f"tokens of shard {shard}", tokens, plan.tokens)
        self._compare(f"tokens in the commit of samples shard {shard}", tokens, record.tokens)
        return samples

    def _compare(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            self.report.faults.append(f"{self.cache.path}: {what}: {found}, expected {expected}")

    def _signal(self, name: str, shards: set[int], advance: Callable[[], object]) -> None:
        self._covered(name, shards)
        signal = self.cache.signals[name]
        for shard in sorted(shards & set(range(self.cache.num_shards))):
            advance()
            record = self._commit(name, shard)
            if record is None or shard not in self.lengths:
                continue
            if isinstance(signal, HiddenRecord | AttentionRecord):
                self._guarded(partial(self._dense, signal, record))
            else:
                self._guarded(partial(self._ragged, signal, record))

    def _ragged(self, signal: SignalRecord, record: CommitRecord) -> None:
        """Structure of one shard of a signal in Arrow, against what it describes."""
        opened = self.cache.signal_shard(record.signal, record.shard)
        expected = label_counts(self.cache, signal, record.shard)
        lengths = self.lengths[record.shard][signal.stream]
        entries = dict.fromkeys(self.cache.signal_schema(record.signal).names, 0)
        for part, (start, stop, columns) in zip(record.parts, opened.parts, strict=True):
            mine = slice(start - record.start, stop - record.start)
            counts = None if expected is None else expected[mine]
            for fault in ragged_faults(signal, columns, counts, lengths[mine]):
                self._fault(part.files[0].path, fault)
            for column, ragged in columns.items():
                entries[column] += _records(ragged)
        self._counts(record, entries, entries[MAIN_COLUMN[signal.kind]])

    def _dense(self, signal: DenseRecord, record: CommitRecord) -> None:
        """Structure of one shard of a dense signal: its files, every chunk and value."""
        opened = self.cache.dense_shard(record.signal, record.shard)
        lengths = self.lengths[record.shard][signal.stream]
        for part in opened.parts:
            for path in unnamed_in(self.cache.path, part.folder, self.named):
                self._fault(path, "its commit does not name this file; remove it")
            mine = slice(part.start - record.start, part.stop - record.start)
            counts = np.diff(opened.offsets)[mine]
            for fault in dense_faults(signal, part, counts, lengths[mine]):
                self._fault(str(part.folder.relative_to(self.cache.path)), fault)
        rows = int(opened.offsets[-1])
        self._counts(record, {MAIN_COLUMN[signal.kind]: rows}, rows)

    def _counts(self, record: CommitRecord, entries: dict[str, int], tokens: int) -> None:
        """What a commit counts must be what its files hold."""
        where = f"the commit of {record.signal!r} shard {record.shard}"
        self._compare(f"entries in {where}", entries, record.entries)
        self._compare(f"tokens in {where}", tokens, record.tokens)


def _records(column: Ragged) -> int:
    return int(column.offsets[-1])
