"""Batches of a cache that grows: what an epoch is drawn from, and that it resumes exactly."""

import json
import signal
import threading
from contextlib import closing
from dataclasses import replace
from itertools import accumulate, islice
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import IntegrityError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.train.batches import growth
from kdcache.train.batches.growth import Growth
from kdcache.train.batches.order import ORDER_VERSION, OrderState
from tests.train.growing import SIGNALS, make_stream, rows_of_prefix
from tests.train.test_stream import rows_of


@given(st.lists(st.sets(st.integers(0, 6)), max_size=3))
def test_the_prefix_ends_at_the_first_shard_that_any_signal_lacks(have):
    named = {f"signal{n}": shards for n, shards in enumerate(have)}
    cache = SimpleNamespace(num_shards=6, signal=named.get, committed=named.get)
    expected = 0
    while expected < 6 and all(expected in shards for shards in have):
        expected += 1
    assert Growth(cache, list(named), while_dumping=True).prefix() == expected


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_sample_of_the_prefix_once_per_epoch(growing, data):
    """Whatever is committed when an epoch begins, and whatever is added while it lasts."""
    shard = st.integers(0, growing.num_shards - 1)
    grown = list(
        accumulate(
            data.draw(st.lists(st.tuples(st.sets(shard), st.sets(shard)), min_size=3, max_size=3)),
            lambda before, more: tuple(map(set.union, before, more)),
            initial=({0}, {0}),
        )
    )
    for name in SIGNALS:
        growing.show_these(name, ())
    pins, real = iter(grown), Growth.prefix
    expected = [next(n for n in range(99) if n not in first & second) for first, second in grown]

    def prefix(self):
        for name, shards in zip(SIGNALS, next(pins), strict=True):
            growing.show_these(name, shards)
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Growth, "prefix", prefix)
        batches = list(make_stream(growing.path))
    for epoch, count in enumerate(expected):
        mine = [batch for batch in batches if batch.epoch == epoch]
        assert {batch.shards for batch in mine} == {count}
        seen = sorted(np.concatenate([batch.rows for batch in mine]).tolist())
        assert seen == rows_of_prefix(growing.path, count)


@pytest.mark.parametrize("signals", [SIGNALS, ()], ids=["labels", "tokens alone"])
def test_a_complete_cache_gives_the_plain_order(world, signals):
    plain = list(make_stream(world.cache, signals=signals, while_dumping=False, max_epochs=2))
    grown = list(make_stream(world.cache, signals=signals, max_epochs=2))
    assert rows_of(grown) == rows_of(plain)
    assert [b.state for b in grown] == [b.state for b in plain]
    assert {b.shards for b in grown} == {open_cache(world.cache).num_shards}


def test_an_epoch_of_a_prefix_is_the_plain_order_of_its_shards(by_epoch):
    """Not by the code under test: the windows, made again from the numbers of the prefix."""
    from kdcache.train.batches.order import epoch_windows

    growing = by_epoch([3])
    stream = make_stream(growing.path, max_epochs=1)
    seen = [row for batch in rows_of(stream) for row in batch]
    cache = open_cache(growing.path)
    at = 0
    for window in epoch_windows(stream._plan, 3, 2, 3, 0):
        rows = sorted(row for shard in window for row in cache.samples(shard).row.tolist())
        assert sorted(seen[at : at + len(rows)]) == rows
        at += len(rows)
    assert at == len(seen)


def test_the_cache_is_looked_at_once_an_epoch(by_epoch, monkeypatch):
    growing = by_epoch([2, 3, 4, 4])
    stream = make_stream(growing.path)
    asked, real = [], stream.cache.committed
    monkeypatch.setattr(stream.cache, "committed", lambda name: asked.append(name) or real(name))
    assert len(list(stream)) > 20
    assert asked == list(SIGNALS) * 4


def test_the_state_pins_its_epoch_and_no_other(by_epoch):
    growing = by_epoch([2, 4, 4, 5])
    for batch in make_stream(growing.path):
        state = json.loads(batch.state.to_json())
        last = (state["window"], state["batch"]) == (0, 0)
        assert state["epoch"] == batch.epoch + last
        assert state["shards"] == (None if last else batch.shards)
        assert OrderState.from_json(batch.state.to_json()) == batch.state


def test_restored_at_every_batch_an_epoch_ends_as_it_began(by_epoch, monkeypatch):
    """Though more is committed by then; the next epoch is drawn from what there is then."""
    pins = [2, 3, 5, 5]
    growing = by_epoch(pins)
    whole = list(make_stream(growing.path))
    for done, batch in enumerate(whole, start=1):
        epoch = batch.state.epoch
        # At the end of an epoch the next one looks, in mid-epoch the one after it does.
        by_epoch(pins[epoch + batch.state.begun :])
        growing.show(pins[min(epoch + 1, 3)])
        state = OrderState.from_json(batch.state.to_json())
        with closing(iter(make_stream(growing.path, state=state))) as batches:
            ahead = list(islice(batches, 5))
        assert rows_of(ahead) == rows_of(whole[done : done + 5])
        assert [b.state for b in ahead] == [b.state for b in whole[done : done + 5]]
        monkeypatch.undo()


def test_the_next_epoch_takes_what_was_committed_meanwhile(by_epoch):
    growing = by_epoch([2, 4])
    whole = list(make_stream(growing.path, max_epochs=2))
    end = next(batch.state for batch in whole if not batch.state.begun)
    by_epoch([5])
    (first, *_) = rest = list(make_stream(growing.path, max_epochs=2, state=end))
    assert first.shards == 5
    seen = sorted(row for batch in rows_of(rest) for row in batch)
    assert seen == rows_of_prefix(growing.path, 5)


def test_states_from_before_growth_mean_the_whole_cache(world):
    """ORDER_VERSION stands: without `shards` an epoch that has begun has all of them."""
    plain = list(make_stream(world.cache, while_dumping=False, max_epochs=2))
    assert ORDER_VERSION == 1
    for batch in plain[:: max(1, len(plain) // 10)]:
        tree = json.loads(batch.state.to_json())
        del tree["shards"]
        old = OrderState.from_json(json.dumps(tree))
        for while_dumping in (False, True):
            rest = make_stream(world.cache, state=old, while_dumping=while_dumping, max_epochs=2)
            done = plain.index(batch) + 1
            with closing(iter(rest)) as batches:
                assert rows_of(islice(batches, 3)) == rows_of(plain[done : done + 3])


@pytest.mark.parametrize("shards", [0, -1, 999])
def test_a_state_that_pins_the_impossible_is_refused(world, shards):
    state = next(iter(make_stream(world.cache))).state
    stream = make_stream(world.cache, state=replace(state, shards=shards))
    with pytest.raises(TrainingError, match=f"an epoch of {shards} shards of a cache with"):
        next(iter(stream))


def test_a_pinned_shard_that_is_gone_is_named(growing):
    growing.show(growing.num_shards)
    state = next(iter(make_stream(growing.path))).state
    growing.show(growing.num_shards - 1)
    stream = make_stream(growing.path, state=state)
    with pytest.raises(IntegrityError, match=f"shard {growing.num_shards - 1} of"):
        list(stream)
    growing.show(growing.num_shards)


def test_the_first_shard_is_waited_for(growing, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(growth, "POLL_SECONDS", 0.001)
    growing.show(0, 3)
    looks, real = [], Growth.prefix

    def prefix(self):
        looks.append(real(self))
        if len(looks) == 3:
            growing.show(2, 3)
        return looks[-1]

    monkeypatch.setattr(Growth, "prefix", prefix)
    with closing(iter(make_stream(growing.path))) as batches:
        assert next(batches).shards == 2
    assert looks[:4] == [0, 0, 0, 2]
    waiting = [r.getMessage() for r in caplog.records if "waiting" in r.getMessage()]
    assert len(waiting) == 1
    assert "waiting for the first of" in waiting[0]
    growing.show(growing.num_shards)


def test_the_waiting_can_be_interrupted(growing, monkeypatch):
    monkeypatch.setattr(growth, "POLL_SECONDS", 60.0)
    growing.show(0)
    real = threading.Event.wait
    # A shell has what it runs in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait(self, timeout=None):
        if timeout == 60.0:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return real(self, timeout)

    monkeypatch.setattr(threading.Event, "wait", wait)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(iter(make_stream(growing.path)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(thread.name == "kdcache-batches" for thread in threading.enumerate())
    growing.show(growing.num_shards)
