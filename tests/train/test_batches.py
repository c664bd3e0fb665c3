"""Batches for a loop of one's own: an iterable that says where it stands."""

import json
import threading
import time
from contextlib import closing
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

import kdcache
from kdcache.errors import FormatError, IdentityError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.train.batches.batches import Batches
from tests.formats.labels import SENTENCES, make_cache
from tests.report.kinds import make_kinds

SIZES = {"batch_tokens": 12, "window_shards": 2, "seed": 3}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    texts = {side: lines * 3 for side, lines in SENTENCES.items()}
    return make_cache(tmp_path_factory.mktemp("batches") / "cache", sentences=texts)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    return make_kinds(tmp_path_factory.mktemp("kinds") / "cache").path


def make(path, **options) -> Batches:
    return open_cache(path).batches(["src", "tgt"], ["logits"], **(SIZES | options))


def rows_of(batches) -> list[list[int]]:
    return [batch.rows.tolist() for batch in batches]


@pytest.fixture(scope="module")
def whole(path):
    return rows_of(make(path, epochs=3))


def test_a_bare_loop(path):
    """The whole story of a user: tokens, labels, a loss over the global batch, a step."""
    torch.manual_seed(0)
    model = torch.nn.Embedding(12, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    losses = []
    for step in kdcache.batches(path, signals=["logits"], accumulate=2, epochs=8, **SIZES):
        total = 0.0
        for batch in step.micro:
            target = batch.streams["tgt"]
            labels = kdcache.losses.decode(batch.signals["logits"])
            weight = torch.full((len(target.flat),), 1 / step.counts["tgt"])
            terms = [kdcache.losses.LossTerm(labels, row_weight=weight)]
            loss, _ = kdcache.losses.fused_loss(model(target.flat), terms)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_state_is_that_of_the_last_batch_though_threads_are_ahead(path, whole):
    batches = make(path, epochs=3)
    with closing(iter(batches)) as running:
        for done, batch in enumerate(running, start=1):
            if done == 2:
                time.sleep(0.2)  # the thread fills its queue
            state = json.loads(json.dumps(batches.state_dict()))
            assert len(json.dumps(state)) < 300
            other = make(path, epochs=3, threads=0)
            other.load_state_dict(state)
            assert rows_of(other) == whole[done:]
            assert batch.rows.tolist() == whole[done - 1]
    assert rows_of(batches) == []


def test_iterating_goes_on_where_the_batches_stand(path, whole):
    batches = make(path, epochs=3)
    assert rows_of(islice(batches, 4)) == whole[:4]
    assert rows_of(islice(batches, 3)) == whole[4:7]
    assert rows_of(batches) == whole[7:]


def test_epoch_by_epoch(path, whole):
    batches = make(path)
    found = []
    for epoch in range(3):
        mine = list(batches.one_epoch())
        assert {batch.epoch for batch in mine} == {epoch}
        found += rows_of(mine)
    assert found == whole
    assert batches.state_dict()["epoch"] == 3


def test_a_data_loader_reads_them_here_and_nowhere_else(path, whole):
    batches = make(path, epochs=3)
    loader = DataLoader(batches, batch_size=None, num_workers=0)
    for done, batch in enumerate(loader, start=1):
        assert batch.rows.tolist() == whole[done - 1]
        other = make(path, epochs=3)
        other.load_state_dict(batches.state_dict())
        assert rows_of(islice(other, 1)) == whole[done : done + 1]
    with pytest.raises(TrainingError, match="set num_workers=0"):
        list(DataLoader(make(path), batch_size=None, num_workers=1))


@pytest.mark.parametrize(
    ("signals", "streams"),
    [
        ([], ["chat", "pair", "src", "tgt"]),
        (["causal"], ["chat"]),
        (["targets"], ["src", "tgt"]),
        (["mlm", "masks", "hidden"], ["src"]),
        (["beams", "nli"], ["src", "tgt", "pair"]),
        (["hidden", "targets"], ["src", "tgt"]),
    ],
    ids=["tokens", "language model", "translation", "masked", "two", "its source is described too"],
)
def test_streams_are_those_that_the_signals_describe(every_kind, signals, streams):
    cache = open_cache(every_kind)
    batches = cache.batches(signals=signals, batch_tokens=60, epochs=1)
    for batch in batches:
        assert list(batch.micro[0].streams) == streams
        assert list(batch.micro[0].signals) == signals
        assert batch.num_tokens == batch.counts[streams[-1]]


def test_layers_are_passed_on(every_kind):
    batches = kdcache.batches(every_kind, signals=["hidden"], layers={"hidden": [2]}, epochs=1)
    assert {batch.micro[0].signals["hidden"].layers for batch in batches} == {(2,)}


def test_batches_move_as_a_whole(path):
    batch = next(iter(make(path, accumulate=2)))
    moved = batch.to("meta")
    assert [micro.streams["tgt"].ids.device.type for micro in moved.micro] == ["meta"] * 2
    assert moved.counts is batch.counts


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": 4}, IdentityError, "seed is 3, this cache and recipe give 4"),
        ({"batch_tokens": 13}, IdentityError, "digest is"),
    ],
)
def test_a_state_of_other_batches_is_refused(path, change, error, message):
    with pytest.raises(error, match=message):
        make(path, **change).load_state_dict(make(path).state_dict())


@pytest.mark.parametrize("state", [{}, {"digest": "a"}, {"orders": 3}, None, "x"])
def test_what_is_no_state_is_refused(path, state):
    with pytest.raises(TrainingError, match="order state") as caught:
        make(path).load_state_dict(state)
    assert "\n" not in str(caught.value)


def test_what_is_not_in_the_cache_is_refused(path):
    with pytest.raises(FormatError, match="no signal 'beams'"):
        kdcache.batches(path, signals=["beams"])
    with pytest.raises(FormatError, match="no stream 'plm'"):
        kdcache.batches(path, ["plm"])


def test_an_abandoned_loop_leaves_no_thread(path):
    for batch in make(path):
        assert len(batch.rows)
        break
    import gc

    gc.collect()
    assert not any(thread.name == "kdcache-batches" for thread in threading.enumerate())
