"""Students: their start, their special ids, and that what is written loads again."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from kdcache.errors import ModelError
from kdcache.formats.cache import open_cache
from kdcache.recipe import StudentSection
from kdcache.train.students.student import build_student, output_rows, save_student, student_logits

ROWS = 40
SMALL = {
    "marian": {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 32,
        "scale_embedding": True,
    },
    "t5": {"d_model": 64, "d_kv": 32, "num_heads": 2, "num_layers": 1, "d_ff": 96},
}
SMALL["bart"] = SMALL["marian"]
FAMILIES = ["marian", "t5", "bart"]


@pytest.fixture(scope="module")
def cache(world):
    return open_cache(world.cache)


def build(cache, family="marian", seed=1, init="glorot", rows=ROWS, **keys):
    section = StudentSection(config={"model_type": family} | SMALL[family] | keys, init=init)
    record = cache.tokenizer("teacher")
    return build_student(section, record, rows, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_initialisation_is_that_of_the_papers(cache, family):
    model = build(cache, family)
    embedding = model.get_input_embeddings()
    pad = embedding.padding_idx
    kept = [i for i in range(ROWS) if i != pad]
    assert embedding.weight[kept].std().item() == pytest.approx(64**-0.5, rel=0.1)
    if pad is not None:
        assert pad == cache.tokenizer("teacher").pad_id
        assert embedding.weight[pad].abs().max() == 0
    assert model.get_output_embeddings().weight is embedding.weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding.weight:
            bound = (6 / sum(module.weight.shape)) ** 0.5
            assert bound * 0.95 < module.weight.abs().max().item() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert module.bias is None or module.bias.abs().max() == 0
        elif "norm" in type(module).__name__.lower():
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name


def test_sinusoidal_positions_stay(cache):
    ours, theirs = build(cache), build(cache, init="transformers")
    name = "model.encoder.embed_positions.weight"
    assert torch.equal(ours.state_dict()[name], theirs.state_dict()[name])
    assert not torch.equal(
        ours.state_dict()["lm_head.weight"], theirs.state_dict()["lm_head.weight"]
    )


def test_untied_projections_are_matrices(cache):
    model = build(cache, tie_word_embeddings=False)
    weight = model.get_output_embeddings().weight
    assert weight is not model.get_input_embeddings().weight
    assert weight.abs().max().item() <= (6 / (64 + ROWS)) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_a_function_of_its_seed(cache, family):
    torch.manual_seed(0)
    one = build(cache, family).state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    same, other = build(cache, family).state_dict(), build(cache, family, seed=2).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "start"), [("marian", "pad_id"), ("t5", "pad_id"), ("bart", "eos_id")]
)
def test_special_ids_are_the_cache_tokenizers(cache, family, start):
    model, record = build(cache, family), cache.tokenizer("teacher")
    assert model.config.pad_token_id == record.pad_id
    assert model.config.eos_token_id == record.eos_id
    assert model.config.decoder_start_token_id == getattr(record, start)
    assert model.generation_config.decoder_start_token_id == getattr(record, start)
    assert model.generation_config.eos_token_id == record.eos_id
    assert model.generation_config.forced_eos_token_id in (record.eos_id, None)
    assert output_rows(model) == ROWS


@pytest.mark.parametrize("family", FAMILIES)
def test_only_label_positions_are_projected(cache, family):
    model = build(cache, family).eval()
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(4, 30, (3, 6), generator=generator)
    labels = torch.randint(4, 30, (3, 5), generator=generator)
    src_mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    label_mask = torch.arange(5) < torch.tensor([[1], [5], [3]])
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, out: shapes.append(tuple(out.shape))
    )
    with torch.no_grad():
        found = student_logits(model, src, src_mask, labels, label_mask)
        handle.remove()
        assert shapes == [(9, ROWS)]
        row = 0
        for b in range(3):  # one at a time, without any padding
            length = int(label_mask[b].sum())
            start = torch.tensor([[model.config.decoder_start_token_id]])
            expected = model(
                input_ids=src[b : b + 1, : int(src_mask[b].sum())],
                decoder_input_ids=torch.cat([start, labels[b : b + 1, : length - 1]], dim=1),
            ).logits[0]
            torch.testing.assert_close(found[row : row + length], expected, rtol=1e-4, atol=1e-5)
            row += length


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_loads_again(cache, family, tmp_path, world):
    model = build(cache, family).eval()
    files = [f for f in cache.tokenizer_dir("teacher").iterdir() if f.name != "tokens.json"]
    save_student(model, files, tmp_path)
    assert {file.name for file in files} < {file.name for file in tmp_path.iterdir()}
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    inputs = AutoTokenizer.from_pretrained(tmp_path)(
        world.src[:2], return_tensors="pt", padding=True
    )
    args = (inputs["input_ids"], inputs["attention_mask"].bool())
    labels, mask = args
    with torch.no_grad():
        torch.testing.assert_close(
            student_logits(model, *args, labels, mask), student_logits(again, *args, labels, mask)
        )
    record = cache.tokenizer("teacher")
    section = StudentSection(path=str(tmp_path))
    loaded = build_student(section, record, ROWS, 1)
    assert loaded.training


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"config": {"d_model": 8}}, "needs model_type"),
        ({"config": {"model_type": "marion"}}, "'marion': transformers knows no such model"),
        ({"config": {"model_type": "bert"}}, "bert"),
        ({"config": {"model_type": "marian", "layers": 2}}, "a marian config has no layers"),
        (
            {"config": {"model_type": "marian", "d_model": 10, "encoder_attention_heads": 3}},
            "marian",
        ),
        ({"path": "nowhere/at/all"}, "no transformers model there"),
    ],
    ids=["no type", "unknown type", "no encoder-decoder", "unknown key", "bad shape", "no path"],
)
def test_what_cannot_be_built_says_why(cache, section, message):
    record = cache.tokenizer("teacher")
    with pytest.raises(ModelError, match=message) as caught:
        build_student(StudentSection(**section), record, ROWS, 1)
    assert "\n" not in str(caught.value)


def test_a_model_without_projection_is_refused():
    assert output_rows(SimpleNamespace(get_output_embeddings=lambda: None)) == 0
