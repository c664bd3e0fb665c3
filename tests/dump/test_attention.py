import re

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import ModelError
from kdcache.formats import plan
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from tests.dump.descriptions import (
    SRC,
    Oracle,
    assert_stored,
    recipe_of,
    sides,
    stored,
    streams,
)
from tests.dump.test_hidden import with_embedding
from tests.dump.zoo import ARCHITECTURES


def signals_of(architecture: str) -> dict:
    """Every way to store attentions, for every side."""
    signals = {}
    for side in sides(architecture):
        where = {"kind": "attention", **streams(architecture, side)}
        signals[f"{side}_mean"] = where
        signals[f"{side}_heads"] = {**where, "heads": "all"}
        last = {"layers": [-1], "heads": "all", "values": "bfloat16"}
        signals[f"{side}_last"] = {**where, **last}
    return signals


def expected_of(record, attention: np.ndarray) -> np.ndarray:
    """[T * T, L, H] what a signal should hold of [T, T, n, H]."""
    chosen = attention[:, :, [layer - 1 for layer in record.layers]]
    chosen = chosen.reshape(-1, *chosen.shape[2:])
    return chosen.mean(-1, keepdims=True) if record.averaged else chosen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attentions_are_those_of_one_text_at_a_time(architecture, zoo, tmp_path, monkeypatch):
    directory = zoo(architecture)
    oracle = Oracle(architecture, directory)
    every = signals_of(architecture)
    first, *_ = every
    # Several parts a shard.
    monkeypatch.setattr(plan.plan_parts, "__defaults__", (oracle.half * 25,))
    for batch_tokens, signals in ((1, {first: every[first]}), (400, every)):
        out = tmp_path / f"cache{batch_tokens}"
        options = {"batch_tokens": batch_tokens, "shard_tokens": oracle.half}
        dump(recipe_of(tmp_path, directory, signals, **options), out)
        cache = open_cache(out)
        assert cache.num_shards == 2
        for name in signals:
            record = cache.signal(name)
            found = stored(out, name)
            assert len(found) == cache.num_samples
            for row, values in found.items():
                _, attention = oracle.describe(row)[record.side]
                assert_stored(values, expected_of(record, attention), record.values)
                check_mass(values, record)
    assert max(len(cache.dense_shard(name, 0).parts) for name in every) > 1
    assert verify_cache(out).faults == []


def check_mass(values: np.ndarray, record) -> None:
    """A query's probabilities add up to 1; a decoder gives none to what comes later."""
    length = int(np.sqrt(len(values)))
    square = values.reshape(length, length, *values.shape[1:])
    atol = 1e-3 if record.values == "float16" else 1e-2
    np.testing.assert_allclose(square.sum(1), 1, atol=atol)
    if record.side == "decoder":
        later = np.triu(np.ones((length, length), dtype=bool), 1)
        assert (square[later] == 0).all()


def test_heads_are_recorded(zoo, tmp_path):
    signals = {
        "mean": {"kind": "attention"},
        "heads": {"kind": "attention", "heads": "all"},
    }
    dump(recipe_of(tmp_path, zoo("bert"), signals), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    found = [(cache.signal(name).heads, cache.signal(name).averaged) for name in signals]
    assert found == [(1, True), (4, False)]


def test_a_model_without_heads_is_refused_before_anything_is_written(zoo, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 400}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained(
        tmp_path / "mamba"
    )
    AutoTokenizer.from_pretrained(zoo("gpt2")).save_pretrained(tmp_path / "mamba")
    signals = {"heed": {"kind": "attention", "side": "decoder"}}
    with pytest.raises(ModelError, match="gives no attentions; leave out the signal") as caught:
        dump(recipe_of(tmp_path, tmp_path / "mamba", signals), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_layer_is_refused_while_another_signal_has_the_model(zoo, tmp_path):
    signals = {"states": {"kind": "hidden"}, "heed": {"kind": "attention", "layers": [0]}}
    with pytest.raises(ModelError, match=r"signals.heed.layers has 0; .* expected 1 to 3"):
        dump(recipe_of(tmp_path, zoo("bert"), signals), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("heads", "words"), [("mean", "the mean over heads"), ("all", "head 0")])
def test_a_number_that_is_none_is_named(heads, words, zoo, tmp_path):
    number, tokenizer = with_embedding(zoo("gpt2"), tmp_path / "broken", "Ġdo", np.nan)
    rows = [row for row, line in enumerate(SRC) if number in tokenizer(line)["input_ids"]]
    signals = {"heed": {"kind": "attention", "side": "decoder", "heads": heads}}
    recipe = recipe_of(tmp_path, tmp_path / "broken", signals, batch_tokens=1)
    with pytest.raises(ModelError) as caught:
        dump(recipe, tmp_path / "cache")
    found = re.fullmatch(
        rf"signal 'heed', corpus rows (\d+) to \1: corpus row \1, layer 1: {words} at query "
        r"0, key 0 is nan, expected a finite number; check the teacher and its dtype",
        str(caught.value),
    )
    assert found
    assert int(found[1]) in rows
