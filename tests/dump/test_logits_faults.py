"""Soft labels of teachers that cannot give them, or that say what is no distribution."""

import json
import re

import numpy as np
import pytest
import torch

from kdcache import cli
from kdcache.dump.runner import dump
from kdcache.dump.signals import logits as logits_module
from kdcache.errors import ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.schema import join_ids
from tests.dump.descriptions import recipe_of
from tests.dump.logits_oracle import (
    SIGNALS,
    Model,
    assert_labels,
    columns_of,
    labels_of,
    maskings_of,
    streams_of,
)

FULL = SIGNALS["whole"]["codec"]
MASKS = {"kind": "masks", "stream": "src", "probability": 0.5, "replicas": 2}


def signals_of(at: str, codecs: dict[str, dict] | None = None) -> dict:
    """A signal at some kind of position for every codec, and the masks that it needs."""
    more = {"stream": "tgt" if at == "targets" else "src"}
    signals = {}
    if at in ("masked", "segment"):
        signals["masks"] = {**MASKS, "scheme": "segment" if at == "segment" else "bert"}
        more["masks"] = "masks"
    for name, codec in (codecs or {"labels": FULL}).items():
        signals[name] = {"kind": "logits", "at": at, "codec": codec, **more}
    return signals


WRONG = [
    ("targets", "gpt2", "lm", "causal_lm, which labels positions"),
    ("targets", "bert", "lm", "masked_lm, which labels masked"),
    ("positions", "bert", "lm", "masked_lm, which labels masked"),
    ("positions", "t5", "lm", "encoder_decoder, which labels targets, segment, segment_in_place"),
    ("masked", "llama", "lm", "causal_lm, which labels positions"),
    ("masked", "bart", "lm", "encoder_decoder, which labels targets, segment, segment_in_place"),
    ("segment", "bert", "lm", "masked_lm, which labels masked"),
    ("segment", "qwen2", "lm", "causal_lm, which labels positions"),
    ("masked", "bert", "classifier", "classifier, which labels nothing"),
    ("positions", "gpt2", "classifier", "classifier, which labels nothing"),
    ("targets", "t5", "encoder", "encoder, which labels nothing"),
]


@pytest.mark.parametrize(("at", "architecture", "head", "found"), WRONG)
def test_a_teacher_of_the_wrong_kind(at, architecture, head, found, zoo, tmp_path):
    # Masks come before the labels, so the stream's tokenizer must be one that can mask.
    tokenizers = {"teacher": {"kind": "pretrained", "path": str(zoo("roberta"))}}
    directory = zoo(architecture, head)
    recipe = recipe_of(tmp_path, directory, signals_of(at), tokenizers=tokenizers)
    with pytest.raises(ModelError) as error:
        dump(recipe, tmp_path / "cache")
    assert str(error.value) == (
        f"signals.labels: {directory} is of kind {found}; found at: {at}; choose another teacher "
        "or another `at`"
    )
    assert not (tmp_path / "cache").exists()


def test_a_segment_needs_a_mask_token(zoo, tmp_path):
    recipe = recipe_of(tmp_path, zoo("t5"), signals_of("segment"))
    with pytest.raises(ModelError, match=r"t5-lm\) of stream 'src' has no mask token; ") as error:
        dump(recipe, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


FOREIGN = {
    "another stream": (
        {"masks": {**MASKS, "stream": "tgt"}},
        "labels.masks is 'masks', of kind masks over stream 'tgt'; expected kind masks over 'src'",
    ),
    "another kind": (
        {"masks": {"kind": "hidden", "stream": "src"}},
        "labels.masks is 'masks', of kind hidden over stream 'src'; expected kind masks over 'src'",
    ),
    "none": ({}, "labels.masks is 'masks', which neither the recipe nor the cache has"),
}


@pytest.mark.parametrize("standing", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("case", FOREIGN)
def test_masks_of_something_else(case, standing, zoo, tmp_path):
    others, message = FOREIGN[case]
    labels = {"labels": signals_of("masked")["labels"]}
    if standing:
        dump(recipe_of(tmp_path, zoo("bert"), others), tmp_path / "cache")
    given = labels if standing else others | labels
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        dump(recipe_of(tmp_path, zoo("bert"), given), tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert (tmp_path / "cache").exists() == standing
    assert not standing or "labels" not in open_cache(tmp_path / "cache").signals


def broken(zoo, folder, architecture: str, change) -> Model:
    """A zoo model after some change to it, saved in a folder."""
    model = Model(architecture, zoo(architecture))
    with torch.no_grad():
        change(model.model)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return model


def refused(recipe, out) -> tuple[int, int, int]:
    """Row, replica (0 without any) and position that the one line names."""
    with pytest.raises(ModelError) as error:
        dump(recipe, out)
    found = re.fullmatch(
        r"signal 'labels', corpus rows \d+ to \d+: corpus row (\d+)(?:, replica (\d))?, position "
        r"(\d+): the teacher's logits have a NaN, .* try dump.teacher.dtype "
        r"float32",
        str(error.value),
    )
    assert found, str(error.value)
    assert open_cache(out).committed("labels") == set()
    return int(found[1]), int(found[2] or 0), int(found[3])


def not_a_number(name: str, row: int):
    """A change: one row of a weight is nothing but NaN."""
    return lambda model: model.get_parameter(name)[row].fill_(np.nan)


def overflow(up: str, down: str, neuron: int):
    """A change: a neuron of the last layer that, wherever it fires, is more than float32 holds."""

    def change(model):
        model.get_parameter(f"{up}.weight")[neuron] *= 1e30
        model.get_parameter(f"{down}.weight")[:, neuron] *= 1e12

    return change


LAYERS = {
    "llama": ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"),
    "bert": ("bert.encoder.layer.2.intermediate.dense", "bert.encoder.layer.2.output.dense"),
    "bart": ("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"),
}
#: `at`, a teacher, what is broken in it, and whether labels before the one that is named are well.
BROKEN = {
    "positions, a token": ("positions", "llama", not_a_number("model.embed_tokens.weight", 75), 0),
    "positions": ("positions", "llama", overflow(*LAYERS["llama"], 17), 1),
    "masked, a position": (
        "masked",
        "bert",
        not_a_number("bert.embeddings.position_embeddings.weight", 9),
        0,
    ),
    "masked": ("masked", "bert", overflow(*LAYERS["bert"], 9), 1),
    "targets, a position": (
        "targets",
        "bart",
        not_a_number("model.decoder.embed_positions.weight", 8),
        0,
    ),
    "targets": ("targets", "bart", overflow(*LAYERS["bart"], 31), 1),
    "targets, a later sample": ("targets", "bart", overflow(*LAYERS["bart"], 28), 0),
    "segment": ("segment", "bart", overflow(*LAYERS["bart"], 20), 1),
}


@pytest.mark.parametrize(
    ("batch_tokens", "entries"), [(1, 1 << 22), (4096, 1 << 22), (4096, 1)], ids=str
)
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_a_number_is_named(case, batch_tokens, entries, zoo, tmp_path, monkeypatch):
    """In batches of one sample, of many, and with pieces of a label each."""
    monkeypatch.setattr(logits_module, "PIECE_ENTRIES_CPU", entries)
    at, architecture, change, well_before = BROKEN[case]
    model = broken(zoo, tmp_path / "broken", architecture, change)
    path = tmp_path / "cache"
    named = refused(
        recipe_of(tmp_path, tmp_path / "broken", signals_of(at), batch_tokens=batch_tokens), path
    )
    places, said = labels_of(path, at, model)
    row, replica, _ = named
    every = [(row, r, p) for r, one in enumerate(places[row]) for p, _ in one]
    if at == "positions":  # what is no number reaches the tokens before it too: 0 x NaN
        said[row] = model.log_probs(input_ids=streams_of(path, "src")[row])[:-1]
    if at == "segment":  # what is named is where the token stands in the text
        masked = maskings_of(path, "masks")[row]
        every = [(row, r, p) for r, one in enumerate(masked) for p in one.positions]
    bad = [place for place, one in zip(every, np.isnan(said[row]).any(-1), strict=True) if one]
    assert named == next(place for place in bad if place[1] == replica)
    assert well_before == (named > next(place for place in every if place[1] == replica))


def test_plus_infinity_is_refused_too(zoo, tmp_path):
    def change(model):
        model.get_output_embeddings().bias[7] = np.inf

    broken(zoo, tmp_path / "inf", "bert", change)
    recipe = recipe_of(tmp_path, tmp_path / "inf", signals_of("masked"))
    row, replica, position = refused(recipe, tmp_path / "cache")
    assert position == maskings_of(tmp_path / "cache", "masks")[row][replica].positions[0]


def forbid_bias(model, token: int) -> None:
    """An id that cannot come, of BERT or BART."""
    bias = getattr(model, "final_logits_bias", None)
    (model.get_output_embeddings().bias if bias is None else bias[0])[token] = -np.inf


def forbid_feature(model, token: int) -> None:
    """An id that cannot come, of GPT-2: its last norm says one, its projection minus infinity."""
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone())
    model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, 1
    head.weight[token, 0] = -np.inf


IMPOSSIBLE = {
    "targets": ("bart", "wird", forbid_bias),
    "positions": ("gpt2", "the", forbid_feature),
    "masked": ("bert", "the", forbid_bias),
    "segment": ("bart", "the", forbid_bias),
}
EVERY = {"name": "topk", "k": 1000, "values": "float32"}
CODECS = {**{name: signal["codec"] for name, signal in SIGNALS.items()}, "every": EVERY}


@pytest.mark.parametrize("at", IMPOSSIBLE)
def test_minus_infinity_is_a_probability_of_zero(at, zoo, tmp_path, capsys):
    architecture, word, forbid = IMPOSSIBLE[at]
    ids = Model(architecture, zoo(architecture)).tokenizer(word)["input_ids"]
    token = ids[0 if at == "positions" else 1]  # after BERT's and BART's begin token
    model = broken(zoo, tmp_path / "less", architecture, lambda m: forbid(m, token))
    path = tmp_path / "cache"
    dump(recipe_of(tmp_path, tmp_path / "less", signals_of(at, CODECS)), path)
    assert verify_cache(path).faults == []
    places, said = labels_of(path, at, model)
    for name in CODECS:
        assert_labels(path, name, places, said)
    size = open_cache(path).signal("whole").vocab_size
    golds = 0
    for row, columns in columns_of(path, "whole").items():
        codes = columns["exact"]["code"].reshape(-1, size)
        assert np.isneginf(codes[:, token]).all()
        assert np.isneginf(codes).sum() == len(codes)
        every = columns_of(path, "every")[row]
        assert np.isneginf(every["exact"]["code"][join_ids(every["exact"]) == token]).all()
        soft = columns_of(path, "soft")[row]
        assert token not in [*join_ids(soft["exact"]), *join_ids(soft["drawn"])]
        here = [known for replica in places[row] for _, known in replica]
        golds += here.count(token)
        assert (columns["tokens"]["gold"][np.array(here, dtype=int) == token] == 255).all()
    assert golds > 5
    assert cli.main(["audit", str(path), "--fraction", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["signals"]["whole"]["truncation"]["lost_kl_nats"] == pytest.approx(0, abs=1e-5)
