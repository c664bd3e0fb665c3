"""Every term of a recipe against a dense computation of the same from the student's own outputs.

# N target positions, B samples, V vocabulary
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.labels.coded_labels import entropy_nats
from kdcache.labels.decoding import decode
from kdcache.losses import (
    forward_kl,
    jensen_shannon_rows,
    logit_mse_rows,
    reverse_kl_rows,
    total_variation_rows,
)
from kdcache.models.passes import shift_right
from kdcache.recipe import parse_recipe
from kdcache.train.batches.stream import BatchStream
from kdcache.train.losses import divergences
from kdcache.train.losses.narrowing import narrowed
from kdcache.train.losses.objective import Objective
from kdcache.train.students.distillation import Distillation
from tests.report.kinds import VOCAB, make_kinds

SIZES = {
    "marian": {
        "d_model": 8,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 32,
        "decoder_start_token_id": 0,
    },
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2},
}
ROWS = {
    "reverse_kl": reverse_kl_rows,
    "jensen_shannon": jensen_shannon_rows,
    "total_variation": total_variation_rows,
    "logit_mse": logit_mse_rows,
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return make_kinds(tmp_path_factory.mktemp("kinds") / "cache")


@pytest.fixture(scope="module")
def cache(kinds):
    return open_cache(kinds.path)


def make_student(model_type="marian", rows=VOCAB, **more):
    torch.manual_seed(4)
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    keys = SIZES[model_type] | special | {"vocab_size": rows} | more
    config = AutoConfig.for_model(model_type, **keys)
    model = AutoModelForSeq2SeqLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(1, rows))
    return model


def make_terms(*terms, **train):
    tree = {"name": "test", "train": {"objective": list(terms), **train}}
    return parse_recipe(tree).train.objective


def distilled(cache, model, *terms, source="src", target="tgt"):
    objective = Objective(make_terms(*terms), cache.signals, source, target)
    return Distillation(model, objective, 1).double()


def global_batches(cache, module, accumulate=1):
    objective = module.objective
    streams = list(dict.fromkeys([objective.source, objective.target]))
    return list(
        BatchStream(
            *(cache, streams, objective.signals, 60, 1, 9),
            max_epochs=1,
            accumulate=accumulate,
            layers=module.layers,
            replicas="all",
        )
    )


def one_batch(cache, module):
    return max(global_batches(cache, module), key=lambda batch: len(batch.rows))


def plain(model, micro, source="src", target="tgt"):
    """The student's outputs over all padded positions, and its logits at tokens."""
    src, tgt = micro.streams[source], micro.streams[target]
    model.set_attn_implementation("eager")
    out = model(
        input_ids=src.ids,
        attention_mask=src.mask.long(),
        decoder_input_ids=shift_right(tgt.ids, 0, 0),
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    return out, out.logits[tgt.mask]


def both(cache, model, *terms, **sides):
    """Values and total of the module, and what an oracle needs."""
    module = distilled(cache, model, *terms, **sides)
    batch = one_batch(cache, module)
    (micro,) = batch.micro
    total, values = module(micro, batch.counts, module.objective.at(1, 10))
    return module, batch, micro, total, values


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["uniform", "bucket"])
def test_terms_over_ids_are_those_of_whole_logits(cache, model_type, temperature, tail):
    soft = {"signal": "targets", "temperature": temperature, "tail": tail}
    kinds = ["forward_kl", *ROWS]
    terms = [{"loss": "cross_entropy", "weight": 0.3, "label_smoothing": 0.1}]
    terms += [{"loss": kind, "weight": 0.2 + n, **soft} for n, kind in enumerate(kinds)]
    model = make_student(model_type)
    module, batch, micro, total, values = both(cache, model, *terms)
    learned = [one for one in model.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(total, learned, allow_unused=True)

    _, logits = plain(model, micro)
    labels, num = micro.streams["tgt"].flat, batch.num_tokens
    target = decode(micro.signals["targets"], temperature, tail)
    cross = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    log_probs = torch.log_softmax(logits / temperature, 1)
    listed = torch.zeros(num, VOCAB + 2, dtype=torch.bool)
    listed[target.rows, target.ids] = True
    # Ids that the teacher alone has: VOCAB and the one after it; their mass joins the tail.
    assert module.vocab_size == VOCAB
    expected = [cross]
    target = narrowed(target, VOCAB + 2, VOCAB, drawn=False)
    dense = torch.zeros(num, VOCAB, dtype=torch.float64)
    if target.uniform is not None:
        dense += target.uniform[:, None]
    dense.index_put_((target.rows, target.ids), target.values.double(), accumulate=True)
    kl = target.constant.double() - (dense * log_probs).sum(1)
    if target.bucket is not None:
        rest = log_probs.masked_fill(listed[:, :VOCAB], -torch.inf).logsumexp(1)
        kl = kl - target.bucket * rest
    expected.append(kl.mean())
    expected += [rows(logits, target, temperature).mean() for rows in ROWS.values()]
    torch.testing.assert_close(values, torch.stack(expected).detach(), rtol=1e-5, atol=1e-6)
    squared = [1, temperature**2, temperature**2, temperature**2, 1, 1]
    weights = [0.3, *(0.2 + n for n in range(len(kinds)))]
    whole = sum(w * s * e for w, s, e in zip(weights, squared, expected, strict=True))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    dense_gradients = torch.autograd.grad(whole, learned, allow_unused=True)
    for found, wanted in zip(gradients, dense_gradients, strict=True):
        if wanted is not None and wanted.abs().max() > 0:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def rows_of(values, counts, samples):
    """Rows of some samples, in their order."""
    ends = np.cumsum(counts)
    return np.concatenate([values[ends[m] - counts[m] : ends[m]] for m in samples])


@pytest.mark.parametrize("loss", ["hidden_mse", "hidden_cosine"])
def test_hidden_states_are_compared_token_by_token(kinds, cache, loss):
    pairs = [{"student": 0, "teacher": 0}, {"student": 2, "teacher": 1}]
    term = {"loss": loss, "signal": "hidden", "layers": pairs, "weight": 2.0}
    model = make_student()
    module, batch, micro, total, values = both(cache, model, term)
    out, _ = plain(model, micro)
    mask = micro.streams["src"].mask
    teacher = torch.from_numpy(rows_of(*kinds.dense["hidden"], batch.rows // 3)).double()
    projections = module.beside["0"].projections
    losses = []
    for n, pair in enumerate(pairs):
        own = out.encoder_hidden_states[pair["student"]][mask] @ projections[str(n)].weight.T
        theirs = teacher[:, pair["teacher"]]
        if loss == "hidden_mse":
            losses.append(torch.nn.functional.mse_loss(own, theirs))
        else:
            losses.append((1 - torch.nn.functional.cosine_similarity(own, theirs)).mean())
    expected = torch.stack(losses).mean()
    assert values.tolist() == pytest.approx([expected.item()], rel=0.02)  # bfloat16 teacher
    assert total.item() == pytest.approx(2 * values.item())
    total.backward()
    assert all(one.weight.grad.abs().sum() > 0 for one in projections.values())


def test_layers_of_the_teacher_are_fused(kinds, cache):
    pairs = [{"student": 1, "teacher": [1, 0]}, {"student": 2, "teacher": [0, 1, 2]}]
    term = {"loss": "hidden_mse", "signal": "hidden", "layers": pairs, "over_layers": "sum"}
    model = make_student()
    module, batch, micro, total, values = both(cache, model, term)
    out, _ = plain(model, micro)
    mask = micro.streams["src"].mask
    teacher = torch.from_numpy(rows_of(*kinds.dense["hidden"], batch.rows // 3)).double()
    expected = 0
    for n, pair in enumerate(pairs):
        fusion = module.beside["0"].fusions[str(n)]
        joined = torch.cat([teacher[:, layer] for layer in pair["teacher"]], 1)
        fused = joined @ fusion.weight.T + fusion.bias
        own = out.encoder_hidden_states[pair["student"]][mask]
        expected = expected + torch.nn.functional.mse_loss(own, fused)
    assert values.tolist() == pytest.approx([expected.item()], rel=0.02)  # bfloat16 teacher
    total.backward()
    fusions = module.beside["0"].fusions.values()
    assert all(one.weight.grad.abs().sum() > 0 < one.bias.grad.abs().sum() for one in fusions)
    assert model.get_encoder().layers[0].fc1.weight.grad.abs().sum() > 0


def test_attentions_are_compared_query_by_key(kinds, cache):
    model = make_student()
    term = {"loss": "attention_mse", "signal": "attention"}
    _, batch, micro, _, values = both(cache, model, term)
    out, _ = plain(model, micro)
    teacher, counts = kinds.dense["attention"]
    losses = []
    for place, m in enumerate(batch.rows // 3):
        length = math.isqrt(counts[m])
        theirs = rows_of(teacher, counts, [m]).reshape(length, length, 2, 2)
        for layer in range(2):
            own = out.encoder_attentions[layer][place, :, :length, :length]
            other = torch.from_numpy(theirs[:, :, layer].transpose(2, 0, 1).copy())
            losses.append(((own - other) ** 2).sum())
    expected = torch.stack(losses).sum() / (counts[batch.rows // 3].sum() * 2 * 2)
    assert values.tolist() == pytest.approx([expected.item()], rel=1e-3)  # float16 teacher


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_are_compared_for_samples_that_have_them(kinds, cache, weighted):
    """Weighted, by labels that are taken for those of the pairs."""
    model = make_student()
    term = {"loss": "score_mse", "signal": "nli"}
    by = {"by": "teacher_loss", "strength": 0.3, "centre": 2.5, "signal": "targets"}
    targets = cache.signals["targets"].model_copy(update={"source": "pair"})
    terms = make_terms(term | ({"sample_weight": by} if weighted else {}))
    objective = Objective(terms, {**cache.signals, "targets": targets}, "pair", "tgt")
    module = Distillation(model, objective, 1).double()
    batch = one_batch(cache, module)
    (micro,) = batch.micro
    total, values = module(micro, batch.counts, objective.at(1, 10))
    out, _ = plain(model, micro, source="pair")
    head, mask = module.beside["0"].head, micro.streams["pair"].mask
    scores = kinds.columns["nli"]["scores"]
    factors = [1.0] * len(batch.rows)
    if weighted:  # codes are even steps in the root of up to 25 nats
        nats = 25 * (micro.signals["targets"].gold.double() / 255) ** 2
        each = nats.split(micro.streams["tgt"].mask.sum(1).tolist())
        factors = [math.exp(-0.3 * (part.mean().item() - 2.5)) for part in each]
    losses = []
    for place, m in enumerate(batch.rows // 3):
        theirs = scores.fields["value"][scores.offsets[m] : scores.offsets[m + 1]]
        if len(theirs):
            own = head(out.encoder_last_hidden_state[place, mask[place]].mean(0))
            loss = torch.nn.functional.mse_loss(own, torch.from_numpy(theirs).double())
            losses.append(factors[place] * loss)
    assert 0 < len(losses) < len(batch.rows)
    assert values.tolist() == pytest.approx([torch.stack(losses).mean().item()], rel=1e-5)
    total.backward()
    assert head.weight.grad.abs().sum() > 0
    summed = Objective(make_terms(term | {"over_classes": "sum"}), cache.signals, "pair", "tgt")
    other = Distillation(model, summed, 1).double()
    _, sums = other(micro, batch.counts, summed.at(1, 10))
    if not weighted:
        assert sums.item() == pytest.approx(values.item() * head.out_features, rel=1e-5)


EVERY = [
    {"loss": "cross_entropy", "weight": 0.5},
    {"loss": "forward_kl", "signal": "targets"},
    {"loss": "jensen_shannon", "signal": "targets", "weight": 0.7},
    {"loss": "hidden_mse", "signal": "hidden", "weight": 0.3},
    {"loss": "attention_mse", "signal": "attention", "weight": 2.0},
]


def test_logits_that_are_no_plain_product_are_taken_whole(cache):
    model = make_student()
    expected = both(cache, model, *EVERY[:3])

    def capped(module, args, out):
        out.logits = 3.0 * torch.tanh(out.logits / 3.0)
        return out

    handle = model.register_forward_hook(capped)
    terms = [*EVERY[:3], {"loss": "total_variation", "signal": "targets"}]
    for chosen in (terms, terms[:2], terms[2:]):
        module, _, micro, total, values = both(cache, model, *chosen)
        _, logits = plain(model, micro)
        assert logits.abs().max() <= 3.0
        target = decode(micro.signals["targets"])
        target = narrowed(target, VOCAB + 2, VOCAB, drawn=True)
        whole = {
            "cross_entropy": torch.nn.functional.cross_entropy(logits, micro.streams["tgt"].flat),
            "forward_kl": forward_kl(logits, target),
            "jensen_shannon": jensen_shannon_rows(logits, target, 1.0).mean(),
            "total_variation": total_variation_rows(logits, target, 1.0).mean(),
        }
        found = dict(zip(module.objective.names, values.tolist(), strict=True))
        assert found == pytest.approx({name: whole[name].item() for name in found}, rel=1e-5)
        learned = [one for one in model.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(total, learned, allow_unused=True)
        weights = {term["loss"]: term.get("weight", 1.0) for term in chosen}
        mixed = sum(weights[name] * whole[name] for name in found)
        others = torch.autograd.grad(mixed, learned, allow_unused=True)
        for one, other in zip(gradients, others, strict=True):
            if other is not None and other.abs().max() > 0:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    handle.remove()
    torch.testing.assert_close(both(cache, model, *EVERY[:3])[4], expected[4])


def test_terms_that_walk_all_ids_may_be_compiled(cache, monkeypatch):
    seen = []

    def compiled(share):
        seen.append(share)
        return partial(divergences._id_sums, share)

    monkeypatch.setattr(divergences, "_compiled", compiled)
    model = make_student()
    names = ("jensen_shannon", "total_variation", "reverse_kl")
    terms = [{"loss": name, "signal": "targets", "tail": "uniform"} for name in names]
    expected = both(cache, model, *terms)[4]
    assert not seen
    found = both(cache, model, *(term | {"compiled": True} for term in terms))[4]
    assert len(set(seen)) == 3
    torch.testing.assert_close(found, expected)


def test_micro_batches_add_up_to_the_whole(cache):
    model = make_student()
    module = distilled(cache, model, *EVERY)
    moments = module.objective.at(1, 10)
    whole, cut = (global_batches(cache, module, parts) for parts in (1, 3))
    for one, other in zip(whole, cut, strict=True):
        sums = []
        for batch in (one, other):
            module.zero_grad()
            found = [module(micro, batch.counts, moments) for micro in batch.micro]
            sum(total for total, _ in found).backward()
            gradients = {
                n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None
            }
            sums.append((sum(values for _, values in found), gradients))
        torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(sums[0][1], sums[1][1], rtol=1e-6, atol=1e-8)


def test_a_term_counts_only_while_its_weight_does(cache):
    fading = {"shape": "linear", "final": 0.0, "first_step": 2, "last_step": 6}
    late = {"shape": "steps", "jumps": [{"step": 4, "value": 1.0}]}
    module = distilled(
        cache,
        make_student(),
        {"loss": "cross_entropy", "weight_schedule": fading},
        {"loss": "hidden_mse", "signal": "hidden", "weight": 0.0, "weight_schedule": late},
    )
    batch = one_batch(cache, module)
    (micro,) = batch.micro
    for step, cross, hidden in ((1, 1.0, 0.0), (3, 0.75, 0.0), (4, 0.5, 1.0), (7, 0.0, 1.0)):
        total, values = module(micro, batch.counts, module.objective.at(step, 10))
        assert (values > 0).tolist() == [cross > 0, hidden > 0]
        expected = cross * values[0] + hidden * values[1]
        torch.testing.assert_close(total.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "steps", "values"),
    [
        ("linear", (1, 5, 10), (3.6, 2.0, 0.0)),
        ("cosine", (1, 5, 10), (3.9021, 2.0, 0.0)),
    ],
)
def test_a_schedule_ends_with_the_run_where_nothing_else_is_said(cache, shape, steps, values):
    schedule = {"shape": shape, "final": 0.0}
    term = {"loss": "cross_entropy", "weight": 4.0, "weight_schedule": schedule}
    objective = Objective(make_terms(term), cache.signals, "src", "tgt")
    found = [objective.at(step, 10) for step in steps]
    weights = [moments[0].weight if moments else 0.0 for moments in found]
    assert weights == pytest.approx(values, abs=1e-4)


def test_the_temperature_may_move(cache):
    schedule = {"shape": "linear", "final": 1.0, "last_step": 3}
    soft = {"loss": "forward_kl", "signal": "targets", "tail": "uniform"}
    moving = {**soft, "temperature": 2.5, "temperature_schedule": schedule}
    model = make_student()
    found = both(cache, model, moving)
    module, batch, micro = found[:3]
    for step, temperature in ((1, 2.0), (2, 1.5), (3, 1.0)):
        fixed = both(cache, model, {**soft, "temperature": temperature})
        total, values = module(micro, batch.counts, module.objective.at(step, 10))
        torch.testing.assert_close((total, values), fixed[3:])


@pytest.mark.parametrize(("by", "strength"), [("teacher_loss", -0.3), ("teacher_entropy", 0.4)])
def test_samples_count_by_what_the_teacher_says_of_them(kinds, cache, by, strength):
    weight = {"by": by, "strength": strength, "centre": 2.5, "limit": 1.5}
    terms = [
        {"loss": "cross_entropy", "sample_weight": {**weight, "signal": "targets"}},
        {"loss": "forward_kl", "signal": "targets", "sample_weight": weight},
        {
            "loss": "hidden_mse",
            "signal": "hidden",
            "sample_weight": {**weight, "signal": "targets"},
        },
    ]
    model = make_student()
    module, batch, micro, _, values = both(cache, model, *terms)
    coded, lengths = micro.signals["targets"], micro.streams["tgt"].mask.sum(1).tolist()
    nats = entropy_nats(coded)
    if by == "teacher_loss":  # codes are even steps in the root of up to 25 nats
        nats = 25 * (coded.gold.double() / 255) ** 2
    means = [part.mean().item() for part in nats.split(lengths)]
    factors = [min(1.5, math.exp(-strength * (mean - 2.5))) for mean in means]
    assert len(set(factors)) > 2
    assert max(factors) == 1.5
    _, logits = plain(model, micro)
    labels = micro.streams["tgt"].flat
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").split(lengths)
    each = zip(factors, losses, strict=True)
    expected = sum(factor * part.sum() for factor, part in each) / batch.num_tokens
    assert values[0].item() == pytest.approx(expected.item(), rel=1e-5)
    hidden = torch.from_numpy(rows_of(*kinds.dense["hidden"], batch.rows // 3)).double()
    out, _ = plain(model, micro)
    mask, losses = micro.streams["src"].mask, []
    projections = module.beside["2"].projections
    for number, layer in enumerate(module.layers["hidden"]):
        own = out.encoder_hidden_states[layer][mask] @ projections[str(number)].weight.T
        losses.append((own - hidden[:, layer]).square().mean(1))
    rows = torch.stack(losses).mean(0).split(mask.sum(1).tolist())
    each = zip(factors, rows, strict=True)
    expected = sum(factor * part.sum() for factor, part in each) / batch.counts["hidden"]
    assert values[2].item() == pytest.approx(expected.item(), rel=0.02)  # bfloat16 teacher
    plainly = both(cache, model, {"loss": "forward_kl", "signal": "targets"})
    assert abs(plainly[4].item() - values[1].item()) > 1e-3


REFUSED = [
    ({"loss": "hidden_mse", "signal": "targets"}, "'targets' is logits; expected kind hidden"),
    ({"loss": "hidden_mse", "signal": "nowhere"}, "cache has no signal 'nowhere'"),
    ({"loss": "attention_mse", "signal": "hidden"}, "expected kind attention"),
    ({"loss": "score_mse", "signal": "hidden"}, "expected kind classes"),
    ({"loss": "score_mse", "signal": "augmented"}, "of masked inputs"),
    ({"loss": "reverse_kl", "signal": "targets"}, "needs a density outside the entries"),
    (
        {"loss": "cross_entropy", "sample_weight": {"by": "teacher_loss"}},
        "sample_weight.signal: is missing",
    ),
    (
        {"loss": "cross_entropy", "sample_weight": {"by": "teacher_loss", "signal": "hidden"}},
        "of kind hidden; it needs logits",
    ),
    (
        {
            "loss": "forward_kl",
            "signal": "targets",
            "temperature_schedule": {"shape": "linear", "final": 2.0},
        },
        "drawn entries serve some of the temperatures",
    ),
]


@pytest.mark.parametrize(("term", "message"), REFUSED)
def test_what_a_signal_cannot_serve_is_refused(cache, term, message):
    with pytest.raises(RecipeError, match=r"train\.objective\.0.*" + message):
        distilled(cache, make_student(), term)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"student": 3, "teacher": 1}], "student layer 3; the student has 0 to 2"),
        ([{"student": 1, "teacher": 7}], r"teacher layer 7; signal 'hidden' has \[0, 1, 2\]"),
        ([], "is empty"),
    ],
)
def test_layers_that_are_not_there_are_refused(cache, layers, message):
    with pytest.raises(RecipeError, match=r"train\.objective\.0\.layers: .*" + message):
        distilled(
            cache, make_student(), {"loss": "hidden_mse", "signal": "hidden", "layers": layers}
        )


def test_attentions_are_not_fused(cache):
    layers = [{"student": 1, "teacher": [1, 2]}]
    term = {"loss": "attention_mse", "signal": "attention", "layers": layers}
    with pytest.raises(RecipeError, match=r"fuses the attentions of \[1, 2\]; give one layer"):
        distilled(cache, make_student(), term)


def test_a_stream_that_the_student_does_not_read_is_refused(cache):
    with pytest.raises(IdentityError, match="describes stream 'src', the student's encoder reads"):
        distilled(cache, make_student(), {"loss": "hidden_mse", "signal": "hidden"}, source="pair")
    with pytest.raises(IdentityError, match="describes stream 'pair', the student's encoder reads"):
        distilled(cache, make_student(), {"loss": "score_mse", "signal": "nli"})


def test_other_heads_are_refused(cache):
    student = make_student(encoder_attention_heads=4)
    with pytest.raises(RecipeError, match="the teacher has 2 heads, the student 4"):
        distilled(cache, student, {"loss": "attention_mse", "signal": "attention"})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"weight_schedule": {"shape": "linear"}}, "shape linear needs final"),
        ({"weight_schedule": {"shape": "steps"}}, "needs jumps"),
        ({"weight_schedule": {"shape": "linear", "final": -1.0}}, "expected 0 or more"),
        (
            {"weight_schedule": {"shape": "cosine", "final": 1, "first_step": 9, "last_step": 9}},
            "last_step is 9, first_step 9",
        ),
        (
            {"weight_schedule": {"shape": "steps", "jumps": [{"step": 2, "value": 1}] * 2}},
            "ascending",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(tree, message):
    with pytest.raises(RecipeError, match=message):
        make_terms({"loss": "cross_entropy", **tree})
    if "linear" in str(tree) and "-1" in str(tree):
        soft = {"loss": "forward_kl", "temperature_schedule": tree["weight_schedule"]}
        with pytest.raises(RecipeError, match="expected > 0"):
            make_terms(soft)
