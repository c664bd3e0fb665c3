"""A part of a shard: batches as they come, put into the order of the samples."""

# F items, B rows of a batch

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.formats.ragged import Ragged, offsets_of, segment_indices

#: Most bytes reordered at a time, so that the index of a large part stays small.
REORDER_BYTES = 1 << 25


class PartBuilder:
    """Collects encoded batches of one part and puts them into sample order."""

    def __init__(self, sample: np.ndarray, num_samples: int) -> None:
        """Start an empty part.

        Args:
            sample: [F] int64 sample of the part that each item is of, ascending.
            num_samples: samples of the part; some may have no item.
        """
        self._first = np.searchsorted(sample, np.arange(num_samples + 1))  # item of each sample
        self._rows: list[np.ndarray] = []
        self._lengths: dict[str, list[np.ndarray]] = {}
        self._pieces: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(self, rows: np.ndarray, columns: Mapping[str, Ragged]) -> None:
        """Take in one batch.

        Args:
            rows: [B] items of the part, in the order of the batch.
            columns: what was said of them, B samples each.
        """
        self._rows.append(rows)
        for name, ragged in columns.items():
            self._lengths.setdefault(name, []).append(ragged.lengths)
            column = self._pieces.setdefault(name, {})
            for field, values in ragged.fields.items():
                column.setdefault(field, []).append(values)

    def finish(self) -> dict[str, Ragged]:
        """The columns of the part, samples in order. Empties the builder."""
        rows = np.concatenate(self._rows)
        place = np.empty(len(rows), dtype=np.int64)
        place[rows] = np.arange(len(rows))
        columns = {}
        for name in list(self._pieces):
            lengths = np.concatenate(self._lengths.pop(name))
            starts = offsets_of(lengths)[:-1]
            pieces = self._pieces.pop(name)
            fields = {
                field: _reorder(np.concatenate(pieces.pop(field)), starts[place], lengths[place])
                for field in list(pieces)
            }
            columns[name] = Ragged(offsets_of(lengths[place])[self._first], fields)
        return columns


def _reorder(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Segments of an array one after another, copied in slices of bounded size."""
    ends = np.cumsum(lengths)
    out = np.empty((int(lengths.sum()), *values.shape[1:]), dtype=values.dtype)
    most = max(1, REORDER_BYTES // max(1, values[:1].nbytes))
    begin = done = 0
    while begin < len(lengths):
        stop = int(np.searchsorted(ends, done + most, side="right"))
        stop = max(stop, begin + 1)
        index = segment_indices(starts[begin:stop], lengths[begin:stop])
        out[done : done + len(index)] = values[index]
        begin, done = stop, done + len(index)
    return out
