"""The gradient gate against two separate backward passes, module by module."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from kdcache.errors import RecipeError
from kdcache.formats.cache import open_cache
from kdcache.recipe import parse_recipe
from kdcache.train.families import encoder_decoder
from kdcache.train.runs.gate import Gate, encoder_modules
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.trainer import Trainer
from tests.report.kinds import make_kinds
from tests.train.conftest import STUDENT
from tests.train.many_ranks import Double

#: Of one term of every kind: over the vocabulary, masked tokens and layers.
TERMS = [
    {"loss": "cross_entropy", "weight": 0.5},
    {"loss": "forward_kl", "signal": "targets", "weight": 0.7},
    {"loss": "masked_kl", "signal": "mlm", "weight": 0.4},
    {"loss": "hidden_mse", "signal": "hidden", "weight": 0.2},
]
SIZES = ["parameter", "sublayer", "layer"]
GATED = [1, "masked_kl", 3]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return open_cache(make_kinds(tmp_path_factory.mktemp("kinds") / "cache").path)


def made(cache, monkeypatch, terms=TERMS, ranks=None, **more):
    """A trainer in float64, without dropout."""
    monkeypatch.setattr(encoder_decoder, "Distillation", Double)
    student = STUDENT | {"dropout": 0.0, "encoder_layers": 2} | more.pop("student", {})
    train = {
        "student": {"config": student},
        "objective": terms,
        "device": "cpu",
        "batch_tokens": 40,
        "accumulate": 3,
        "max_steps": 10,
    }
    section = parse_recipe({"name": "test", "train": train | more}).train
    return Trainer(section, cache, *([] if ranks is None else [ranks]))


def named_gradients(one):
    """Gradients by name, which are then cleared."""
    found = {n: p.grad for n, p in one.distillation.named_parameters() if p.grad is not None}
    one.optimizer.zero_grad(set_to_none=True)
    return found


def gradients(one, batch, numbers):
    """Those of some terms alone, by one backward pass over all micro-batches."""
    moments = [moment for moment in one.objective.at(1, 10) if moment.number in numbers]
    losses = [one.distillation(micro, batch.counts, moments) for micro in batch.micro]
    sum(total for total, _ in losses).backward()
    return named_gradients(one), sum(values for _, values in losses)


def module_name(name, size):
    """Which module a parameter of this Marian is in, by its name; None for what is not gated."""
    found = re.fullmatch(r"student\.model\.encoder\.(embed_tokens|layers\.\d)\.(.*)", name)
    if found is None:
        return None
    layer, rest = found.groups()
    if size == "parameter" or layer == "embed_tokens":
        return name
    return layer if size == "layer" else (layer, "attn" in rest)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("shared", "gated"), [(False, {1, 2, 3}), (True, {2, 3})])
def test_each_module_keeps_distillation_where_the_two_gradients_agree(
    cache, monkeypatch, size, shared, gated
):
    student = {"student": {"share_encoder_decoder_embeddings": shared}}
    gate = {"terms": GATED[-len(gated) :], "module": size}
    one = made(cache, monkeypatch, gate=gate, seed=3, **student)
    flags, seen = [], set()
    for batch, _ in zip(one.stream, range(8), strict=False):
        values = one.backward(batch)
        found = named_gradients(one)
        (rest, cross), (distilled, others) = (
            gradients(one, batch, n) for n in (set(range(4)) - gated, gated)
        )
        torch.testing.assert_close(values[1:], cross + others)
        weights = torch.tensor([0.5, 0.7, 0.4, 0.2])
        assert values[0].item() == pytest.approx((values[1:] * weights).sum().item())
        modules: dict = {}
        for name in found:
            modules.setdefault(module_name(name, size), []).append(name)
        mine = []
        for module, names in modules.items():
            pairs = [(rest.get(name), distilled.get(name)) for name in names]
            product = sum(float((a * b).sum()) for a, b in pairs if None not in (a, b))
            keep = module is None or product > 0
            mine += [] if module is None else [keep]
            seen.add(module)
            for name, (a, b) in zip(names, pairs, strict=True):
                expected = sum(one for one in (a, b if keep else None) if one is not None)
                torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-9, msg=name)
        assert one.gate.share.item() == pytest.approx(mine.count(False) / len(mine))
        flags += mine
    assert {True, False} <= set(flags)
    count = {"parameter": 2 * 16, "sublayer": 4, "layer": 2}[size] + (not shared)
    assert len(seen - {None}) == count


@pytest.mark.parametrize(
    ("model_type", "keys", "counts"),
    [
        ("t5", {"num_layers": 2, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2}, (5, 3)),
        ("bart", {"encoder_layers": 3, "d_model": 8, "encoder_ffn_dim": 16}, (8, 5)),
    ],
)
def test_modules_of_other_encoders(model_type, keys, counts):
    config = AutoConfig.for_model(model_type, vocab_size=9, pad_token_id=0, **keys)
    if model_type == "bart":
        config.encoder_attention_heads = config.decoder_attention_heads = 2
        config.decoder_layers, config.max_position_embeddings = 1, 8
    model = AutoModelForSeq2SeqLM.from_config(config)
    every = [id(p) for p in model.get_encoder().parameters() if p.requires_grad]
    every.remove(id(model.get_input_embeddings().weight))  # the decoder reads it too
    for size, count in zip(SIZES, (len(every), *counts), strict=True):
        modules = encoder_modules(model, size)
        assert len(modules) == count
        assert sorted(id(p) for module in modules for p in module) == sorted(every)


def test_where_nothing_else_counts_distillation_is_not_tested(cache, monkeypatch):
    late = {"shape": "steps", "jumps": [{"step": 2, "value": 1.0}]}
    terms = [{"loss": "cross_entropy", "weight": 0.0, "weight_schedule": late}, TERMS[3]]
    gated = made(cache, monkeypatch, terms, gate={"terms": [1], "module": "parameter"})
    plain = made(cache, monkeypatch, terms)
    batch = next(iter(gated.stream))
    for one in (gated, plain):
        one.backward(batch)
    torch.testing.assert_close(named_gradients(gated), named_gradients(plain))
    assert gated.gate.share == 0


def test_what_overflows_is_left_to_be_seen(cache, monkeypatch):
    one = made(cache, monkeypatch, gate={"terms": GATED, "module": "layer"})
    gate = one.gate
    gate.groups(one.objective.at(1, 10))
    for parameter in gate._gated:
        parameter.grad = torch.ones_like(parameter)
    gate._distilled = [-torch.ones_like(parameter) for parameter in gate._gated]
    gate._distilled[-1].view(-1)[0] = -torch.inf
    gate.close()
    assert torch.isinf(gate._gated[-1].grad).any()
    assert gate._gated[0].grad.eq(1).all()


@pytest.mark.parametrize(
    ("gate", "terms", "message"),
    [
        ([], TERMS, r"gate: terms is empty; name those"),
        ([4], TERMS, r"terms: 4 is no term of train\.objective, which has 0 cross_entropy, 1 forw"),
        ([-1], TERMS, r"terms: -1 is no term"),
        (["attention_mse"], TERMS, r"'attention_mse' is no term"),
        ([1], [TERMS[0], {**TERMS[1], "weight": 0}], r"terms: 1 names terms of weight 0"),
        ([0, 1], TERMS[:2], r"names all terms that have a weight; leave out"),
    ],
)
def test_a_gate_that_gates_nothing_is_refused(cache, monkeypatch, gate, terms, message):
    with pytest.raises(RecipeError, match=message) as caught:
        made(cache, monkeypatch, terms, gate={"terms": gate})
    assert "\n" not in str(caught.value)


def test_an_encoder_without_weights_of_its_own_has_nothing_to_gate(cache, monkeypatch):
    one = made(cache, monkeypatch, gate={"terms": GATED})
    one.model.get_encoder().requires_grad_(False)
    with pytest.raises(RecipeError, match=r"encoder has no weights of its own that are trained"):
        Gate(one.section, one.objective, one.distillation, one.model, Ranks())


def test_a_gate_needs_whole_gradients():
    section = SimpleNamespace(gate=SimpleNamespace(terms=[1]), parallel="fsdp")
    with pytest.raises(RecipeError, match=r"train\.gate: train\.parallel is fsdp.*set train\.para"):
        Gate(section, None, None, None, Ranks(0, 2))
