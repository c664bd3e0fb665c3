"""Students of some of a model's layers: each family against modules put together by hand."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from kdcache.errors import ModelError, RecipeError
from kdcache.recipe import StudentSection, parse_recipe
from kdcache.train.students.layer_copy import with_layers
from kdcache.train.students.student import build_student

SIDES = {"encoder_layers": 4, "decoder_layers": 3, "d_model": 8, "vocab_size": 20}
SIDES |= {f"{s}_attention_heads": 2 for s in ("encoder", "decoder")}
SIDES |= {f"{s}_ffn_dim": 16 for s in ("encoder", "decoder")}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
CONFIGS = {
    "marian": SIDES | {"max_position_embeddings": 32},
    "bart": SIDES | {"max_position_embeddings": 32},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 20}
    | {"num_layers": 4, "num_decoder_layers": 3},
}


def make(family):
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **(CONFIGS[family] | SPECIAL))
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's sinusoids are not saved
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def by_hand(model, family, encoder, decoder):
    """The model itself with its lists of layers cut, T5's shared positions put into the first."""
    for side, chosen in ((model.get_encoder(), encoder), (model.get_decoder(), decoder)):
        name = "block" if family == "t5" else "layers"
        layers = getattr(side, name)
        cut = torch.nn.ModuleList([layers[number - 1] for number in chosen])
        if family == "t5":
            attention = cut[0].layer[0].SelfAttention
            bias = layers[0].layer[0].SelfAttention.relative_attention_bias
            attention.relative_attention_bias, attention.has_relative_attention_bias = bias, True
            for later in cut[1:]:
                later.layer[0].SelfAttention.has_relative_attention_bias = False
        setattr(side, name, cut)
    return model


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("encoder", "decoder"), [([2, 4], [3]), ([1, 2, 3, 4], [2, 3])])
def test_the_layers_that_are_kept_compute_what_they_did(family, encoder, decoder, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "model")
    student = with_layers(model, encoder, None if len(decoder) == 3 else decoder).eval()
    src, tgt = torch.randint(3, 20, (2, 5)), torch.randint(3, 20, (2, 4))
    inputs = {"input_ids": src, "decoder_input_ids": tgt, "use_cache": False}
    expected = by_hand(model, family, encoder, decoder)(**inputs).logits
    torch.testing.assert_close(student(**inputs).logits, expected)
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    found = again.generate(src, num_beams=2, max_new_tokens=6)
    assert found.tolist() == student.generate(src, num_beams=2, max_new_tokens=6).tolist()
    section = StudentSection(
        path=str(tmp_path / "model"), layers={"encoder": encoder, "decoder": decoder}
    )
    built = build_student(section, None, 20, 1).eval()
    torch.testing.assert_close(built(**inputs).logits, expected)


NARROW = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 20}
NARROW |= {"intermediate_size": 16, "pad_token_id": 0, "num_key_value_heads": 2}
ALONE = {
    "bert": ("encoder", "bert.encoder.layer", NARROW),
    "distilbert": (
        "encoder",
        "distilbert.transformer.layer",
        {"dim": 8, "n_layers": 4, "n_heads": 2, "hidden_dim": 16, "vocab_size": 20},
    ),
    "gpt2": ("decoder", "transformer.h", {"n_embd": 8, "n_layer": 4, "n_head": 2}),
    "qwen2": (
        "decoder",
        "model.layers",
        NARROW | {"use_sliding_window": True, "max_window_layers": 2},
    ),
}


@pytest.mark.parametrize("family", ALONE)
def test_a_model_of_one_side_is_cut_too(family, tmp_path):
    side, place, sizes = ALONE[family]
    known = AutoConfig.for_model(family).to_dict()
    config = AutoConfig.for_model(family, **{key: sizes[key] for key in sizes if key in known})
    loader = AutoModelForSequenceClassification if side == "encoder" else AutoModelForCausalLM
    torch.manual_seed(3)
    model = loader.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "model")
    kind = "classifier" if side == "encoder" else "causal_lm"
    section = StudentSection(kind=kind, path=str(tmp_path / "model"), layers={side: [2, 4]})
    student = build_student(section, None, 20, 1).eval()
    student.save_pretrained(tmp_path / "student")
    again = loader.from_pretrained(tmp_path / "student").eval()
    assert again.config.num_hidden_layers == 2
    if family == "qwen2":
        assert again.config.layer_types == ["full_attention", "sliding_attention"]
    layers = model.get_submodule(place)
    kept = torch.nn.ModuleList([layers[1], layers[3]])
    model.set_submodule(place, kept)
    model.config.num_hidden_layers = 2
    ids = torch.randint(3, 20, (2, 5))
    keys = {} if side == "encoder" else {"use_cache": False}
    for one in (student, again):
        torch.testing.assert_close(one(ids, **keys).logits, model(ids, **keys).logits)
    other = "decoder" if side == "encoder" else "encoder"
    wrong = StudentSection(kind=kind, path=str(tmp_path / "model"), layers={other: [1]})
    with pytest.raises(ModelError, match=f"keeps its {other}'s layers where"):
        build_student(wrong, None, 20, 1)


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match=r"layers\.encoder: the model has no layer 5; its encoder"):
        with_layers(make("bart"), [1, 5], None)


def test_layers_go_with_a_path():
    tree = {"student": {"config": {"model_type": "t5"}, "layers": {"encoder": [1]}}}
    with pytest.raises(RecipeError, match="layers are those of a model at path"):
        parse_recipe({"name": "test", "train": tree})
