"""Several caches mixed by weight: whose turn it is, that it resumes, and what is refused."""

import json
import shutil
from contextlib import closing
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdcache
from kdcache.errors import IdentityError, RecipeError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.formats.codec import FullCodec, ThresholdCodec
from kdcache.formats.manifest import Manifest
from kdcache.formats.signals import LogitsRecord
from kdcache.train.batches.mix import MixedStream, batch_stream, next_cache, shares
from kdcache.train.batches.mix_state import MixState, state_from_dict
from kdcache.train.batches.stream import BatchStream
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.formats.kinds import make_kinds
from tests.formats.labels import SENTENCES, make_cache
from tests.formats.test_cache import rewrite
from tests.train.test_loop import metrics, weights


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Three caches of other texts, sizes and codecs."""
    root = tmp_path_factory.mktemp("mix")
    codecs = [ThresholdCodec(c=1 / 8), ThresholdCodec(c=1 / 4), FullCodec()]
    made = []
    for number, codec in enumerate(codecs):
        texts = {side: [t[number:] + t for t in lines] for side, lines in SENTENCES.items()}
        texts = {side: lines * (number + 1) for side, lines in texts.items()}
        made.append(make_cache(root / str(number), codecs={"logits": codec}, sentences=texts))
    return [open_cache(path) for path in made]


def mixed(caches, weights=(3, 1, 2), **options) -> MixedStream:
    stream = batch_stream(caches, weights, ["src", "tgt"], ["logits"], 24, 5, 2, **options)
    assert isinstance(stream, MixedStream)
    return stream


def seen(batches, count: int) -> list[tuple]:
    with closing(iter(batches)) as running:
        return [(batch.cache, batch.rows.tolist(), batch.state) for batch in islice(running, count)]


def turns(weights, steps: int, seed: int = 1) -> list[int]:
    parts, counts, found = shares(weights), [0] * len(weights), []
    for _ in range(steps):
        found.append(next_cache(parts, counts, seed))
        counts[found[-1]] += 1
    return found


@given(
    st.lists(st.floats(0.001, 1000) | st.integers(1, 9), min_size=1, max_size=7),
    st.integers(0, 9),
)
def test_every_prefix_has_its_shares_within_one(weights, seed):
    counts, total = [0] * len(weights), sum(map(Fraction, weights))
    for step, number in enumerate(turns(weights, 120, seed), start=1):
        counts[number] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - step * Fraction(weight) / total) < 1


def test_equal_weights_take_turns_in_keyed_order():
    for seed in (1, 2):
        found = turns([1, 1, 1], 300, seed)
        assert all(sorted(found[i : i + 3]) == [0, 1, 2] for i in range(0, 300, 3))
    rounds = {tuple(found[i : i + 3]) for i in range(0, 300, 3)}
    assert len(rounds) == 6
    assert turns([1, 1, 1], 30, 1) != turns([1, 1, 1], 30, 2)


def test_turns_are_golden():
    assert turns([3, 1], 12) == [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1]
    assert turns([1, 2, 3], 12) == [2, 1, 2, 0, 2, 1, 2, 1, 2, 1, 2, 0]
    assert turns([0.7, 0.3], 10) == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]


def test_each_cache_gives_its_own_batches_in_its_own_order(caches):
    found = seen(mixed(caches), 60)
    assert [number for number, _, _ in found] == turns((3, 1, 2), 60, 5)
    for number, stream in enumerate(mixed(caches).streams):
        mine = [rows for of, rows, _ in found if of == number]
        with closing(iter(stream)) as running:
            assert mine == [batch.rows.tolist() for batch in islice(running, len(mine))]
        whole = [row for rows in mine for row in rows][: caches[number].num_samples]
        assert sorted(whole) == [2 * m for m in range(caches[number].num_samples)]


def test_labels_are_those_of_the_cache_of_the_batch(caches):
    with closing(iter(mixed(caches))) as running:
        for batch in islice(running, 20):
            codec = batch.micro[0].signals["logits"].spec.codec
            assert codec == caches[batch.cache].logits("logits").codec


def test_one_cache_is_a_single_stream(caches):
    sizes = (["src", "tgt"], ["logits"], 24, 5, 2)
    single = batch_stream(caches[:1], None, *sizes)
    assert isinstance(single, BatchStream)
    alone = MixedStream([BatchStream(caches[0], *sizes)], [0.3], 5)
    assert [one[:2] for one in seen(alone, 30)] == [one[:2] for one in seen(single, 30)]


def test_two_of_one_corpus_do_not_go_in_step(caches):
    found = seen(mixed([caches[2], caches[2]], (1, 1)), 40)
    first, second = ([rows for of, rows, _ in found if of == n] for n in (0, 1))
    assert first != second
    assert sum(rows in second for rows in first) < len(first)


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 1}, {"threads": 3, "world": 2}])
def test_restored_at_every_step(caches, options):
    whole = seen(mixed(caches), 24)
    for done, (_, _, state) in enumerate(whole, start=1):
        found = json.loads(state.to_json())
        assert len(state.to_json()) < 300 * (len(caches) + 1)
        again = mixed(caches, **options)
        again.state = state_from_dict(found)
        assert again.state == state
        assert state.step == done
        assert seen(again, 5) == whole[done : done + 5] or done > 19


def test_batches_of_several_caches_say_where_they_stand(caches):
    options = {"signals": ["logits"], "batch_tokens": 24, "seed": 5, "window_shards": 2}
    options["weights"] = [3, 1, 2]
    whole = [rows for _, rows, _ in seen(mixed(caches), 30)]
    paths = [cache.path for cache in caches]
    batches = kdcache.batches(paths, **options)
    assert [batch.rows.tolist() for batch in islice(batches, 12)] == whole[:12]
    other = kdcache.batches(caches, **options)
    other.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert [batch.rows.tolist() for batch in islice(other, 18)] == whole[12:]
    with pytest.raises(TrainingError, match="no epoch in common"):
        other.one_epoch()
    with pytest.raises(IdentityError, match="mixed by"):
        kdcache.batches(caches, **options | {"weights": None}).load_state_dict(other.state_dict())
    single = kdcache.batches(caches[0], **options)
    with pytest.raises(IdentityError, match="mixed by"):
        single.load_state_dict(batches.state_dict())
    with pytest.raises(IdentityError, match="digest is"):
        batches.load_state_dict(single.state_dict())


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ((1, 2), {}, r"weights are \[1, 2\] for 3 caches"),
        ((1, 0, 2), {}, "expected a number above 0"),
        ((1, 1, 1), {"max_epochs": 2}, "no common epoch"),
    ],
    ids=["too few", "zero", "epochs"],
)
def test_what_cannot_be_mixed_is_refused(caches, weights, options, message):
    with pytest.raises(TrainingError, match=message) as caught:
        mixed(caches, weights, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{"orders": 1}, {"orders": [{}], "digest": "", "seed": 1}, {}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(TrainingError, match="order state"):
        state_from_dict(state)
    with pytest.raises(TrainingError, match="not a state of several caches"):
        MixState.from_dict(state)


def changed(path, kind, *keys):
    """Has a record of a cache say something else; the last key is the value."""

    def change(root):
        def edit(tree):
            for key in keys[:-2]:
                tree = tree[key]
            tree[keys[-2]] = keys[-1]

        rewrite(root, path, kind, edit)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("signals/logits.json", LogitsRecord, "vocab_size", 13),
            r"signals.logits.vocab_size: 12 in .*0, 13 here",
        ),
        (
            changed("kdcache.json", Manifest, "tokenizers", "teacher", "digest", "0" * 32),
            "tokenizers.teacher.digest: 'abab",
        ),
        (
            changed("kdcache.json", Manifest, "streams", "src", "field", "tgt"),
            "streams.src.field: 'src' in .*0, 'tgt' here",
        ),
    ],
    ids=["vocabulary", "tokenizer", "field"],
)
def test_caches_that_do_not_agree_are_refused(caches, tmp_path, change, message):
    shutil.copytree(caches[1].path, tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(IdentityError, match=message) as caught:
        mixed([caches[0], open_cache(tmp_path / "other")], (1, 1))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)


def test_layers_that_are_asked_for_need_not_be_all(tmp_path):
    """Two caches of other hidden layers serve those that both have."""
    first = open_cache(make_kinds(tmp_path / "a", only=["hidden"]).root)
    options = {"layers": {"hidden": (2,)}}
    with closing(iter(mixed_hidden([first, first], **options))) as running:
        assert next(running).micro[0].signals["hidden"].layers == (2,)


def mixed_hidden(caches, **options):
    return batch_stream(caches, (1, 1), ["tgt"], ["hidden"], 24, 5, 2, **options)


@pytest.fixture
def two(world, tmp_path):
    """The world's cache and a part of it, for students; the second is the first half."""
    from kdcache.cli import main

    half = tmp_path / "half"
    assert main(["compile", str(world.cache), "--out", str(half), "--fraction", "0.5"]) == 0
    return SimpleNamespace(paths=[world.cache, half])


def shared(two, *weights):
    return [{"path": str(path), "weight": w} for path, w in zip(two.paths, weights, strict=True)]


def test_a_killed_run_on_two_caches_goes_on_bitwise(two, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(caches=shared(two, 2.0, 1.0), checkpoints={"every_steps": 2})
    train(recipe, None, tmp_path / "whole")
    lines = [line for line in metrics(tmp_path / "whole") if "cache" in line]
    assert [line["cache"] for line in lines] == turns((2, 1), 12, 1)
    real = Trainer.step

    def step(self, batch):
        if self.state.step == 7:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, None, tmp_path / "run")
    # A cache may have moved; it must be the same one.
    moved = tmp_path / "moved"
    two.paths[1].rename(moved)
    two.paths[1] = moved
    again = make_recipe(caches=shared(two, 2.0, 1.0), checkpoints={"every_steps": 2})
    train(again, None, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "run" / "last") == weights(tmp_path / "whole" / "last")
    record = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert len({one["corpus"] for one in record["caches"]}) == 2
    two.paths.reverse()
    other = make_recipe(caches=shared(two, 2.0, 1.0), checkpoints={"every_steps": 2})
    with pytest.raises(IdentityError, match=r"holds another run: cache\.caches\.0\.corpus is"):
        train(other, None, tmp_path / "run")


def test_one_cache_by_recipe_is_one_by_option(world, make_recipe, tmp_path):
    train(make_recipe(), world.cache, tmp_path / "option")
    train(make_recipe(caches=[{"path": str(world.cache)}]), None, tmp_path / "recipe")
    assert weights(tmp_path / "recipe" / "last") == weights(tmp_path / "option" / "last")


@pytest.mark.parametrize("given", ["both", "neither"])
def test_caches_are_given_in_one_way(world, make_recipe, tmp_path, given):
    both = given == "both"
    recipe = make_recipe(caches=[{"path": str(world.cache)}] if both else [])
    with pytest.raises(RecipeError, match="give one or the other"):
        train(recipe, world.cache if both else None, tmp_path / "run")


def test_passes_over_several_caches_have_no_common_end(make_recipe):
    caches = [{"path": "a"}, {"path": "b"}]
    with pytest.raises(RecipeError, match="max_epochs is 2 and caches has 2"):
        make_recipe(caches=caches, max_epochs=2)
    with pytest.raises(RecipeError, match=r"caches\.0\.weight"):
        make_recipe(caches=[{"path": "a", "weight": 0}])
