"""Entries of soft labels: as many as are counted, their ids ascending, none in two columns.

Labels are most of a cache, so this is what `verify` does most of. It looks at some thousand
positions at a time, so that all that is made of them stays in the processor's cache, and it sorts
and searches nothing: a table of flags says which ids of one column might be in the other.

# M samples, N positions, E entries of a column
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import join_ids

#: Entries, of all columns, that are looked at together; whole samples, and at least one.
BLOCK_ENTRIES = 1 << 17

#: Flags of the table. With a block's entries in it a few in a hundred are set.
NUM_FLAGS = 1 << 20

#: What a position counts for beside an id, so that both together fall anywhere in the table.
_SPREAD = 0x9E3779B1


@dataclass(frozen=True)
class Entries:
    """One column of entries.

    Attributes:
        name: of the column.
        column: [M] ragged with `id` and `id_high`.
        counts: [N] entries of every position.
    """

    name: str
    column: Ragged
    counts: np.ndarray


@dataclass(frozen=True)
class _Block:
    """Entries of one column at some positions.

    Attributes:
        ids: [E] integer.
        spread: [E] int64 position, counted from 1 within the block, times `_SPREAD`.
        ends: [N + 1] int64: position n of the block has the entries [ends[n], ends[n + 1]).
        fall: an entry whose id does not exceed that before it at its position; None without.
    """

    ids: np.ndarray
    spread: np.ndarray
    ends: np.ndarray
    fall: int | None


def entry_faults(positions: np.ndarray, columns: Sequence[Entries]) -> list[str]:
    """Check one or two columns over the same positions.

    Args:
        positions: [M + 1]: sample m has the positions [positions[m], positions[m + 1]).
        columns: whose offsets fit their fields.
    """
    faults: dict[str, str] = {}
    table, shared = _Table(), False
    for first, last in _blocks([entries.column.offsets for entries in columns]):
        blocks = []
        for entries in columns:
            if entries.name in faults:
                continue
            block = _block(positions[first : last + 1], entries, first, last)
            if isinstance(block, str):
                faults[entries.name] = block
            elif block.fall is not None:
                at = int(positions[first]) + int(block.spread[block.fall]) // _SPREAD - 1
                line = f"{entries.name}: ids do not ascend at position {at} of the part"
                faults[entries.name] = line
            else:
                blocks.append(block)
        shared = shared or (len(blocks) == 2 and table.share(*blocks))
    if shared and not faults:
        return [f"{columns[1].name}: an id was kept exactly at the same position"]
    return [faults[entries.name] for entries in columns if entries.name in faults]


def first_fall(values: np.ndarray, ends: np.ndarray) -> int | None:
    """A value that does not exceed the one before it in its stretch; None where all ascend.

    Args:
        values: [E] integer.
        ends: [S + 1] int64: stretch s has the values [ends[s], ends[s + 1]).
    """
    starts = np.zeros(len(values) + 1, dtype=bool)
    starts[ends] = True
    falls = values[1:] <= values[:-1]
    falls &= ~starts[1:-1]
    return int(falls.argmax()) + 1 if falls.any() else None


def _blocks(offsets: Sequence[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Ranges of samples that have about `BLOCK_ENTRIES` together, and at least one sample."""
    if not offsets:
        return
    total = offsets[0].astype(np.int64)
    for more in offsets[1:]:
        total += more
    # Where there are no entries what is counted must still be looked at.
    marks = np.arange(0, max(1, int(total[-1])), BLOCK_ENTRIES)
    starts = np.unique(np.searchsorted(total, marks, side="right") - 1)
    starts[0] = 0
    stops = [*starts[1:].tolist(), len(total) - 1]
    yield from zip(starts.tolist(), stops, strict=True)


def _block(positions: np.ndarray, entries: Entries, first: int, last: int) -> _Block | str:
    """The entries of the samples [first, last) at `positions`; a fault where they do not add up."""
    offsets = entries.column.offsets[first : last + 1]
    begin, stop = int(offsets[0]), int(offsets[-1])
    counts = entries.counts[int(positions[0]) : int(positions[-1])]
    ends = offsets_of(counts)
    wrong = np.flatnonzero(ends[positions - positions[0]] != offsets - begin)
    if len(wrong):
        return sum_fault(entries.name, first + int(wrong[0]) - 1, f"num_{entries.name}")
    fields = {name: values[begin:stop] for name, values in entries.column.fields.items()}
    ids = join_ids(fields) if "id_high" in fields else fields["id"]
    # Every position leaves a step where its entries begin; one without leaves it to the next.
    steps = np.zeros(stop - begin + 1, dtype=np.int64)
    steps[ends[:-1]] = _SPREAD
    (empty,) = np.nonzero(counts == 0)
    if len(empty):
        np.add.at(steps, ends[empty], _SPREAD)
    steps = steps[:-1]
    falls = ids[1:] <= ids[:-1]
    falls &= steps[1:] == 0
    fall = int(falls.argmax()) + 1 if falls.any() else None
    return _Block(ids, np.cumsum(steps, out=steps), ends, fall)


def sum_fault(name: str, sample: int, field: str) -> str:
    """The line for a sample that has not as many records in a column as are counted.

    Args:
        name: of the column.
        sample: counted within the part.
        field: what holds the counts.
    """
    return f"{name}: entries of sample {sample} of the part do not add up to {field}"


class _Table:
    """Flags for pairs of position and id; many pairs share a flag."""

    def __init__(self) -> None:
        self._turns = np.zeros(NUM_FLAGS, dtype=np.uint8)  # which block set a flag last
        self._turn = 0

    def share(self, one: _Block, other: _Block) -> bool:
        """Whether any id is in both blocks at the same position."""
        if self._turn == np.iinfo(np.uint8).max:
            self._turns[:] = 0
            self._turn = 0
        self._turn += 1
        self._turns[self._flags(one)] = self._turn
        # All flags are in the table, and without a check it takes two thirds of the time.
        turns = self._turns.take(self._flags(other), mode="wrap")
        (maybe,) = np.nonzero(turns == self._turn)
        if not len(maybe):
            return False
        position = other.spread[maybe] // _SPREAD - 1
        counts = one.ends[position + 1] - one.ends[position]
        theirs = segment_indices(one.ends[position], counts)
        return bool(np.any(one.ids[theirs] == np.repeat(other.ids[maybe], counts)))

    @staticmethod
    def _flags(block: _Block) -> np.ndarray:
        """[E] flag of every entry."""
        flags: np.ndarray = block.spread + block.ids
        flags &= NUM_FLAGS - 1
        return flags
