"""Reading a cache: records at once, data files when they are first asked for.

# M samples, N positions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.dense import DenseShard, open_dense_part
from kdcache.formats.integrity import check_file, check_size
from kdcache.formats.listing import list_commits, list_signals, part_of, read_commit, read_signal
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    SAMPLES,
    CommitRecord,
    FileRecord,
    Manifest,
    PartRecord,
    StreamRecord,
    TokenizerRecord,
    read_record,
)
from kdcache.formats.ragged import offsets_of
from kdcache.formats.schema import ragged_columns, samples_schema, signal_schema, stream_extras
from kdcache.formats.shard import SampleShard, SignalShard, open_part, sample_shard
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.units import label_counts
from kdcache.formats.zarr_layout import METADATA_NAME


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading.

    Args:
        path: directory of the cache.

    Raises:
        FormatError: there is no finished cache, or a record is damaged.
    """
    return Cache(Path(path))


class Cache:
    """A cache that is read. Every file is checked once, before its first use.

    Attributes:
        path: directory of the cache.
        manifest: what kdcache.json says.
        signals: name to record of every signal.
    """

    def __init__(self, path: Path) -> None:
        """Read the records.

        Args:
            path: directory of the cache.

        Raises:
            FormatError: there is no finished cache, or a record is damaged.
        """
        self.path = path
        self.manifest = _read_manifest(path)
        self.signals = {name: _checked_signal(self, name) for name in list_signals(path)}
        for record in self.signals.values():
            _check_inputs(self, record)
        self._commits: dict[tuple[str, int], CommitRecord] = {}
        self._checked: set[str] = set()

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

    def committed(self, signal: str) -> set[int]:
        """Shards of a signal (or of "samples") whose commit stands now."""
        return list_commits(self.path).get(signal, set())

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
        if key not in self._commits:
            if not 0 <= shard < self.num_shards:
                raise FormatError(f"{self.path}: no shard {shard}; the cache has {self.num_shards}")
            record = read_commit(self.path, signal, shard)
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
            self._commits[key] = record
        return self._commits[key]

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
        record = self._checked_commit(name, shard)
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
        record = self._checked_commit(name, shard)
        counts = label_counts(self, signal, shard)
        assert counts is not None, "dense signals have a row for each thing described"
        offsets = offsets_of(counts)
        parts = []
        for part in record.parts:
            for file in part.files:
                self._check(file, bytes_too=file.path.endswith(METADATA_NAME))
            first, last = offsets[part.start - record.start], offsets[part.stop - record.start]
            folder = self.path / part_of(part.files[0].path)
            rows = int(last - first)
            parts.append(open_dense_part(folder, part.start, part.stop, signal, rows))
        return DenseShard(record.start, record.stop, offsets, parts)

    def _checked_commit(self, name: str, shard: int) -> CommitRecord:
        """The commit of a signal's shard, made from the inputs that stand, in the right files."""
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
                    f"{self.path / path}: a part of {name!r}, whose kind {signal.kind} is kept "
                    f"as {ending}"
                )
        return record

    def _open(self, part: PartRecord, schema: pa.Schema) -> pa.RecordBatch:
        checked = self._check(part.files[0])
        return open_part(self.path, part, schema, checked)

    def _check(self, file: FileRecord, bytes_too: bool = True) -> bool:
        """Compare a file with its record the first time; say whether that was done before."""
        if file.path in self._checked:
            return True
        check_file(self.path, file) if bytes_too else check_size(self.path, file)
        self._checked.add(file.path)
        return False

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
        for file in self.tokenizer(name).files:
            self._check(file)
        return self.path / "tokenizers" / name

    def tokens(self, name: str) -> list[str]:
        """Token string of every id of a tokenizer, from its tokens.json.

        Raises:
            FormatError: no such tokenizer, or the file is not what was committed.
        """
        path = f"tokenizers/{name}/tokens.json"
        if path not in {file.path for file in self.tokenizer(name).files}:
            raise FormatError(f"{self.path}: tokenizer {name!r} has no tokens.json")
        file = self.tokenizer_dir(name) / "tokens.json"
        try:
            tokens = json.loads(file.read_bytes().decode("utf-8"))
            json.dumps(tokens, ensure_ascii=False).encode("utf-8")  # a lone surrogate fails here
        except (ValueError, RecursionError):
            raise FormatError(f"{file}: not JSON in UTF-8") from None
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise FormatError(f"{file}: expected a list of strings")
        if len(tokens) != self.tokenizer(name).vocab_size:
            raise FormatError(
                f"{file}: {len(tokens)} tokens, expected {self.tokenizer(name).vocab_size}"
            )
        return tokens


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise FormatError(f"{path}: no such directory; a cache is one that `kdcache dump` made")
    try:
        return read_record(Manifest, path, MANIFEST_NAME)
    except FileNotFoundError:
        pass
    have = len(list_commits(path).get(SAMPLES, set()))
    if have:
        raise FormatError(
            f"{path}: dump is unfinished: {have} shards of 'samples' are committed and there is "
            f"no {MANIFEST_NAME}; run the same `kdcache dump` again to finish"
        )
    raise FormatError(f"{path}: not a cache: it has no {MANIFEST_NAME}")


def _checked_signal(cache: Cache, name: str) -> SignalRecord:
    """A signal's record whose streams are the manifest's."""
    record = read_signal(cache.path, name)
    sides: Mapping[str, tuple[str | None, str | None]] = {
        "stream": (record.stream, record.stream_digest),
        "source": (record.source, record.source_digest),
    }
    for role, (stream, digest) in sides.items():
        if stream is None:
            continue
        if stream not in cache.manifest.streams:
            raise FormatError(
                f"{cache.path}: signal {name!r}: its {role} {stream!r} is no stream of the cache; "
                f"it has {sorted(cache.manifest.streams)}"
            )
        found = cache.manifest.streams[stream].digest
        if found != digest:
            raise IntegrityError(
                f"{cache.path}: signal {name!r} was made for {role} {stream!r} of digest "
                f"{digest}, the cache has {found}: its labels belong to other tokens"
            )
    return record


def _check_inputs(cache: Cache, record: SignalRecord) -> None:
    """What a signal was made from must be there, of the right kind and over the same tokens."""
    for role, name, kind in (
        ("masks", record.masks, MasksRecord),
        ("hypotheses", record.hypotheses, BeamsRecord),
    ):
        if name is None:
            continue
        found = cache.signals.get(name)
        if not isinstance(found, kind) or found.stream != record.stream:
            what = f"of kind {found.kind} over stream {found.stream!r}" if found else "missing"
            raise FormatError(
                f"{cache.path}: signal {record.name!r} was made from the {role} {name!r} over "
                f"stream {record.stream!r}; that signal is {what}"
            )
