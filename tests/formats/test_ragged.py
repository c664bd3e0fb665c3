"""Ragged columns against plain Python lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.formats.ragged import Ragged, concat, gather, offsets_of, segment_indices

SENTENCES = st.lists(st.lists(st.integers(0, 255), max_size=5), max_size=8)


def column(sentences: list[list[int]]) -> Ragged:
    flat = np.array([v for s in sentences for v in s], dtype=np.uint8)
    offsets = offsets_of(np.array([len(s) for s in sentences], dtype=np.int64))
    return Ragged(offsets, {"id": flat, "twice": flat.astype(np.int32) * 2})


def lists(ragged: Ragged, field: str = "id") -> list[list[int]]:
    values = ragged.fields[field].tolist()
    bounds = ragged.offsets.tolist()
    return [values[bounds[m] : bounds[m + 1]] for m in range(len(ragged))]


@pytest.mark.parametrize(
    ("starts", "lengths", "expected"),
    [
        ([], [], []),
        ([3], [0], []),
        ([3, 0], [2, 3], [3, 4, 0, 1, 2]),
        ([5, 5, 1], [1, 0, 2], [5, 1, 2]),
    ],
    ids=["none", "empty segment", "two", "an empty one between"],
)
def test_segment_indices(starts: list[int], lengths: list[int], expected: list[int]) -> None:
    found = segment_indices(np.array(starts, np.int64), np.array(lengths, np.int64))
    assert found.tolist() == expected


@given(SENTENCES, st.data())
def test_take_is_indexing(sentences: list[list[int]], data: st.DataObject) -> None:
    last = len(sentences) - 1
    rows = data.draw(st.lists(st.integers(0, last), max_size=10)) if sentences else []
    taken = column(sentences).take(np.array(rows, dtype=np.int64))
    assert lists(taken) == [sentences[r] for r in rows]
    assert lists(taken, "twice") == [[2 * v for v in sentences[r]] for r in rows]


@given(st.lists(SENTENCES.filter(len), min_size=1, max_size=4), st.data())
def test_gather_is_indexing_two_levels(parts: list[list[list[int]]], data: st.DataObject) -> None:
    places = [(s, r) for s, part in enumerate(parts) for r in range(len(part))]
    picked = data.draw(st.lists(st.sampled_from(places), max_size=12))
    source = np.array([s for s, _ in picked], dtype=np.int64)
    rows = np.array([r for _, r in picked], dtype=np.int64)
    found = gather([column(part) for part in parts], source, rows)
    assert lists(found) == [parts[s][r] for s, r in picked]
    assert found.fields["twice"].dtype == np.int32


@given(st.lists(SENTENCES, min_size=1, max_size=4))
def test_concat_is_concatenation(parts: list[list[list[int]]]) -> None:
    assert lists(concat([column(part) for part in parts])) == [s for part in parts for s in part]


def test_concat_and_take_respect_offsets_that_start_late() -> None:
    whole = column([[1], [2, 3], [4]])
    late = Ragged(whole.offsets[1:], whole.fields)
    assert lists(concat([late, column([[9]])])) == [[2, 3], [4], [9]]
    assert lists(late.take(np.array([1, 0]))) == [[4], [2, 3]]
    assert late.lengths.tolist() == [2, 1]
