import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import ModelError, RecipeError
from kdcache.formats import plan
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from tests.dump.descriptions import (
    SRC,
    Oracle,
    assert_stored,
    masked_inputs,
    recipe_of,
    sides,
    stored,
    streams,
)
from tests.dump.zoo import ARCHITECTURES, MASKED


def signals_of(architecture: str) -> dict:
    """Every way to store hidden states, for every side."""
    signals = {}
    for side in sides(architecture):
        where = {"kind": "hidden", **streams(architecture, side)}
        signals[f"{side}_all"] = where
        signals[f"{side}_ends"] = {**where, "layers": [-1, 0], "values": "int8"}
        signals[f"{side}_first"] = {**where, "layers": [1], "values": "bfloat16"}
        signals[f"{side}_mean"] = {**where, "pool": "mean"}
        if side == "encoder":
            signals[f"{side}_cls"] = {**where, "pool": "cls", "layers": [-1]}
    return signals


def expected_of(record, hidden: np.ndarray) -> np.ndarray:
    """[rows, L, D] what a signal should hold of [T, n + 1, D]."""
    chosen = hidden[:, list(record.layers)]
    return {"none": chosen, "cls": chosen[:1], "mean": chosen.mean(0, keepdims=True)}[record.pool]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_those_of_one_text_at_a_time(architecture, zoo, tmp_path, monkeypatch):
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
                hidden, _ = oracle.describe(row)[record.side]
                assert_stored(values, expected_of(record, hidden), record.values)
            if record.pool == "none":
                # Two tokens where a text stands between two.
                shortest = 2 if architecture in ("bart", "mbart", *MASKED) else 1
                assert min(len(values) for values in found.values()) == shortest
    assert max(len(cache.dense_shard(name, 0).parts) for name in every) > 1
    assert verify_cache(out).faults == []


@pytest.mark.parametrize("pool", ["none", "cls", "mean"])
def test_every_masking_of_a_sample_has_states(pool, zoo, tmp_path):
    signals = {
        "masks": {"kind": "masks", "stream": "src", "replicas": 3, "probability": 0.5},
        "states": {"kind": "hidden", "masks": "masks", "layers": [0, -1], "pool": pool},
    }
    options = {"streams": {"src": {"field": "src"}}, "shard_tokens": 50, "batch_tokens": 60}
    dump(recipe_of(tmp_path, zoo("bert"), signals, **options), tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").faults == []
    record = open_cache(tmp_path / "cache").signal("states")
    assert record.masks == "masks"
    model = Oracle("bert", zoo("bert")).model
    readings = masked_inputs(tmp_path / "cache", "src", "masks")
    different = 0
    for row, values in stored(tmp_path / "cache", "states").items():
        expected = []
        for ids in readings[row]:
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            hidden = torch.stack(out.hidden_states, dim=2)[0].numpy()
            expected.append(expected_of(record, hidden))
        assert_stored(values, np.concatenate(expected), record.values)
        different += readings[row][0] != readings[row][1]
    assert different > 5


def test_layers_are_those_of_the_recipe_in_order(zoo, tmp_path):
    signals = {
        "every": {"kind": "hidden"},
        "some": {"kind": "hidden", "layers": [-1, 1, -4]},
        "heed": {"kind": "attention"},
        "last": {"kind": "attention", "layers": [-1]},
    }
    dump(recipe_of(tmp_path, zoo("bert"), signals), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    found = {name: cache.signal(name).layers for name in signals}
    assert found == {
        "every": (0, 1, 2, 3),
        "some": (0, 1, 3),
        "heed": (1, 2, 3),
        "last": (3,),
    }


REFUSED = {
    "encoder of a causal model": ("gpt2", {"side": "encoder"}, "side is encoder; .*has decoder"),
    "decoder of a BERT": ("bert", {"side": "decoder"}, "side is decoder; .*has encoder"),
    "no source": ("t5", {"side": "decoder", "stream": "tgt"}, "set signals.h.source to a stream"),
    "source unread": (
        "gpt2",
        {"side": "decoder", "stream": "tgt", "source": "src"},
        "source is 'src', .*leave out source",
    ),
    "layer": ("bert", {"layers": [4]}, "layers has 4; the encoder of .* has 3 layers, so expected "
              "0 to 3, or -4 to -1"),
    "layer from the end": ("bert", {"layers": [-5]}, "layers has -5; .*or -4 to -1"),
    "layer twice": ("bert", {"layers": [3, -1]}, r"layers is \[3, -1\], which names a layer twice"),
    "attention layer 0": (
        "bert",
        {"kind": "attention", "layers": [0]},
        "layers has 0; .* expected 1 to 3, or -3 to -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_teacher_has_not_is_refused_before_anything_is_written(case, zoo, tmp_path):
    architecture, signal, message = REFUSED[case]
    signal = {"kind": "hidden", "stream": "src", **signal}
    with pytest.raises((ModelError, RecipeError), match=message) as caught:
        dump(recipe_of(tmp_path, zoo(architecture), {"h": signal}), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_an_ensemble_has_no_states(zoo, tmp_path):
    directory = str(zoo("bert"))
    teacher = {"path": [directory, directory], "device": "cpu"}
    recipe = recipe_of(tmp_path, directory, {"h": {"kind": "hidden"}}, teacher=teacher)
    with pytest.raises(ModelError, match="has no hidden signals"):
        dump(recipe, tmp_path / "cache")


@pytest.mark.parametrize("key", [{"pool": "cls"}, {"masks": "m"}])
def test_a_decoder_has_no_first_token_and_no_masks(key, tmp_path):
    signal = {"kind": "hidden", "side": "decoder", **key}
    with pytest.raises(RecipeError, match="goes with `side: encoder` alone"):
        recipe_of(tmp_path, "teacher", {"m": {"kind": "masks", "stream": "src"}, "h": signal})


def with_embedding(directory, folder, token: str, value: float):
    """A GPT-2 in which the second feature of one token is a number of one's own."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    number = tokenizer.convert_tokens_to_ids(token)
    with torch.no_grad():
        model.get_input_embeddings().weight[number, 1] = value
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return number, tokenizer


@pytest.mark.parametrize(("token", "batch_tokens"), [("Ġdo", 1), ("a", 4096)])
@pytest.mark.parametrize(
    ("value", "values"), [(np.nan, "float16"), (np.inf, "bfloat16"), (np.nan, "int8")]
)
def test_a_number_that_is_none_is_named(value, values, token, batch_tokens, zoo, tmp_path):
    number, tokenizer = with_embedding(zoo("gpt2"), tmp_path / "broken", token, value)
    texts = [tokenizer(line)["input_ids"] for line in SRC]
    first = {row: ids.index(number) for row, ids in enumerate(texts) if number in ids}
    signals = {"states": {"kind": "hidden", "side": "decoder", "values": values}}
    recipe = recipe_of(tmp_path, tmp_path / "broken", signals, batch_tokens=batch_tokens)
    with pytest.raises(ModelError) as caught:
        dump(recipe, tmp_path / "cache")
    found = re.fullmatch(
        r"signal 'states', corpus rows \d+ to \d+: corpus row (\d+), layer 0: feature 1 at "
        r"position (\d+) is (nan|inf), expected a finite number; check the teacher and its dtype",
        str(caught.value),
    )
    assert found
    assert int(found[2]) == first[int(found[1])]


def test_what_float16_does_not_hold_is_refused(zoo, tmp_path):
    with_embedding(zoo("gpt2"), tmp_path / "large", "Ġdo", 70000.0)
    states = {"kind": "hidden", "side": "decoder", "layers": [0]}
    recipe = recipe_of(tmp_path, tmp_path / "large", {"states": states})
    message = r"position \d+ is 7\d{4}.*, more than float16 holds \(65504\); set values: bfloat16"
    with pytest.raises(ModelError, match=message):
        dump(recipe, tmp_path / "cache")
    wide = recipe_of(tmp_path, tmp_path / "large", {"states": {**states, "values": "bfloat16"}})
    dump(wide, tmp_path / "other")
    largest = max(values.max() for values in stored(tmp_path / "other", "states").values())
    assert largest == pytest.approx(70000, rel=0.01)


def train_briefly(directory, folder, lines) -> None:
    """A GPT-2 that has learned some lines, so that its states are not those of random weights."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(directory).train()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in texts], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_int8_is_within_one_percent_of_every_layer(zoo, world, tmp_path):
    train_briefly(zoo("gpt2"), tmp_path / "trained", world.src[:20])
    signals = {"states": {"kind": "hidden", "side": "decoder", "values": "int8"}}
    dump(recipe_of(tmp_path, tmp_path / "trained", signals), tmp_path / "cache")
    oracle = Oracle("gpt2", tmp_path / "trained")
    found = stored(tmp_path / "cache", "states")
    truth = np.concatenate([oracle.describe(row)["decoder"][0] for row in found])
    error = np.concatenate(list(found.values())) - truth
    relative = np.sqrt((error**2).mean((0, 2)) / (truth**2).mean((0, 2)))  # [L]
    assert len(relative) == 3
    assert (relative > 0.001).all()
    assert (relative < 0.01).all()
