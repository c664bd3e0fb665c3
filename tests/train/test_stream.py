"""Batches off a cache: what is in them, that they resume, and that nothing is left running."""

import gc
import threading
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from kdcache.errors import FormatError, IdentityError
from kdcache.formats.cache import open_cache
from kdcache.labels.decoding import decode
from kdcache.train.batches import stream
from kdcache.train.batches.stream import BatchStream


@pytest.fixture(scope="module")
def cache(world):
    return open_cache(world.cache)


def make_stream(cache, **change) -> BatchStream:
    settings = {
        "streams": ["src", "tgt"],
        "signals": ["threshold", "full"],
        "batch_tokens": 100,
        "seed": 3,
        "window_shards": 2,
        "max_epochs": 2,
    }
    return BatchStream(cache, **(settings | change))


@pytest.fixture(scope="module")
def whole(cache):
    return list(make_stream(cache))


def rows_of(batches) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


def test_the_cache_has_several_shards_and_windows(cache):
    assert cache.num_shards >= 3


def test_tokens_and_labels_are_those_of_the_rows(cache, whole):
    by_row = {}
    for shard in range(cache.num_shards):
        samples = cache.samples(shard)
        labels = cache.signal_shard("full", shard).parts[0][2]["tokens"]
        for m, row in enumerate(samples.row.tolist()):
            src, tgt = (samples.streams[name] for name in ("src", "tgt"))
            gold = labels.fields["gold"][labels.offsets[m] : labels.offsets[m + 1]]
            ids = [s.fields["id"][s.offsets[m] : s.offsets[m + 1]].tolist() for s in (src, tgt)]
            by_row[row] = (*ids, gold.tolist())
    for batch in whole[:20]:
        (micro,) = batch.micro
        source, target = micro.streams["src"], micro.streams["tgt"]
        assert batch.num_tokens == int(target.mask.sum()) == len(target.flat)
        assert torch.equal(target.ids[target.mask], target.flat)
        gold = micro.signals["full"].gold
        ends = target.mask.sum(1).cumsum(0).tolist()
        for b, row in enumerate(micro.rows.tolist()):
            src, tgt, expected = by_row[row]
            assert source.ids[b][source.mask[b]].tolist() == src
            assert target.ids[b, : len(tgt)].tolist() == tgt
            assert not target.mask[b, len(tgt) :].any()
            assert gold[ends[b] - len(tgt) : ends[b]].tolist() == expected
        assert decode(micro.signals["threshold"]).rows.max() < len(target.flat)


def test_every_sample_once_per_epoch_and_epochs_differ(cache, whole):
    epochs = [[b for b in whole if b.epoch == epoch] for epoch in (0, 1)]
    for batches in epochs:
        seen = np.concatenate([b.rows for b in batches])
        assert sorted(seen.tolist()) == list(range(cache.num_samples))
    assert rows_of(epochs[0]) != rows_of(epochs[1])
    assert make_stream(cache).count_batches(2, 10_000) == len(whole)
    assert make_stream(cache).count_batches(2, 5) == 5


def test_padded_targets_keep_the_budget(whole):
    for batch in whole:
        (micro,) = batch.micro
        assert (
            all(tokens.ids.numel() <= 100 for tokens in micro.streams.values()) or len(micro) == 1
        )


@pytest.mark.parametrize("accumulate", [2, 5])
def test_global_batches_do_not_depend_on_accumulation(cache, whole, accumulate):
    cut = list(make_stream(cache, accumulate=accumulate))
    assert rows_of(cut) == rows_of(whole)
    assert [b.num_tokens for b in cut] == [b.num_tokens for b in whole]
    assert max(len(b.micro) for b in cut) == accumulate


def test_signals_do_not_enter_the_order(cache, whole):
    assert rows_of(make_stream(cache, signals=[])) == rows_of(whole)


def test_restored_at_every_batch_the_rest_is_the_same(cache, whole):
    expected = rows_of(whole)
    for done, batch in enumerate(whole, start=1):
        stream = make_stream(cache, state=batch.state, signals=[])
        with closing(iter(stream)) as batches:
            ahead = rows_of(islice(batches, 4))
        assert ahead == expected[done : done + 4]
    middle = len(whole) // 3
    rest = make_stream(cache, state=whole[middle - 1].state)
    assert rows_of(rest) == expected[middle:]


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"batch_tokens": 99}, {"window_shards": 1}, {"streams": ["tgt", "tgt"]}]
)
def test_a_state_of_other_batches_is_refused(cache, whole, change):
    with pytest.raises(IdentityError, match="order state"):
        make_stream(cache, state=whole[0].state, **change)


def test_what_is_not_in_the_cache_is_refused(cache):
    with pytest.raises(FormatError, match="no stream 'plm'"):
        make_stream(cache, streams=["plm", "tgt"])
    with pytest.raises(FormatError, match="no signal 'beams'"):
        make_stream(cache, signals=["beams"])


def test_an_error_of_the_thread_is_raised_here(cache, monkeypatch):
    def broken(*_):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("kdcache.train.batches.gather.wide_labels", broken)
    with pytest.raises(RuntimeError, match="disk on fire"):
        next(iter(make_stream(cache)))


def test_an_abandoned_iterator_stops_its_thread(cache):
    batches = iter(make_stream(cache, max_epochs=None, signals=[]))
    next(batches)
    assert any(thread.name == "kdcache-batches" for thread in threading.enumerate())
    del batches
    gc.collect()
    assert not any(thread.name == "kdcache-batches" for thread in threading.enumerate())


@pytest.mark.parametrize(("rank", "ranks", "accumulate"), [(0, 1, 1), (1, 2, 3)])
def test_batches_do_not_depend_on_what_is_copied_together(
    cache, monkeypatch, rank, ranks, accumulate
):
    found = []
    for size in (1, 2000, 1 << 40):
        monkeypatch.setattr(stream, "BLOCK_BYTES", size)
        options = {"rank": rank, "world": ranks, "accumulate": accumulate, "max_epochs": 1}
        made = BatchStream(cache, ["src", "tgt"], ["threshold", "full"], 120, 1, 2, **options)
        found.append(list(made))
    assert any(batch.spare for batch in found[0]) == (ranks > 1)
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert one.state == other.state
            assert one.counts == other.counts
            assert one.sample_ids.tobytes() == other.sample_ids.tobytes()
            assert len(one.micro) == len(other.micro)
            pairs = zip([*one.micro, *one.spare], [*other.micro, *other.spare], strict=True)
            for left, right in pairs:
                assert left.rows.tolist() == right.rows.tolist()
                assert torch.equal(left.streams["tgt"].ids, right.streams["tgt"].ids)
                for name in ("threshold", "full"):
                    sides = [decode(batch.signals[name]) for batch in (left, right)]
                    assert torch.equal(sides[0].values, sides[1].values)
                    assert torch.equal(sides[0].ids, sides[1].ids)
