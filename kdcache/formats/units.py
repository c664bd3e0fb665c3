"""What a signal describes, one by one: how many records each sample must have, by kind.

`MAIN_COLUMN` names the column whose records are counted; `CommitRecord.tokens` is their number in
the shard, and `CommitRecord.entries` has it too (for Zarr under `values`: the rows).

# M samples of a shard
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kdcache.errors import FormatError
from kdcache.formats.ragged import Ragged, concat, joined_lengths
from kdcache.formats.shard import SampleShard, SignalShard
from kdcache.formats.signals import (
    AttentionRecord,
    ClassesRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)


class Described(Protocol):
    """What must be known of a cache: `cache.Cache`, or shards that are in memory."""

    path: str

    def signal(self, name: str) -> SignalRecord:
        """The record of a signal."""

    def samples(self, shard: int) -> SampleShard:
        """The samples of one shard."""

    def signal_shard(self, name: str, shard: int) -> SignalShard:
        """One signal of one shard."""


#: Kind to the column that has one record for each thing described.
MAIN_COLUMN = {
    "logits": "tokens",
    "hidden": "values",
    "attention": "values",
    "beams": "tokens",
    "classes": "scores",
    "masks": "replicas",
}


def label_counts(cache: Described, record: SignalRecord, shard: int) -> np.ndarray | None:
    """Records of the main column that each sample of a shard must have.

    Args:
        cache: the cache.
        record: of the signal.
        shard: shard number.

    Returns:
        [M] int64; None where the signal alone says how many (beams).

    Raises:
        FormatError: samples, or a signal that this one was made from, are damaged or missing.
    """
    samples = cache.samples(shard)
    if isinstance(record, LogitsRecord):
        return _label_positions(cache, record, samples, shard)
    lengths = samples.streams[record.stream].lengths
    if isinstance(record, HiddenRecord):
        rows = lengths if record.pool == "none" else np.ones_like(lengths)
        return rows * num_replicas(cache, record)
    if isinstance(record, AttentionRecord):
        return lengths * lengths
    if isinstance(record, ClassesRecord):
        mine = _of_task(cache, record, samples).astype(np.int64)
        return mine * len(record.labels) * num_replicas(cache, record)
    if isinstance(record, MasksRecord):
        return np.full(len(lengths), record.replicas, dtype=np.int64)
    return None


def num_replicas(cache: Described, record: SignalRecord) -> int:
    """Replicas of every sample: those of the masks signal that it is or was made from, else 1.

    Raises:
        FormatError: that signal is missing or of another kind.
    """
    if isinstance(record, MasksRecord):
        return record.replicas
    if record.masks is None:
        return 1
    masks = cache.signal(record.masks)
    if not isinstance(masks, MasksRecord):
        raise FormatError(
            f"{cache.path}: signal {record.name!r} names {masks.name!r} of kind {masks.kind} as "
            "its masks"
        )
    return masks.replicas


def _label_positions(
    cache: Described, record: LogitsRecord, samples: SampleShard, shard: int
) -> np.ndarray:
    """[M] labels of each sample."""
    stream = samples.streams[record.stream]
    if record.masks is not None:
        return input_column(cache, record.masks, shard, "masked").lengths
    if record.hypotheses is not None:
        return _hypothesis_lengths(cache, record, record.hypotheses, shard)
    if record.at == "targets":
        return stream.lengths
    return predicted_lengths([stream])


def predicted_lengths(stream: Sequence[Ragged]) -> np.ndarray:
    """[M] int64 tokens of each sample that a causal model predicts.

    A token is predicted from those before it, so the first is not; of a chat those with a loss are.

    Args:
        stream: of several files, with its `loss`, if it has one.
    """
    if any("loss" in part.fields for part in stream):
        return np.concatenate([_labelled_lengths(part) for part in stream])
    lengths = joined_lengths(stream)
    lengths -= 1
    return np.maximum(lengths, 0, out=lengths)


def _labelled_lengths(stream: Ragged) -> np.ndarray:
    """[M] int64 tokens of each sample that have a loss, the first of a sample left out."""
    labelled = stream.fields["loss"].astype(np.int64)
    filled = stream.lengths > 0
    labelled[stream.offsets[:-1][filled]] = 0
    return sums_between(labelled, stream.offsets)


def _hypothesis_lengths(
    cache: Described, record: LogitsRecord, beams: str, shard: int
) -> np.ndarray:
    """[M] tokens of the chosen hypothesis of each sample, or of all; 0 where it has none."""
    if record.hypothesis == "all":
        return input_column(cache, beams, shard, "tokens").lengths
    return hypothesis_lengths(input_column(cache, beams, shard, "hypotheses"), record.hypothesis)


def hypothesis_lengths(hypotheses: Ragged, number: int) -> np.ndarray:
    """[M] int64 tokens of one hypothesis of each sample; 0 where there are not so many.

    Args:
        hypotheses: that column of a beams signal.
        number: which, 0 the best.
    """
    has = hypotheses.lengths > number
    chosen = hypotheses.offsets[:-1][has] + number
    counts = np.zeros(len(hypotheses), dtype=np.int64)
    counts[has] = hypotheses.fields["num_tokens"][chosen]
    return counts


def input_column(cache: Described, signal: str, shard: int, column: str) -> Ragged:
    """One column of a whole shard of a signal.

    Args:
        cache: the cache.
        signal: its name.
        shard: shard number.
        column: its name.

    Raises:
        FormatError: the signal is damaged or missing.
    """
    return concat([columns[column] for _, _, columns in cache.signal_shard(signal, shard).parts])


def _of_task(cache: Described, record: ClassesRecord, samples: SampleShard) -> np.ndarray:
    """[M] bool, whether each sample is of the task that the signal labels."""
    if record.task is None:
        return np.ones(len(samples.row), dtype=bool)
    tasks = samples.tasks()
    if tasks is None:
        raise FormatError(
            f"{cache.path}: signal {record.name!r} labels the task {record.task!r}, the samples "
            "of the cache have no tasks"
        )
    mine: np.ndarray = tasks.to_numpy(zero_copy_only=False) == record.task
    return mine


def sums_between(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of stretches.

    Args:
        values: [N] int64.
        offsets: [M + 1] integer, ascending, where the stretches begin and the last one ends.

    Returns:
        [M] int64.
    """
    ends = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=ends[1:])
    return ends[offsets[1:]] - ends[offsets[:-1]]
