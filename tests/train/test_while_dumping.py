"""Runs on a cache that grows: refusals, exact resumption, and a dump at the same time."""

import shutil
import threading
from types import SimpleNamespace

import pytest

from kdcache.dump.runner import dump
from kdcache.errors import FormatError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import parse_recipe
from kdcache.train.batches import growth
from kdcache.train.batches.growth import Growth
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.train.growing import make_stream, rows_of_prefix
from tests.train.test_loop import metrics, weights


@pytest.mark.parametrize("begun", [0, 2])
def test_an_unfinished_cache_is_refused_without_the_setting(growing, begun):
    growing.show(growing.num_shards, begun)
    with pytest.raises(FormatError, match=rf"{begun} of {growing.num_shards} shards") as caught:
        make_stream(growing.path, while_dumping=False)
    assert "'full'" in str(caught.value)
    assert "train.while_dumping" in str(caught.value)
    growing.show(growing.num_shards)


def test_a_pass_has_no_length_while_dumping(make_recipe):
    with pytest.raises(RecipeError, match="max_epochs is 2 and while_dumping is set") as caught:
        make_recipe(while_dumping=True, max_epochs=2)
    assert "\n" not in str(caught.value)
    assert make_recipe(while_dumping=True).train.max_steps == 12


def test_a_signal_that_has_no_record_yet_is_waited_for_by_the_user(
    world, make_recipe, tmp_path, growing
):
    shutil.copytree(growing.path, tmp_path / "cache")
    (tmp_path / "cache" / "signals" / "threshold.json").unlink()
    recipe = make_recipe(while_dumping=True)
    with pytest.raises(RecipeError, match=r"no signal 'threshold'; it has .* wait until the dump"):
        train(recipe, tmp_path / "cache", tmp_path / "run")


PINS = [1, 2, 2, 4, 5]


@pytest.fixture
def grown_run(by_epoch, make_recipe, tmp_path):
    """A run through several epochs of a growing cache; also the recipe and the cache."""
    recipe = make_recipe(while_dumping=True, max_steps=36, checkpoints={"every_steps": 1})
    growing = by_epoch(PINS)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        real = Trainer.step

        def step(self, batch):
            real(self, batch)
            steps.append(batch.state)

        patch.setattr(Trainer, "step", step)
        summary = train(recipe, growing.path, tmp_path / "whole")
    return SimpleNamespace(
        recipe=recipe, growing=growing, run=tmp_path / "whole", summary=summary, states=steps
    )


def test_a_killed_run_goes_on_bitwise(grown_run, by_epoch, tmp_path, monkeypatch):
    """In mid-epoch, on an epoch's last step and on its first, each time with more committed."""
    states = grown_run.states
    end = next(n for n, state in enumerate(states) if state.epoch == 3 and not state.begun)
    assert states[end - 1].shards == 2
    assert states[end + 1].shards == 4
    real = Trainer.step
    for name, kill_at in [
        ("mid", end - 3),
        ("last", end),
        ("boundary", end + 1),
        ("first", end + 2),
    ]:
        run = tmp_path / name

        def step(self, batch, kill_at=kill_at):
            if self.state.step == kill_at:
                raise KeyboardInterrupt
            real(self, batch)

        growing = by_epoch(PINS)
        growing.show(0)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", step)
            with pytest.raises(KeyboardInterrupt):
                train(grown_run.recipe, growing.path, run)
        state = states[kill_at - 1]
        monkeypatch.undo()
        by_epoch(PINS[state.epoch + state.begun :])
        growing.show(PINS[state.epoch + state.begun])
        summary = train(grown_run.recipe, growing.path, run)
        assert metrics(run) == metrics(grown_run.run)
        assert weights(run / "last") == weights(grown_run.run / "last")
        assert summary["tokens"] == grown_run.summary["tokens"]
        monkeypatch.undo()


def test_metrics_and_log_say_how_much_there_was(by_epoch, make_recipe, tmp_path, caplog):
    caplog.set_level("INFO")
    growing = by_epoch(PINS)
    recipe = make_recipe(while_dumping=True, dev=False, max_steps=40)
    summary = train(recipe, growing.path, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert {line["shards"] == PINS[min(line["epoch"], 4)] for line in lines} == {True}
    assert summary["shards"] == lines[-1]["shards"]
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch")]
    epochs = sorted({line["epoch"] for line in lines})
    total = growing.num_shards
    assert said == [f"epoch {n}: {PINS[min(n, 4)]} of {total} shards" for n in epochs]
    assert len(epochs) > 2


def test_a_student_trains_while_a_dump_goes_on(world, make_recipe, tmp_path, monkeypatch):
    """Both at once, in step at epoch ends only: every epoch finds one shard more."""
    cache = tmp_path / "cache"
    fields = {side: str(world.root / side) for side in ("src", "tgt")}
    tree = {
        "name": "test",
        "corpus": {"fields": fields, "limit": 60},
        "dump": {
            "teacher": {"path": str(world.teacher), "device": "cpu"},
            "shard_tokens": 300,
            "batch_tokens": 300,
            "signals": {},
        },
    }
    dump(parse_recipe(tree), cache)
    total = open_cache(cache).num_shards
    assert total >= 4
    tree["dump"]["signals"] = {"threshold": {"codec": {"name": "threshold", "c": "1/8"}}}

    change = threading.Condition()
    looked_at, committed, begun = 0, 0, threading.Event()
    real_commit, real_prefix, real_step = CacheWriter.commit, Growth.prefix, Trainer.step

    def commit(self, record):
        nonlocal committed
        begun.set()
        with change:  # not before an epoch has begun without it
            assert change.wait_for(lambda: looked_at > record.shard, timeout=30)
        found = real_commit(self, record)
        with change:
            committed = record.shard + 1
            change.notify_all()
        return found

    def prefix(self):
        nonlocal looked_at
        with change:
            assert change.wait_for(lambda: committed >= min(looked_at, total), timeout=30)
            found = real_prefix(self)
            looked_at += 1
            change.notify_all()
        return found

    seen: dict[tuple[int, int], list[int]] = {}

    def step(self, batch):
        real_step(self, batch)
        seen.setdefault((batch.epoch, batch.shards), []).extend(batch.rows.tolist())

    monkeypatch.setattr(growth, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(CacheWriter, "commit", commit)
    monkeypatch.setattr(Growth, "prefix", prefix)
    monkeypatch.setattr(Trainer, "step", step)
    dumping = threading.Thread(target=dump, args=(parse_recipe(tree), cache))
    dumping.start()
    assert begun.wait(timeout=30)
    with pytest.raises(FormatError, match=f"0 of {total} shards of 'threshold'"):
        train(make_recipe(dev=False), cache, tmp_path / "refused")
    recipe = make_recipe(while_dumping=True, dev=False, max_steps=40, batch_tokens=200)
    train(recipe, cache, tmp_path / "run")
    dumping.join(timeout=30)
    assert not dumping.is_alive()
    assert open_cache(cache).complete("threshold")

    # The first look found nothing; from then on each found one shard more.
    *whole, (last, rows) = seen.items()
    assert [shards for _, shards in seen] == [min(n + 1, total) for n in range(len(seen))]
    assert len(seen) > total
    for (_, shards), rows_seen in whole:
        assert sorted(rows_seen) == rows_of_prefix(cache, shards)
    assert set(rows) <= set(rows_of_prefix(cache, last[1]))
