"""Keyed hashes: published and golden vectors, permutations that permute."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.formats import keyed
from kdcache.formats.keyed import GOLDEN, mix64, permutation, position_hash, sample_keys, text_key


def mix64_by_hand(x: int) -> int:
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_mix64_is_the_finaliser_of_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as its reference implementation says.
    state = np.uint64(1234567) + np.uint64(GOLDEN) * np.arange(1, 6, dtype=np.uint64)
    assert mix64(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_mix64_wraps_as_64_bit_arithmetic_does(values: list[int]) -> None:
    mixed = mix64(np.array(values, dtype=np.uint64))
    assert mixed.tolist() == [mix64_by_hand(value) for value in values]


def test_text_key_tells_parts_apart() -> None:
    assert text_key("a", "bc") != text_key("ab", "c")
    assert text_key("a") != text_key("a", "")
    assert text_key(1, "draw") == text_key("1", "draw")
    assert text_key("shuffle", 7) == 2332406166949270450


def test_sample_keys_depend_on_everything_and_on_nothing_else() -> None:
    ids = np.arange(48, dtype=np.uint8).reshape(3, 16)
    rows = np.array([5, 6, 7])
    base = sample_keys(1, "draw", "logits", ids, rows)
    assert base.tolist() == [17999172544162840451, 2501787347037410164, 5691948572308807728]
    assert sample_keys(1, "draw", "logits", ids[1:2], rows[1:2])[0] == base[1]
    others = [
        sample_keys(2, "draw", "logits", ids, rows),
        sample_keys(1, "round", "logits", ids, rows),
        sample_keys(1, "draw", "other", ids, rows),
        sample_keys(1, "draw", "logits", ids[::-1], rows),
        sample_keys(1, "draw", "logits", ids, rows + 1),
        sample_keys(1, "draw", "logits", ids, rows, replica=1),
        sample_keys(1, "draw", "logits", ids, rows, hypothesis=1),
    ]
    assert all(len(np.intersect1d(base, other)) <= 1 for other in others)
    assert all(other[0] != base[0] for other in others)


def test_position_hash_matches_its_formula() -> None:
    keys = np.array([3, 2**64 - 1], dtype=np.uint64)
    hashes = position_hash(keys, np.array([0, 9]))
    mask = (1 << 64) - 1
    assert hashes.tolist() == [
        mix64_by_hand((3 + GOLDEN) & mask),
        mix64_by_hand((2**64 - 1 + GOLDEN * 10) & mask),
    ]


@given(st.integers(0, 700), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_permutes(n: int, key: int) -> None:
    assert sorted(permutation(n, key).tolist()) == list(range(n))


@pytest.mark.parametrize(
    ("n", "key", "expected"),
    [
        (1, 5, [0]),
        (10, 0, [7, 5, 1, 8, 6, 3, 4, 0, 9, 2]),
        (10, 1, [3, 9, 4, 0, 7, 8, 1, 2, 5, 6]),
        (17, 2**63, [9, 4, 8, 10, 2, 5, 3, 1, 0, 12, 11, 7, 16, 13, 15, 14, 6]),
    ],
    ids=["one", "ten", "ten, another key", "seventeen"],
)
@pytest.mark.usefixtures("copying")
def test_permutation_is_the_same_for_ever(n: int, key: int, expected: list[int]) -> None:
    assert permutation(n, key).tolist() == expected


@pytest.mark.parametrize("n", [0, 1, 2, 3, 255, 256, 257, 511, 512, 513, 1025, 4097, 70_000])
def test_compiled_permutations_are_those_of_numpy(
    compiled: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    for key in (0, 1, 2**63, 2**64 - 1, text_key("compiled", n)):
        found = []
        for library in (None, compiled):
            monkeypatch.setattr(keyed, "library", lambda library=library: library)
            found.append(permutation(n, key))
        np.testing.assert_array_equal(found[1], found[0])
        assert found[1].dtype == found[0].dtype


def test_permutation_spreads_evenly() -> None:
    places = np.stack([permutation(8, text_key("spread", key)) for key in range(1000)])
    counts = np.stack([np.bincount(places[:, i], minlength=8) for i in range(8)])
    chi2 = ((counts - 125) ** 2 / 125).sum()
    assert chi2 < 100  # 49 degrees of freedom: p < 1e-4 above 95
