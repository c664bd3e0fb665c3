"""Shard plans against a loop that anyone can read."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.formats.plan import ShardCutter, plan_parts, plan_shards


def plan_by_loop(counts: list[int], limit: int) -> list[tuple[int, int]]:
    shards, start, tokens = [], 0, 0
    for m, count in enumerate(counts):
        if m > start and tokens + count > limit:
            shards.append((start, m))
            start, tokens = m, 0
        tokens += count
    return [*shards, (start, len(counts))] if counts else []


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ([], 10, []),
        ([3, 3, 4, 1], 10, [(0, 3), (3, 4)]),
        ([11], 10, [(0, 1)]),
        ([11, 1, 12], 10, [(0, 1), (1, 2), (2, 3)]),
        ([5, 5, 5, 5], 10, [(0, 2), (2, 4)]),
    ],
    ids=["none", "full to the brim", "one too long", "long ones", "even"],
)
def test_plan_shards(counts: list[int], limit: int, expected: list[tuple[int, int]]) -> None:
    assert plan_shards(np.array(counts, dtype=np.int64), limit) == expected


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 50))
def test_plan_shards_equals_the_loop(counts: list[int], limit: int) -> None:
    assert plan_shards(np.array(counts, dtype=np.int64), limit) == plan_by_loop(counts, limit)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60),
    st.integers(1, 50),
    st.lists(st.integers(0, 60), max_size=6),
)
def test_cutter_does_not_see_batches(counts: list[int], limit: int, breaks: list[int]) -> None:
    cutter, cuts = ShardCutter(limit), []
    bounds = sorted({0, len(counts), *(b for b in breaks if b < len(counts))})
    for a, b in pairwise(bounds):
        cuts += [a + cut for cut in cutter.cut(np.array(counts[a:b], dtype=np.int64))]
    assert cuts == [start for start, _ in plan_by_loop(counts, limit)][1:]


def test_parts_hold_whole_samples_within_the_limit() -> None:
    lengths = np.array([10, 10, 10, 500, 10])
    parts = plan_parts(lengths, max_bytes_per_token=8, limit=200)
    assert parts == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert plan_parts(lengths, max_bytes_per_token=8) == [(0, 5)]
