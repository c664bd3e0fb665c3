"""Ids of soft labels against plain Python, in blocks of every size."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.formats.checks import structure_entries
from kdcache.formats.checks.structure_entries import Entries, entry_faults, first_fall
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import split_ids

Lists = list[list[int]]


def entries(name: str, lists: Lists, vocab_size: int, positions: np.ndarray) -> Entries:
    ids = np.array([i for one in lists for i in one], dtype=np.int64)
    counts = np.array([len(one) for one in lists], dtype=np.uint8)
    column = Ragged(offsets_of(counts)[positions], split_ids(ids, vocab_size))
    return Entries(name, column, counts)


def one_each(lists: Lists) -> np.ndarray:
    """Offsets of samples of one position each."""
    return np.arange(len(lists) + 1)


def first_that_does_not_ascend(lists: Lists) -> int | None:
    return next((n for n, ids in enumerate(lists) if ids != sorted(set(ids))), None)


def expected(exact: Lists, drawn: Lists) -> list[str]:
    faults = []
    for name, lists in (("exact", exact), ("drawn", drawn)):
        at = first_that_does_not_ascend(lists)
        if at is not None:
            faults.append(f"{name}: ids do not ascend at position {at} of the part")
    if not faults and any(set(a) & set(b) for a, b in zip(exact, drawn, strict=True)):
        faults.append("drawn: an id was kept exactly at the same position")
    return faults


@st.composite
def columns(draw: st.DrawFn, ascending: bool) -> tuple[int, Lists, Lists, np.ndarray]:
    vocab_size = draw(st.sampled_from([4, 300, 70_000]))
    some = st.lists(st.integers(0, vocab_size - 1), max_size=5)
    if ascending:
        some = some.map(lambda ids: sorted(set(ids)))
    positions = draw(st.lists(st.tuples(some, some), max_size=12))
    bounds = draw(st.lists(st.integers(0, len(positions)), max_size=4))  # samples, some empty
    offsets = np.array([0, *sorted(bounds), len(positions)])
    return vocab_size, [a for a, _ in positions], [b for _, b in positions], offsets


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
@pytest.mark.parametrize("ascending", [True, False])
@given(data=st.data())
def test_faults_are_those_of_plain_python(block: int, ascending: bool, data: st.DataObject) -> None:
    vocab_size, exact, drawn, at = data.draw(columns(ascending))
    before = structure_entries.BLOCK_ENTRIES, structure_entries.NUM_FLAGS
    structure_entries.BLOCK_ENTRIES, structure_entries.NUM_FLAGS = block, 16
    try:
        pair = [entries("exact", exact, vocab_size, at), entries("drawn", drawn, vocab_size, at)]
        found = entry_faults(at, pair)
        alone = [entry_faults(at, [column]) for column in pair]
    finally:
        structure_entries.BLOCK_ENTRIES, structure_entries.NUM_FLAGS = before
    wanted = expected(exact, drawn)
    assert sorted(found) == sorted(wanted)
    assert alone == [
        [line for line in wanted if line.startswith(name) and "ascend" in line]
        for name in ("exact", "drawn")
    ]


def random_lists(draw: np.random.Generator, num: int, vocab_size: int) -> tuple[Lists, Lists]:
    """Ascending ids of two columns, without one in both."""
    exact, drawn = [], []
    for _ in range(num):
        ids = np.sort(draw.choice(vocab_size, int(draw.integers(0, 12)), replace=False))
        mine = draw.random(len(ids)) < 0.4
        exact.append(ids[mine].tolist())
        drawn.append(ids[~mine].tolist())
    return exact, drawn


@pytest.mark.parametrize("vocab_size", [40, 8000, 152_000])
def test_many_positions_share_flags_without_a_false_alarm(
    vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure_entries, "BLOCK_ENTRIES", 60)  # more blocks than a turn counts
    monkeypatch.setattr(structure_entries, "NUM_FLAGS", 1 << 9)
    draw = np.random.default_rng(0)
    exact, drawn = random_lists(draw, 4_000, vocab_size)
    at = one_each(exact)
    lines = "drawn: an id was kept exactly at the same position"

    def found() -> list[str]:
        columns = (("exact", exact), ("drawn", drawn))
        return entry_faults(at, [entries(name, ids, vocab_size, at) for name, ids in columns])

    assert found() == []
    # One id more, anywhere, that is in both.
    filled = [n for n in range(len(exact)) if exact[n]]
    for n in [filled[0], filled[-1], *draw.choice(filled, 8).tolist()]:
        own = drawn[n]
        drawn[n] = sorted({*own, exact[n][0]})
        assert found() == [lines]
        drawn[n] = own


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_counts_that_do_not_add_up_are_found(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure_entries, "BLOCK_ENTRIES", block)
    exact, drawn = random_lists(np.random.default_rng(1), 40, 50)
    at = np.array([0, 3, 3, 10, 25, 40])
    good = [entries("exact", exact, 50, at), entries("drawn", drawn, 50, at)]
    assert entry_faults(at, good) == []
    for position in range(40):
        counts = good[1].counts.copy()
        counts[position] += 1
        sample = int(np.searchsorted(at, position, side="right")) - 1
        line = f"drawn: entries of sample {sample} of the part do not add up to num_drawn"
        assert entry_faults(at, [good[0], Entries("drawn", good[1].column, counts)]) == [line]
    # Counted entries of a column that has none at all.
    empty = entries("drawn", [[] for _ in drawn], 50, at)
    assert entry_faults(at, [Entries("drawn", empty.column, good[1].counts)]) == [
        "drawn: entries of sample 0 of the part do not add up to num_drawn"
    ]


def test_no_entries_have_no_fault() -> None:
    nothing: Lists = [[], [], []]
    at = one_each(nothing)
    assert entry_faults(at, [entries("e", nothing, 9, at), entries("d", nothing, 9, at)]) == []
    assert entry_faults(one_each([]), [entries("exact", [], 9, one_each([]))]) == []
    assert entry_faults(at, []) == []


@given(st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=8))
def test_the_first_fall_is_found(lists: Lists) -> None:
    flat = np.array([v for one in lists for v in one], dtype=np.uint16)
    found = first_fall(flat, offsets_of(np.array([len(one) for one in lists], dtype=np.int64)))
    places = [(n, k) for n, one in enumerate(lists) for k in range(len(one))]
    falls = [i for i, (n, k) in enumerate(places) if k and lists[n][k] <= lists[n][k - 1]]
    assert found == (falls[0] if falls else None)


def test_lines_name_the_position() -> None:
    lists = [[1], [], [3, 2], [4, 4]]
    at = one_each(lists)
    (line,) = entry_faults(at, [entries("exact", lists, 9, at)])
    assert re.fullmatch("exact: ids do not ascend at position 2 of the part", line)
