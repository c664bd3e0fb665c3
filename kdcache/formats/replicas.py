"""Replicas: columns of several maskings of a sample, cut so that each is a row of its own.

# M samples of a part, R replicas
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.errors import IntegrityError
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.signals import ClassesRecord, LogitsRecord, MasksRecord, SignalRecord
from kdcache.formats.units import Described, input_column, sums_between


def replica_counts(cache: Described, record: SignalRecord, shard: int, replicas: int) -> np.ndarray:
    """What every masking of every sample of a shard has: masked tokens, or scores.

    Args:
        cache: the cache.
        record: of a signal in Arrow that is a masks signal or was made from one.
        shard: shard number.
        replicas: R of it.

    Returns:
        [M, R] int64.

    Raises:
        FormatError: the signal or its masks are damaged or missing.
    """
    if isinstance(record, ClassesRecord):
        lengths = input_column(cache, record.name, shard, "scores").lengths
        return np.repeat(lengths // replicas, replicas).reshape(-1, replicas)
    column = input_column(cache, record.masks or record.name, shard, "replicas")
    begin, end = int(column.offsets[0]), int(column.offsets[-1])
    return column.fields["num_masked"][begin:end].astype(np.int64).reshape(-1, replicas)


def by_replica(
    record: SignalRecord, columns: Mapping[str, Ragged], counts: np.ndarray
) -> dict[str, Ragged]:
    """The columns of a part with a row for every masking, a sample's one after another.

    Args:
        record: of the signal.
        columns: its [M] columns.
        counts: [M, R] int64, see `replica_counts`.

    Returns:
        [M * R] columns that share the memory of those.

    Raises:
        IntegrityError: the counts are not those of the columns.
    """
    replicas, counts = counts.shape[1], counts.reshape(-1)

    def cut(name: str, lengths: np.ndarray) -> Ragged:
        return _cut(name, columns[name], lengths, replicas)

    if isinstance(record, MasksRecord):
        return {"replicas": cut("replicas", np.ones_like(counts)), "masked": cut("masked", counts)}
    if isinstance(record, ClassesRecord):
        return {"scores": cut("scores", counts)}
    assert isinstance(record, LogitsRecord), record.kind  # others have no replicas in Arrow
    tokens = cut("tokens", counts)
    others = [name for name in columns if name != "tokens"]
    return {"tokens": tokens} | {n: cut(n, _entries(record, tokens, n)) for n in others}


def _entries(record: LogitsRecord, tokens: Ragged, name: str) -> np.ndarray:
    """[M * R] int64 entries of every masking in a column."""
    if record.codec.name == "full":
        return tokens.lengths * record.vocab_size
    return sums_between(tokens.fields[f"num_{name}"].astype(np.int64), tokens.offsets)


def _cut(name: str, column: Ragged, lengths: np.ndarray, replicas: int) -> Ragged:
    """A column with a row for each of some lengths, `replicas` for every row that it has."""
    offsets = int(column.offsets[0]) + offsets_of(lengths)
    wrong = np.flatnonzero(offsets[::replicas] != column.offsets)
    if len(wrong):
        sample = max(int(wrong[0]) - 1, 0)
        raise IntegrityError(
            f"column {name!r}: the replicas of sample {sample} of a part have another number of "
            "records together than the sample; run `kdcache verify`"
        )
    return Ragged(offsets.astype(column.offsets.dtype), column.fields)
