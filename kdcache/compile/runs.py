"""Samples that lie next to one another are copied together.

What is compiled mostly keeps its order, so a part of the output is a few runs of samples. Copied
run by run it moves at the speed of memory; an index of every record would be several times as
large as the records are.

# R samples
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcache.formats.ragged import Ragged, gather, offsets_of

#: Samples of a run, on average, from which on runs are copied; single samples are gathered.
_LONG_RUN = 8


def gather_runs(sources: Sequence[Ragged], source: np.ndarray, rows: np.ndarray) -> Ragged:
    """The same as `ragged.gather`, faster where samples follow one another.

    Args:
        sources: columns with the same fields.
        source: [R] integer, which column each sample comes from.
        rows: [R] integer, its sample index within that column.

    Returns:
        The samples, offsets from 0; views of the column where they are one run of it.
    """
    first = run_starts(source, rows)
    if len(rows) < _LONG_RUN * len(first):
        return gather(sources, source, rows)
    ends = np.append(first[1:], len(rows))
    pieces = [
        _slice(sources[int(source[a])], int(rows[a]), int(rows[a]) + int(b - a))
        for a, b in zip(first, ends, strict=True)
    ]
    if len(pieces) == 1:
        return pieces[0]
    lengths = np.concatenate([piece.lengths for piece in pieces])
    fields = {
        name: np.concatenate([piece.fields[name] for piece in pieces]) for name in pieces[0].fields
    }
    return Ragged(offsets_of(lengths), fields)


def run_starts(source: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices at which a sample does not follow the one before it in its column."""
    follows = (source[1:] == source[:-1]) & (rows[1:] == rows[:-1] + 1)
    return np.concatenate([np.zeros(min(1, len(rows)), np.int64), np.flatnonzero(~follows) + 1])


def _slice(column: Ragged, start: int, stop: int) -> Ragged:
    """The samples [start, stop) of a column, its fields shared."""
    offsets = column.offsets[start : stop + 1].astype(np.int64)
    fields = {
        name: values[int(offsets[0]) : int(offsets[-1])] for name, values in column.fields.items()
    }
    return Ragged(offsets - offsets[0], fields)
