"""Stage two of a compilation: the signals of the output, part by part of every shard.

# R samples of a part
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.compile.compatible import PlannedSignal
from kdcache.compile.gathering import Gatherer
from kdcache.compile.planning import Plan
from kdcache.compile.source import Source
from kdcache.errors import RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.codec import Codec
from kdcache.formats.dense import SCALE, VALUES, dense_arrays
from kdcache.formats.manifest import CommitRecord, Manifest, PartRecord
from kdcache.formats.parts import part_row_bytes
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged, concat, offsets_of
from kdcache.formats.schema import ragged_batch, signal_schema
from kdcache.formats.signals import (
    AttentionRecord,
    HiddenRecord,
    LogitsRecord,
    SignalRecord,
)
from kdcache.formats.stores.claims import POLL_SECONDS
from kdcache.formats.units import MAIN_COLUMN, label_counts
from kdcache.formats.writer import CacheWriter

#: Most bytes of labels that are re-encoded at once, as they are before.
_BLOCK_BYTES = 64 << 20


def output_record(
    signal: PlannedSignal,
    manifest: Manifest,
    codec: Codec | None,
    rename: Mapping[str, str],
) -> SignalRecord:
    """The record of a signal in the output.

    Args:
        signal: what it is in the caches.
        manifest: of the output.
        codec: what it is re-encoded to; None: it stays as it is.
        rename: name of a signal to the one it has in the output.

    Raises:
        RecipeError: it cannot be re-encoded so.
    """
    record = signal.record
    if codec is not None:
        record = encoded_record(record, codec)
    tree = {key: getattr(record, key) for key in type(record).model_fields}
    tree["name"] = rename.get(record.name, record.name)
    if signal.chosen:
        tree |= {"hypotheses": None, "hypothesis": 0}
    for role in ("masks", "hypotheses"):
        tree[role] = rename.get(tree[role], tree[role])
    tree["stream_digest"] = manifest.streams[record.stream].digest
    if record.source is not None:
        tree["source_digest"] = manifest.streams[record.source].digest
    return type(record).model_validate(tree)


def encoded_record(record: SignalRecord, codec: Codec) -> LogitsRecord:
    """The record of a logits signal once it is re-encoded.

    Raises:
        RecipeError: it is of another kind, or that codec cannot be had from what is stored.
    """
    from kdcache.compile.reencode import reencoded_record

    if not isinstance(record, LogitsRecord):
        raise RecipeError(
            f"codec of {record.name!r}: it is of kind {record.kind}, only logits have codecs"
        )
    return reencoded_record(record, codec)


class SignalOutput:
    """Writes one signal of the output."""

    def __init__(
        self,
        writer: CacheWriter,
        sources: Sequence[Source],
        plan: Plan,
        signal: PlannedSignal,
        codec: Codec | None,
    ) -> None:
        """Name the signal.

        Args:
            writer: of the output, its manifest written.
            sources: the caches.
            plan: which samples, in which shards.
            signal: which signal.
            codec: what it is re-encoded to; None: it stays as it is.
        """
        self._writer, self._sources, self._plan, self._signal = writer, sources, plan, signal
        self._encoded = None if codec is None else encoded_record(signal.record, codec)

    def run(self, record: SignalRecord, cache: Cache, bar: tqdm[Any]) -> dict[str, int]:
        """Make every shard that is not committed, and commit it.

        Shards that another process has at work are waited for.

        Args:
            record: from `output_record`; it is written first.
            cache: the output, for reading.
            bar: advanced by the samples.

        Returns:
            shards_written and shards_skipped, those that stood already or that others wrote.

        Raises:
            IdentityError: another signal of this name was begun here.
            StorageError: the store refused.
        """
        writer = self._writer
        record = writer.write_signal(record)
        done = writer.committed(record.name)
        pending = [shard for shard in range(len(self._plan.shards)) if shard not in done]
        for shard in done & set(range(len(self._plan.shards))):
            self._advance(bar, shard)
        written = 0
        while pending:
            left = []
            for shard in pending:
                with writer.claimed(record.name, shard) as mine:
                    if not mine:
                        left.append(shard)
                    elif not writer.is_committed(record.name, shard):
                        self._write(record, cache, shard)
                        written += 1
                if mine:
                    self._advance(bar, shard)
            pending = left
            if pending:
                time.sleep(POLL_SECONDS)
        total = len(self._plan.shards)
        return {"shards_written": written, "shards_skipped": total - written}

    def _advance(self, bar: tqdm[Any], shard: int) -> None:
        start, stop = self._plan.shards[shard]
        bar.update(stop - start)

    def _write(self, record: SignalRecord, cache: Cache, shard: int) -> None:
        """Gather, write and commit one shard."""
        plan = self._plan
        start, stop = plan.shards[shard]
        chosen = None if plan.chosen is None else plan.chosen[start:stop]
        gatherer = Gatherer(self._sources, plan.where[:, start:stop], chosen)
        counts = label_counts(cache, record, shard)
        if counts is None:
            counts = gatherer.counts(self._signal.name, self._signal.carriers)
        parts: list[PartRecord] = []
        entries: dict[str, int] = {}
        for number, (a, b) in enumerate(plan_parts(counts, part_row_bytes(record))):
            place = record.name, shard, number, start + a, start + b
            some = gatherer.part(a, b)
            if isinstance(record, HiddenRecord | AttentionRecord):
                arrays = self._dense(record, some, counts[a:b])
                parts.append(
                    self._writer.write_dense_part(*place, arrays[VALUES], arrays.get(SCALE))
                )
                entries[VALUES] = entries.get(VALUES, 0) + len(arrays[VALUES])
                continue
            columns = self._columns(some, cache, shard, a, b)
            found = columns[MAIN_COLUMN[record.kind]].lengths
            assert np.array_equal(found, counts[a:b]), "labels are counted when they are opened"
            for name, column in columns.items():
                entries[name] = entries.get(name, 0) + int(column.offsets[-1])
            parts.append(
                self._writer.write_part(*place, ragged_batch(signal_schema(record), columns))
            )
        self._writer.commit(
            CommitRecord(
                signal=record.name,
                shard=shard,
                start=start,
                stop=stop,
                tokens=entries[MAIN_COLUMN[record.kind]],
                entries=entries,
                inputs={name: cache.commit_record(name, shard).digest for name in record.inputs},
                parts=parts,
            )
        )

    def _columns(
        self, gatherer: Gatherer, cache: Cache, shard: int, start: int, stop: int
    ) -> dict[str, Ragged]:
        """Columns of a part, gathered, and re-encoded where that is asked for."""
        signal, encoded = self._signal, self._encoded
        if encoded is None:
            return self._labels(gatherer)
        from kdcache.compile.reencode import reencode

        assert isinstance(signal.record, LogitsRecord)
        samples = cache.samples(shard)
        counts = gatherer.counts(signal.name, signal.carriers)
        blocks = plan_parts(counts, part_row_bytes(signal.record), _BLOCK_BYTES)
        pieces = []
        for a, b in blocks:
            here = slice(start + a, start + b)
            ids, rows = samples.sample_id[here], samples.row[here]
            labels = self._labels(gatherer.part(a, b))
            pieces.append(reencode(labels, signal.record, encoded, ids, rows))
        return {name: concat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _labels(self, gatherer: Gatherer) -> dict[str, Ragged]:
        """Columns of some samples as they are in the caches."""
        signal = self._signal
        if signal.chosen:
            assert isinstance(signal.record, LogitsRecord)
            return gatherer.chosen_labels(signal.record, signal.carriers)
        return gatherer.columns(signal.name, signal.carriers)

    def _dense(
        self, record: HiddenRecord | AttentionRecord, gatherer: Gatherer, counts: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Arrays of a part, as they are stored."""
        offsets = offsets_of(counts)
        arrays = {
            name: np.empty(shape, dtype=dtype)
            for name, (shape, dtype) in dense_arrays(record, int(offsets[-1])).items()
        }
        signal = self._signal
        gatherer.dense(signal.name, signal.carriers, offsets, arrays[VALUES], arrays.get(SCALE))
        return arrays


def summary_of(cache: Cache, name: str) -> dict[str, Any]:
    """kind, labels and bytes of a signal of the output."""
    commits = [cache.commit_record(name, shard) for shard in range(cache.num_shards)]
    return {
        "kind": cache.signal(name).kind,
        "labels": sum(commit.tokens for commit in commits),
        "bytes": sum(f.bytes for commit in commits for part in commit.parts for f in part.files),
    }
