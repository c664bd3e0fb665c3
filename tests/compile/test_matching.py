"""Matching samples of several caches, and keyed choices, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.compile.matching import (
    ABSENT,
    below,
    choice_hashes,
    first_source,
    match,
    occurrences,
    smallest,
    stack,
)

# Ids of few kinds, so that duplicates abound; some begin, some end with zeros.
IDS = [bytes([n] * 8 + [0] * 8) for n in range(3)] + [bytes([0] * 15 + [n]) for n in range(3)]
caches = st.lists(st.lists(st.sampled_from(IDS), min_size=1, max_size=8), min_size=1, max_size=4)


def packed(ids: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)


@given(caches)
def test_samples_are_matched_by_id_and_duplicate(ids):
    expected: dict[tuple[bytes, int], list[int]] = {}
    for s, cache in enumerate(ids):
        for m, one in enumerate(cache):
            key = one, cache[:m].count(one)
            expected.setdefault(key, [ABSENT] * len(ids))[s] = m
    duplicates = [occurrences(packed(cache)) for cache in ids]
    for cache, found in zip(ids, duplicates, strict=True):
        assert found.tolist() == [cache[:m].count(one) for m, one in enumerate(cache)]
    where = match([packed(cache) for cache in ids], duplicates)
    assert where.T.tolist() == list(expected.values())


def test_stacked_samples_stay_apart():
    assert stack([2, 1]).tolist() == [[0, 1, ABSENT], [ABSENT, ABSENT, 0]]


@pytest.mark.parametrize(
    ("among", "expected"),
    [(None, [0, 1, ABSENT, 0]), ([1], [ABSENT, 1, ABSENT, 1]), ([], [ABSENT] * 4)],
)
def test_the_first_cache_that_has_a_sample_gives_it(among, expected):
    where = np.array([[0, ABSENT, ABSENT, 3], [ABSENT, 5, ABSENT, 0]])
    assert first_source(where, among).tolist() == expected


def hashes(seed: int = 0, purpose: str = "subset", copy: int = 0, num: int = 4000) -> np.ndarray:
    ids = np.random.default_rng(5).integers(0, 256, (num, 16)).astype(np.uint8)
    return choice_hashes(ids, np.zeros(num, dtype=np.int64), seed, purpose, copy)


def test_choices_are_nested_and_about_as_large_as_asked():
    some, more = below(hashes(), 0.1), below(hashes(), 0.3)
    assert not (some & ~more).any()
    assert abs(some.sum() - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9)
    assert abs(more.sum() - 1200) < 4 * np.sqrt(4000 * 0.3 * 0.7)
    assert below(hashes(), 1).all()
    few, fewer = smallest(hashes(), 70), smallest(hashes(), 69)
    assert (few.sum(), fewer.sum()) == (70, 69)
    assert not (fewer & ~few).any()
    assert hashes()[few].max() < hashes()[~few].min()
    assert smallest(hashes(), 5000).all()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"purpose": "mix 0"}, {"copy": 1}], ids=["seed", "purpose", "copy"]
)
def test_other_choices_are_independent(other):
    both = below(hashes(), 0.3) & below(hashes(**other), 0.3)
    assert abs(both.sum() - 360) < 4 * np.sqrt(4000 * 0.09 * 0.91)


def test_duplicates_are_chosen_apart():
    ids = np.zeros((4000, 16), dtype=np.uint8)
    found = choice_hashes(ids, np.arange(4000), 0, "subset")
    assert len(np.unique(found)) == 4000
    # Whatever stands around it, a sample's hash is its own.
    assert choice_hashes(ids[:1], np.array([17]), 0, "subset")[0] == found[17]
