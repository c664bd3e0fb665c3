"""Terms over hypotheses against a pass of their own for every sample and target.

# M samples, N target tokens of all of them, V vocabulary
"""

import pytest
import sacrebleu
import torch

from kdcache.compile import CompileOptions, compile_caches
from kdcache.compile.options import parse_targets
from kdcache.dump.runner import dump
from kdcache.errors import IdentityError, ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.schema import join_ids
from kdcache.labels.coded_labels import entropy_nats
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import parse_recipe
from kdcache.train.batches.batch import Hypotheses
from kdcache.train.batches.hypotheses import with_hypotheses
from kdcache.train.losses.label_signals import check_beams_signal
from kdcache.train.losses.objective import Objective
from kdcache.train.runs.canary import check_batch
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students.distillation import Distillation
from tests.report.kinds import VOCAB, hypotheses_of, make_kinds
from tests.train.test_distillation import global_batches, make_student, make_terms

ROWS = VOCAB + 2  # as many as the teacher has
REFERENCE = {"loss": "cross_entropy", "weight": 0.34}
BEST = {"loss": "cross_entropy", "weight": 0.66, "hypotheses": "beams"}
SECOND = BEST | {"hypothesis": 1, "label_smoothing": 0.1}
UNION = {"loss": "forward_kl", "weight": 0.7, "signal": ["targets", "best"], "tail": "uniform"}
OF_SECOND = UNION | {"signal": "best", "temperature": 2.0}
COMBINATIONS = {
    "sequence level": [BEST],
    "interpolation": [REFERENCE, BEST],
    "hybrid": [REFERENCE, SECOND, UNION],
    "word level on both": [UNION],
    "two hypotheses": [BEST, SECOND, OF_SECOND],
    "divergence on both": [REFERENCE, UNION | {"loss": "jensen_shannon"}],
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return make_kinds(tmp_path_factory.mktemp("hypotheses") / "cache")


@pytest.fixture(scope="module")
def cache(kinds):
    return open_cache(kinds.path)


def distilled(cache, model, terms):
    return Distillation(
        model, Objective(make_terms(*terms), cache.signals, "src", "tgt"), 1
    ).double()


def computed(module, batch):
    """Total, values and gradients of a global batch, its micro-batches one after another."""
    objective, model = module.objective, module.student
    model.zero_grad()
    totals, values = [], []
    for micro in batch.micro:
        micro = with_hypotheses(micro, objective.hypotheses, None)
        total, found = module(micro, batch.counts, objective.at(1, 10))
        total.backward()
        totals.append(total.detach())
        values.append(found)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return sum(totals), sum(values), gradients


def log_probs_of(model, kinds, samples, targets):
    """[N, V] of one pass for each sample alone, without padding."""
    rows = []
    for m in samples:
        start = model.config.decoder_start_token_id
        given = torch.tensor([[start, *targets[m][:-1]]])
        rows.append(model(input_ids=torch.tensor([kinds.ids["src"][m]]), decoder_input_ids=given))
    return torch.cat([row.logits[0] for row in rows])


def oracle(model, kinds, terms, samples, labels):
    """Weighted total and values of the terms, each a mean over all of its tokens."""
    lists = {None: kinds.ids["tgt"]}
    lists |= {n: [both[n] for both in hypotheses_of(kinds)] for n in (0, 1)}
    logits = {which: log_probs_of(model, kinds, samples, ids) for which, ids in lists.items()}
    total, values = 0, []
    for term in terms:
        temperature = term.get("temperature", 1.0)
        if term["loss"] == "cross_entropy":
            which = term.get("hypothesis", 0) if "hypotheses" in term else None
            ids = torch.tensor([i for m in samples for i in lists[which][m]])
            smoothing = term.get("label_smoothing", 0.0)
            value = torch.nn.functional.cross_entropy(logits[which], ids, label_smoothing=smoothing)
        else:
            names = term["signal"] if isinstance(term["signal"], list) else [term["signal"]]
            places = {"targets": None, "best": 1}
            q = torch.cat([logits[places[n]] for n in names]) / temperature
            q = q.log_softmax(1)
            p = torch.cat([densify(decode(labels[n], temperature, "uniform"), ROWS) for n in names])
            p = p.double()
            if term["loss"] == "forward_kl":
                value = torch.nn.functional.kl_div(q, p, reduction="batchmean")
            else:
                middle = ((p + q.exp()) / 2).log()
                value = (
                    torch.nn.functional.kl_div(middle, p, reduction="batchmean")
                    + torch.nn.functional.kl_div(middle, q, reduction="batchmean", log_target=True)
                ) / 2
        total = total + term["weight"] * temperature**2 * value
        values.append(value.detach())
    return total, torch.stack(values)


@pytest.mark.parametrize("model_type", ["marian", "t5"])
@pytest.mark.parametrize("terms", COMBINATIONS.values(), ids=COMBINATIONS)
def test_losses_and_gradients_are_those_of_passes_of_their_own(kinds, cache, terms, model_type):
    model = make_student(model_type, rows=ROWS, dropout=0.0)
    module = distilled(cache, model, terms)
    (batch,) = global_batches(cache, module)[:1]
    (micro,) = batch.micro
    samples = (batch.rows // 3).tolist()
    assert len(samples) > 2
    total, values, gradients = computed(module, batch)

    model.zero_grad()
    expected, expected_values = oracle(model, kinds, terms, samples, micro.signals)
    torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-5, atol=1e-6)
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)

    # However the batch is cut, denominators are those of the whole.
    (cut,) = global_batches(cache, module, accumulate=3)[:1]
    assert len(cut.micro) == 3
    cut_total, cut_values, cut_gradients = computed(module, cut)
    torch.testing.assert_close(cut_values, values, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(cut_total, total, rtol=1e-7, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-6, atol=1e-9)


def test_what_a_teacher_finds_hard_counts_less_in_each_part(cache):
    weight = {"by": "teacher_entropy", "strength": 0.5, "centre": 0.2}
    module = distilled(
        cache,
        make_student(rows=ROWS),
        [UNION | {"sample_weight": weight}, BEST | {"sample_weight": weight | {"signal": "best"}}],
    )
    (batch,) = global_batches(cache, module)[:1]
    _, values, _ = computed(module, batch)
    micro = with_hypotheses(batch.micro[0], module.objective.hypotheses, None)
    source = micro.streams["src"]
    factors, sums, tokens = {}, 0.0, 0
    for signal, stream in (("targets", "tgt"), ("best", "beams.1")):
        target = micro.streams[stream]
        nats = entropy_nats(micro.signals[signal])
        pieces = nats.split(target.mask.sum(1).tolist())
        factors[signal] = [min(4.0, float(torch.exp(-0.5 * (x.mean() - 0.2)))) for x in pieces]
        losses = rows_of_kl(module.student, source, target, micro.signals[signal])
        parts = losses.split(target.mask.sum(1).tolist())
        sums += sum(f * p.sum().item() for f, p in zip(factors[signal], parts, strict=True))
        tokens += len(losses)
    assert values[0].item() == pytest.approx(sums / tokens, rel=1e-5)
    best = micro.streams["beams.0"]
    logits = logits_of(module.student, source, best)
    cross = torch.nn.functional.cross_entropy(logits, best.flat, reduction="none")
    pieces = cross.split(best.mask.sum(1).tolist())
    sums = sum(f * p.sum().item() for f, p in zip(factors["best"], pieces, strict=True))
    assert values[1].item() == pytest.approx(sums / len(cross), rel=1e-5)


def logits_of(model, source, target):
    """[N, V] at the tokens of padded targets."""
    given = torch.cat([torch.zeros_like(target.ids[:, :1]), target.ids[:, :-1]], 1)
    mask = source.mask.long()
    out = model(input_ids=source.ids, attention_mask=mask, decoder_input_ids=given)
    return out.logits[target.mask]


def rows_of_kl(model, source, target, coded):
    """[N] KL of labels with a uniform tail."""
    p = densify(decode(coded, 1.0, "uniform"), ROWS).double()
    q = logits_of(model, source, target).log_softmax(1)
    return torch.nn.functional.kl_div(q, p, reduction="none").sum(1)


@pytest.mark.parametrize(
    ("terms", "decoder_runs", "signals"),
    [
        ([BEST], 1, {"beams"}),
        ([REFERENCE, BEST | {"weight": 0.0}, UNION | {"weight": 0.0}], 1, set()),
        ([REFERENCE, BEST], 2, {"beams"}),
        ([REFERENCE, SECOND, UNION], 2, {"beams", "best", "targets"}),
        ([BEST, {"loss": "hidden_mse", "signal": "hidden"}], 1, {"beams", "hidden"}),
    ],
    ids=["sequence level", "weight zero", "mix", "hybrid", "encoder states beside"],
)
def test_nothing_runs_that_is_not_needed(cache, terms, decoder_runs, signals):
    model = make_student(rows=ROWS)
    module = distilled(cache, model, terms)
    assert set(module.objective.signals) == signals
    assert bool(module.objective.hypotheses) == ("beams" in signals)
    runs = {"encoder": 0, "decoder": 0}

    def counting(side):
        def count(*_):
            runs[side] += 1

        return count

    for side in runs:
        getattr(model.model, side).register_forward_hook(counting(side))
    (batch,) = global_batches(cache, module)[:1]
    computed(module, batch)
    assert runs == {"encoder": 1, "decoder": decoder_runs}


def test_one_hypothesis_of_each_sample_becomes_a_stream():
    hypotheses = Hypotheses(
        ids=torch.tensor([5, 6, 2, 7, 2, 2, 8, 2]),
        lengths=torch.tensor([3, 2, 1, 2]),
        log_probs=torch.zeros(4),
        counts=torch.tensor([2, 1, 1]),
    )
    best, second = hypotheses.tokens(), hypotheses.tokens(1)
    assert best.ids.tolist() == [[5, 6, 2], [2, 0, 0], [8, 2, 0]]
    assert best.flat.tolist() == [5, 6, 2, 2, 8, 2]
    assert second.ids.tolist() == [[7, 2], [0, 0], [0, 0]]
    assert second.mask.tolist() == [[True, True], [False, False], [False, False]]
    none = hypotheses.tokens(2)
    assert none.ids.shape == (3, 1)
    assert not none.mask.any()


def test_samples_without_the_hypothesis_count_nothing(cache):
    module = distilled(cache, make_student(rows=ROWS), [REFERENCE, SECOND])
    (batch,) = global_batches(cache, module)[:1]
    (micro,) = batch.micro
    beams = micro.signals["beams"]
    first = beams.lengths[::2]
    ids = torch.cat(beams.ids.split(beams.lengths.tolist())[::2])
    alone = Hypotheses(ids, first, beams.log_probs[::2], torch.ones_like(beams.counts))
    micro.signals["beams"] = alone
    total, values, gradients = computed(module, batch)
    assert values[1] == 0
    assert total == pytest.approx(0.34 * values[0].item())
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    ("term", "sides", "kind", "message"),
    [
        (
            {"loss": "cross_entropy", "hypotheses": "nbest"},
            "src tgt",
            RecipeError,
            r"train\.objective\.0\.hypotheses: cache has no signal 'nbest'; hypotheses are a "
            r"signal of kind beams, of which the cache has \['beams'\]; name one of those",
        ),
        (
            {"loss": "cross_entropy", "hypotheses": "targets"},
            "src tgt",
            RecipeError,
            r"hypotheses: 'targets' is logits at targets; hypotheses are a signal of kind be",
        ),
        (
            BEST | {"hypothesis": 2},
            "src tgt",
            RecipeError,
            r"hypothesis 2 of signal 'beams', which keeps 2 .* dump with num_hypotheses 3$",
        ),
        (
            {"loss": "forward_kl", "signal": ["targets", "every"]},
            "src tgt",
            RecipeError,
            r"0\.signal: 'every' is logits of all hypotheses \(beams\); forward_kl needs .* of one "
            r"hypothesis, of which the cache has \['best', 'targets'\]; dump .*hypothesis 0",
        ),
        (
            {"loss": "forward_kl", "signal": ["targets", "more"]},
            "src tgt",
            RecipeError,
            r"cache has no signal 'more'",
        ),
        (BEST, "src chat", IdentityError, "'beams' is written in stream 'tgt', the student uses "),
        (BEST, "tgt tgt", IdentityError, "'beams' was made from source stream 'src', the student"),
    ],
)
def test_what_the_cache_lacks_is_said_in_a_line(cache, term, sides, kind, message):
    with pytest.raises(kind, match=message) as caught:
        Objective(make_terms(term), cache.signals, *sides.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"loss": "cross_entropy", "hypothesis": 1}, "hypothesis is 1 and hypotheses is null"),
        ({"loss": "forward_kl", "signal": ["a", "a"]}, r"signal names one twice: \['a', 'a'\]"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(term, message):
    with pytest.raises(RecipeError, match=message):
        make_terms(term)


@pytest.fixture(scope="module")
def dumped(world, make_recipe, tmp_path_factory):
    """A cache with three hypotheses of each of some lines, and labels of the best."""
    root = tmp_path_factory.mktemp("dumped")
    fields = {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}
    signals = {
        "beams": {"kind": "beams", "mode": "sample", "num_hypotheses": 3},
        "labels": {"codec": {"name": "topk", "k": 4}},
        "best": {"codec": {"name": "topk", "k": 4}, "hypotheses": "beams"},
    }
    tree = {
        "name": "test",
        "corpus": {"fields": fields, "limit": 24},
        "dump": {
            "teacher": {"path": str(world.teacher), "device": "cpu"},
            "signals": signals,
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return root


def train_section(make_recipe, *terms, **more):
    options = {"dev": False, "batch_tokens": 9000, "clip_norm": None, "student": {"dropout": 0.0}}
    return make_recipe(None, objective=list(terms), **options | more).train


def first_step(section, cache):
    """Losses and gradients of the first global batch, which holds all samples."""
    trainer = Trainer(section, open_cache(cache))
    batch = next(iter(trainer.stream))
    values = trainer.backward(batch)
    gradients = {n: p.grad for n, p in trainer.distillation.named_parameters()}
    return batch, values, gradients


@pytest.mark.parametrize("choice", ["best", "reference"])
def test_compiled_targets_train_as_hypotheses_do(dumped, make_recipe, tmp_path, choice):
    """Two roads to sequence-level KD: another target in the cache, or a term over the beams."""
    cache = open_cache(dumped / "cache")
    compile_caches(
        [str(dumped / "cache")],
        str(tmp_path / "out"),
        CompileOptions(targets=parse_targets(f"beams={choice}"), signals=["beams", "best"]),
    )
    plain = train_section(make_recipe, {"loss": "cross_entropy"})
    compiled, values, gradients = first_step(plain, tmp_path / "out")
    beams = cache.signal_shard("beams", 0).parts[0][2]
    ids, samples = join_ids(beams["tokens"].fields), cache.samples(0)
    ends = beams["hypotheses"].fields["num_tokens"].cumsum()
    pieces = [ids[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    tokenizer = load_tokenizer(cache.tokenizer_dir("teacher"))
    chosen = []
    for m in range(24):
        three = pieces[3 * m : 3 * m + 3]
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in three]
        reference = samples.text("tgt")[m].as_py()
        bleu = [
            sacrebleu.sentence_bleu(text, [reference], use_effective_order=True).score
            for text in texts
        ]
        chosen.append(three[bleu.index(max(bleu)) if choice == "reference" else 0])
    (micro,) = compiled.micro
    tokens = micro.streams["tgt"]
    found = sorted(row[keep].tolist() for row, keep in zip(tokens.ids, tokens.mask, strict=True))
    assert found == sorted(chosen)
    if choice == "best":
        term = train_section(make_recipe, {"loss": "cross_entropy", "hypotheses": "beams"})
        _, same, same_gradients = first_step(term, dumped / "cache")
        torch.testing.assert_close(same, values, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            if gradient is not None:
                torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    else:
        assert found != sorted(pieces[::3])


def test_sources_alone_become_pseudo_parallel_data(world, dumped, make_recipe, tmp_path):
    """Of sources without targets hypotheses are dumped, made targets, and mixed with the others."""
    alone = tmp_path / "alone.src"
    alone.write_text("".join(line + "\n" for line in world.src[100:106]))
    beams = {"kind": "beams", "mode": "greedy", "max_length": 8}
    best = {"codec": {"name": "topk", "k": 4}, "hypotheses": "beams"}
    tree = {
        "name": "test",
        "corpus": {"fields": {"src": str(alone)}, "without": ["tgt"]},
        "dump": {
            "teacher": {"path": str(world.teacher), "device": "cpu"},
            "signals": {"beams": beams, "best": best},
        },
    }
    dump(parse_recipe(tree), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    assert cache.manifest.corpus.fields == ["src", "tgt"]
    assert cache.samples(0).text("tgt").to_pylist() == [""] * 6
    dump(parse_recipe(tree), tmp_path / "cache")  # goes on, with nothing left to do

    def trainer(*terms, path=tmp_path / "cache"):
        return Trainer(train_section(make_recipe, *terms), open_cache(path))

    plain = {"loss": "cross_entropy"}
    assert trainer(plain | {"hypotheses": "beams"}, plain | {"weight": 0.0}).objective.hypotheses
    with pytest.raises(RecipeError, match=r"dumped without text in 'tgt' .* compile --targets"):
        trainer(plain, plain | {"hypotheses": "beams"})

    best_of = parse_targets("beams=best")
    for name, path in (("alone", tmp_path / "cache"), ("both", dumped / "cache")):
        options = CompileOptions(targets=best_of, signals=["beams", "best"])
        compile_caches([str(path)], str(tmp_path / name), options)
    parts = [str(tmp_path / name) for name in ("both", "alone")]
    compile_caches(parts, str(tmp_path / "mixed"), CompileOptions(mix=[1, 1]))
    trainer(plain, path=tmp_path / "alone")
    mixed = open_cache(tmp_path / "mixed")
    assert mixed.samples(0).text("src").to_pylist()[24:] == world.src[100:106]
    assert mixed.complete("best")
    beams = cache.signal_shard("beams", 0).parts[0][2]
    ids = join_ids(beams["tokens"].fields).tolist()
    stream = mixed.samples(0).streams["tgt"]
    assert join_ids(stream.fields).tolist()[stream.offsets[24] :] == ids


def test_a_hypothesis_that_is_too_long_is_named(dumped, make_recipe):
    cache = open_cache(dumped / "cache")  # whose hypotheses go on to the teacher's last position
    longest = max(cache.stream(name).longest for name in ("src", "tgt"))
    section = train_section(
        make_recipe,
        {"loss": "cross_entropy", "hypotheses": "beams"},
        student={"max_position_embeddings": longest},
    )
    with pytest.raises(ModelError, match=r"positions, and hypothesis 0 of signal 'beams' has "):
        first_step(section, dumped / "cache")


def test_the_canary_looks_at_labels_of_hypotheses(dumped, make_recipe):
    terms = {"loss": "forward_kl", "signal": ["labels", "best"]}
    trainer = Trainer(train_section(make_recipe, terms), open_cache(dumped / "cache"))
    assert trainer.objective.labelled == {"tgt": ["labels"], "beams.0": ["best"]}
    (micro,) = next(iter(trainer.stream)).micro
    whole = with_hypotheses(micro, trainer.objective.hypotheses, None)
    for stream, names in trainer.objective.labelled.items():
        check_batch(whole, stream, names)


def test_a_cache_without_hypotheses_is_told_how_to_get_them():
    message = (
        r"here: cache has no signal 'nbest'; .* has \[\]; dump it: --dump\.signals\.nbest '{kind"
    )
    with pytest.raises(RecipeError, match=message):
        check_beams_signal("here", "nbest", 0, {}, "src", "tgt")
