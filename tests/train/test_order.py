"""The order of training: golden vectors, coverage, budgets, keys and resumption."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import IdentityError, TrainingError
from kdcache.formats import keyed
from kdcache.train.batches import order
from kdcache.train.batches.order import (
    ORDER_VERSION,
    OrderState,
    batching_digest,
    epoch_windows,
    micro_batches,
    plan_digest,
    window_batches,
)

SHARDS = [(0, 5), (5, 9), (9, 14), (14, 20), (20, 22)]
PLAN = plan_digest("00112233445566778899aabbccddeeff", SHARDS)
SRC = np.array([3, 9, 2, 7, 5, 4, 8, 1, 6, 3])
TGT = np.array([4, 8, 2, 6, 5, 3, 9, 1, 7, 30])


def test_digests_are_golden():
    assert PLAN == "cb287cb686a22659"
    assert batching_digest(PLAN, ["aa", "bb"], 4096, 4) == "cca0df4c2db18222"
    assert plan_digest("00112233445566778899aabbccddeeff", SHARDS[:-1]) != PLAN


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (1, 0, [[3, 2], [0, 1], [4]]),
        (1, 1, [[1, 3], [4, 0], [2]]),
        (2, 0, [[0, 2], [1, 3], [4]]),
    ],
)
def test_windows_are_golden(seed, epoch, expected):
    assert epoch_windows(PLAN, len(SHARDS), 2, seed, epoch) == expected


@pytest.mark.parametrize(
    ("seed", "epoch", "window", "expected"),
    [
        (1, 0, 0, [[8, 3], [2, 7], [4, 0, 5], [6, 1], [9]]),
        (1, 0, 1, [[2, 7], [9], [8, 3], [4, 0, 5], [6, 1]]),
        (1, 1, 0, [[2, 7], [6, 1], [8, 3], [9], [4, 0, 5]]),
        (2, 0, 0, [[2, 7], [4, 0, 5], [9], [6, 1], [8, 3]]),
    ],
)
def test_batches_are_golden(copying, seed, epoch, window, expected):
    batches = window_batches(PLAN, seed, epoch, window, [SRC, TGT], 18)
    assert [batch.tolist() for batch in batches] == expected


@pytest.mark.parametrize("longest", [1, 7, 60, 5000])
def test_compiled_batches_are_those_of_numpy(compiled, monkeypatch, longest):
    draw = np.random.default_rng(longest)
    for number in range(60):
        size = int(draw.integers(1, 3000))
        # A long sample here and there is a batch, and sometimes a pool, of its own.
        most = np.where(draw.random(size) < 0.02, 20 * longest, longest)
        lengths = [draw.integers(0, most + 1) for _ in range(int(draw.integers(1, 4)))]
        args = (PLAN, number, 0, 0, lengths, int(draw.integers(1, 40 * longest)))
        found = []
        for library in (None, compiled):
            for module in (keyed, order):
                monkeypatch.setattr(module, "library", lambda library=library: library)
            found.append([batch.tolist() for batch in window_batches(*args)])
        assert found[0] == found[1]


def test_lengths_that_are_too_many_to_count_are_sorted_otherwise(copying, monkeypatch):
    expected = [batch.tolist() for batch in window_batches(PLAN, 1, 0, 0, [SRC, TGT], 18)]
    monkeypatch.setattr(order, "_LONGEST_COUNTED", 29)
    assert [batch.tolist() for batch in window_batches(PLAN, 1, 0, 0, [SRC, TGT], 18)] == expected


@pytest.mark.usefixtures("copying")
def test_no_sample_no_batch():
    assert window_batches(PLAN, 1, 0, 0, [np.zeros(0, dtype=np.int64)], 18) == []


lengths = st.lists(st.integers(0, 60), min_size=1, max_size=300)


@given(lengths, st.integers(1, 200), st.integers(0, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_every_sample_once_and_within_the_budget(tgt, batch_tokens, seed, data):
    src = data.draw(st.lists(st.integers(0, 60), min_size=len(tgt), max_size=len(tgt)))
    src, tgt = np.array(src), np.array(tgt)
    batches = window_batches(PLAN, seed, 0, 0, [src, tgt], batch_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(tgt)))
    for batch in batches:
        assert len(batch) > 0
        longest = max(1, src[batch].max(), tgt[batch].max())
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens


def test_little_is_padded():
    rng = np.random.default_rng(0)
    tgt = np.clip(rng.lognormal(2.3, 0.45, 20_000), 2, 200).astype(int)
    src = np.clip(tgt * rng.normal(1.05, 0.18, len(tgt)), 2, 250).astype(int)
    batches = window_batches(PLAN, 1, 0, 0, [src, tgt], 1024)
    assert sum(len(b) * tgt[b].max() for b in batches) < 1.15 * tgt.sum()
    assert sum(len(b) * src[b].max() for b in batches) < 1.2 * src.sum()
    # Similar lengths stand together in a batch, but batches do not come by length.
    means = np.array([tgt[b].mean() for b in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_no_two_epochs_seeds_or_windows_alias():
    size = np.ones(200, dtype=np.int64)
    seen = set()
    for seed in range(5):
        for epoch in range(5):
            for window in range(3):
                batches = window_batches(PLAN, seed, epoch, window, [size, size], 50)
                seen.add(tuple(np.concatenate(batches).tolist()))
    assert len(seen) == 75


def test_every_shard_once_per_epoch():
    for window_shards in (1, 2, 3, 7):
        windows = epoch_windows(PLAN, len(SHARDS), window_shards, 1, 0)
        assert sorted(shard for window in windows for shard in window) == list(range(len(SHARDS)))
        assert max(map(len, windows)) <= window_shards


@pytest.mark.parametrize("accumulate", [1, 2, 3, 100])
def test_micro_batches_are_slices_of_the_same_batch(accumulate):
    for batch in window_batches(PLAN, 1, 0, 0, [SRC, TGT], 30):
        parts = micro_batches(batch, accumulate)
        assert np.concatenate(parts).tolist() == batch.tolist()
        assert len(parts) == min(accumulate, len(batch))


def test_state_is_small_and_round_trips():
    state = OrderState("f" * 16, ORDER_VERSION, 2**63, 10**6, 10**6, 10**9)
    assert len(state.to_json()) < 300
    assert OrderState.from_json(state.to_json()) == state


def test_state_walks_batches_windows_and_epochs():
    state, seen = OrderState("00", ORDER_VERSION, 1), []
    for _ in range(5):
        seen.append((state.epoch, state.window, state.batch))
        state = state.advanced(num_batches=2, num_windows=2)
    assert seen == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "aa"}, "digest is aa, this cache and recipe give 00"),
        ({"seed": 7}, "seed is 7, this cache and recipe give 1"),
        ({"version": 99}, f"version is 99, this cache and recipe give {ORDER_VERSION}"),
    ],
    ids=["digest", "seed", "version"],
)
def test_a_state_of_another_order_is_refused(change, message):
    state = OrderState("00", ORDER_VERSION, 1)
    state.check("00", 1)
    with pytest.raises(IdentityError, match=message):
        replace(state, **change).check("00", 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"digest": "a", "epoch": "x"})])
def test_what_is_no_state_is_refused(text):
    with pytest.raises(TrainingError, match="order state"):
        OrderState.from_json(text)
