"""Ragged columns: one variable-length list of records per sample, as flat arrays.

# M samples (rows), N records in all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.formats.buffers import TABLES


def segment_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the records of many segments, one segment after another.

    Args:
        starts: [R] int64, first record of each segment.
        lengths: [R] int64, records in each segment.

    Returns:
        [sum(lengths)] int64: starts[0], starts[0]+1, ..., starts[1], ...
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """[M] lengths to [M + 1] int64 offsets that start at 0."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Ragged:
    """A list of records per sample, every field of the record one flat array.

    Attributes:
        offsets: [M + 1] integer, records of sample m are [offsets[m], offsets[m + 1]).
        fields: name to flat array; every array has offsets[-1] entries (or more).
    """

    offsets: np.ndarray
    fields: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[M] int64 records per sample."""
        return np.diff(self.offsets).astype(np.int64, copy=False)

    def part(self, start: int, stop: int) -> Ragged:
        """Samples [start, stop), sharing memory, offsets from 0."""
        offsets = self.offsets[start : stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        return Ragged(
            offsets - begin, {name: array[begin:end] for name, array in self.fields.items()}
        )

    def take(self, rows: np.ndarray) -> Ragged:
        """The given samples, in the given order, copied into fresh arrays.

        Args:
            rows: [R] integer sample indices into this column, repeats allowed.
        """
        return gather([self], np.zeros(len(rows), dtype=np.int64), rows)


def joined_lengths(columns: Sequence[Ragged]) -> np.ndarray:
    """[M] int64 records per sample of several columns, one after another."""
    lengths = TABLES.array((sum(map(len, columns)),), np.int64)
    start = 0
    for column in columns:
        stop = start + len(column)
        np.subtract(column.offsets[1:], column.offsets[:-1], out=lengths[start:stop])
        start = stop
    return lengths


def gather(sources: Sequence[Ragged], source: np.ndarray, rows: np.ndarray) -> Ragged:
    """Samples from several columns of one schema, in the given order.

    Args:
        sources: columns with the same fields.
        source: [R] integer, which column each sample comes from.
        rows: [R] integer, its sample index within that column.
    """
    lengths = np.zeros(len(rows), dtype=np.int64)
    starts = np.zeros(len(rows), dtype=np.int64)
    used = np.unique(source)
    for s in used:
        mine = source == s
        begin = sources[s].offsets[rows[mine]].astype(np.int64)
        starts[mine] = begin
        lengths[mine] = sources[s].offsets[rows[mine] + 1] - begin
    offsets = offsets_of(lengths)
    if len(used) == 1:
        index = segment_indices(starts, lengths)
        only = sources[int(used[0])]
        return Ragged(offsets, {name: array[index] for name, array in only.fields.items()})
    first = sources[0]
    out = {
        name: np.empty((int(offsets[-1]), *array.shape[1:]), dtype=array.dtype)
        for name, array in first.fields.items()
    }
    for s in used:
        mine = source == s
        to = segment_indices(offsets[:-1][mine], lengths[mine])
        index = segment_indices(starts[mine], lengths[mine])
        for name, array in sources[s].fields.items():
            out[name][to] = array[index]
    return Ragged(offsets, out)


def concat(parts: Sequence[Ragged]) -> Ragged:
    """Columns one after another."""
    if len(parts) == 1:
        return parts[0]
    offsets = offsets_of(np.concatenate([part.lengths for part in parts]))
    names = parts[0].fields
    fields = {
        name: np.concatenate(
            [part.fields[name][int(part.offsets[0]) : int(part.offsets[-1])] for part in parts]
        )
        for name in names
    }
    return Ragged(offsets, fields)
