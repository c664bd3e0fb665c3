"""Restored at every step, for any number of ranks and threads, the global batches are the same.

A global batch is written down sample by sample, its micro-batches put together over all ranks: the
sample id, the tokens of both sides and every decoded label. Sequences are compared in order, so a
batch that comes late, or a sample in another place, differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from kdcache.formats.cache import open_cache
from kdcache.formats.codec import SampledCodec, ThresholdCodec
from kdcache.labels.decoding import decode
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.order import OrderState
from kdcache.train.batches.stream import BatchStream
from tests.formats.labels import make_cache

CODECS = {"exact": ThresholdCodec(c=1 / 8), "drawn": SampledCodec(n=5)}
WORLDS, THREADS = (1, 2, 3, 8), (0, 1, 4)
EPOCHS = 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """31 samples in 7 shards, so in 4 windows of 2; every sample is another."""
    draw = np.random.default_rng(1)
    texts = {
        side: ["".join(draw.choice(list("abcd"), draw.integers(1, 7))) for _ in range(31)]
        for side in ("src", "tgt")
    }
    path = tmp_path_factory.mktemp("restore") / "cache"
    cache = open_cache(make_cache(path, codecs=CODECS, sentences=texts, shard_tokens=45))
    assert cache.num_shards == 7
    return cache


def make_stream(cache, **options) -> BatchStream:
    settings = {"accumulate": 2, "max_epochs": EPOCHS} | options
    return BatchStream(cache, ["src", "tgt"], list(CODECS), 30, 5, 2, **settings)


def written(batch: Batch) -> Iterator[tuple]:
    """Each sample of a micro-batch as plain values."""
    lengths = batch.streams["tgt"].mask.sum(1).tolist()
    labels = []
    for name in CODECS:
        target = decode(batch.signals[name])
        columns = [one.tolist() for one in (target.rows, target.ids, target.values)]
        entries = zip(*columns, strict=True)
        by_position: list[list[tuple]] = [[] for _ in range(len(target.constant))]
        for position, *entry in entries:
            by_position[position].append(tuple(entry))
        labels.append(by_position)
    at = 0
    for b, length in enumerate(lengths):
        sides = [tuple(s.ids[b][s.mask[b]].tolist()) for s in batch.streams.values()]
        mine = tuple(str(one[at : at + length]) for one in labels)
        yield (batch.rows[b], batch.sample_ids[b].tobytes(), *sides, *mine)
        at += length
    assert at == len(labels[0])


def sequence(cache, world: int, threads: int, state: str | None = None) -> list[list[tuple]]:
    """Every global batch from a state on, put together over ranks; with its state at the end."""
    restored = None if state is None else OrderState.from_json(state)
    ranks = [
        list(make_stream(cache, rank=rank, world=world, threads=threads, state=restored))
        for rank in range(world)
    ]
    together = []
    for batches in zip(*ranks, strict=True):
        first = batches[0]
        assert all(batch.state == first.state for batch in batches)
        assert all(batch.counts == first.counts for batch in batches)
        # Slices go to the ranks in turn; all ranks have as many, if need be of stand-ins.
        most = max(len(batch.micro) for batch in batches)
        assert {len(batch.micro) + len(batch.spare) for batch in batches} == {most}
        spare = {tuple(one.rows.tolist()) for batch in batches for one in batch.spare}
        assert spare <= {(first.rows[0],)}
        slices = [b.micro[n] for n in range(most) for b in batches if n < len(b.micro)]
        samples = [sample for micro in slices for sample in written(micro)]
        assert [sample[0] for sample in samples] == first.rows.tolist()
        together.append([*samples, first.state.to_json()])
    return together


@pytest.fixture(scope="module")
def whole(cache):
    return sequence(cache, 1, 0)


def test_there_is_something_to_restore(whole, cache):
    assert len(whole) >= 16
    sizes = [len(batch) - 1 for batch in whole]
    assert min(sizes) < 4 < max(sizes)  # with 8 ranks some have nothing
    for epoch in (whole[: len(whole) // 2], whole[len(whole) // 2 :]):
        rows = [sample[0] for batch in epoch for sample in batch[:-1]]
        assert sorted(rows) == [2 * m for m in range(cache.num_samples)]
    assert len({sample for batch in whole for sample in batch[:-1]}) == cache.num_samples


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("world", WORLDS)
def test_restored_at_every_step(cache, whole, world, threads):
    assert sequence(cache, world, threads) == whole
    for done, batch in enumerate(whole[:-1], start=1):
        assert sequence(cache, world, threads, state=batch[-1]) == whole[done:], done


def test_another_number_of_ranks_may_go_on(cache, whole):
    """Killed at 8 ranks, gone on with 3 after a while, then with 1."""
    first = len(whole) // 3
    second = 2 * first
    found = sequence(cache, 8, 1)[:first]
    found += sequence(cache, 3, 0, state=found[-1][-1])[: second - first]
    found += sequence(cache, 1, 4, state=found[-1][-1])
    assert found == whole


def test_threads_hand_batches_over_in_order(cache, whole, monkeypatch):
    """Though those that gather them finish in any."""
    import time

    real, calls = BatchStream._gather, []

    def slow(self, planned):
        calls.append(1)
        time.sleep(0.003 * (len(calls) % 4))
        return real(self, planned)

    monkeypatch.setattr(BatchStream, "_gather", slow)
    assert sequence(cache, 1, 4) == whole


def test_states_are_small(cache):
    with closing(iter(make_stream(cache))) as batches:
        assert {len(batch.state.to_json()) < 300 for batch in batches} == {True}
