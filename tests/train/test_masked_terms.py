"""Terms over masked inputs against the teacher's own model, sentence by sentence."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizerFast

from kdcache.dump.runner import dump
from kdcache.errors import IdentityError, ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.recipe import EvaluateSection, parse_recipe
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.losses.soft_terms import sample_factors
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students.vocabulary import KnownIds
from tests.report.kinds import MASK_ID, make_kinds
from tests.train.conftest import STUDENT, make_lines
from tests.train.test_distillation import (
    distilled,
    global_batches,
    make_student,
    one_batch,
)
from tests.train.test_loop import metrics, weights

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the cat dog bird fish horse mouse crow sees hears likes hunts"
)
SIGNALS = {
    "masks": {"kind": "masks", "stream": "src", "probability": 0.3, "replicas": 2},
    "kept": {"kind": "masks", "stream": "src", "mask_share": 0.0, "random_share": 0.0},
    "masked": {"at": "masked", "stream": "src", "masks": "masks"},
    "original": {"at": "masked", "stream": "src", "masks": "kept"},
    "states": {"kind": "hidden", "stream": "src", "layers": [-2], "masks": "masks"},
}


@pytest.fixture(scope="module")
def mlm(tmp_path_factory):
    """A tiny random BERT, a cache of it whose target has another tokenizer, and text files."""
    root = tmp_path_factory.mktemp("mlm")
    src, tgt = make_lines(60)
    for name, lines in (("src", src), ("tgt", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    torch.manual_seed(2)
    vocab = {word: number for number, word in enumerate(WORDS.split())}
    BertTokenizerFast(vocab=vocab).save_pretrained(root / "bert")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=len(vocab), num_attention_heads=2, max_position_embeddings=32, **sizes
    )
    teacher = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    teacher.save_pretrained(root / "bert")
    signals = {
        name: signal | ({"codec": {"name": "full", "values": "float32"}} if "at" in signal else {})
        for name, signal in SIGNALS.items()
    }
    pieces = {"kind": "sentencepiece", "fields": ["tgt"], "vocab_size": 30}
    tree = {
        "name": "test",
        "corpus": {"fields": {side: str(root / side) for side in ("src", "tgt")}},
        "dump": {
            "teacher": {"path": str(root / "bert"), "device": "cpu"},
            "tokenizers": {"teacher": {"kind": "pretrained"}, "target": pieces},
            "streams": {"src": {"field": "src"}, "tgt": {"field": "tgt", "tokenizer": "target"}},
            "shard_tokens": 500,
            "signals": signals,
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, teacher=teacher.double(), cache=open_cache(root / "cache"))


def student_of(mlm):
    return make_student(rows=37, share_encoder_decoder_embeddings=False)


def rows_as_read(micro, masks):
    """Of each replica in turn: the sample's ids with what the signal puts there, and where."""
    source, masked, at, found = micro.streams["src"], micro.signals[masks], 0, []
    for sample, counts in enumerate(masked.counts.tolist()):
        for count in counts:
            ids = source.ids[sample, source.mask[sample]].clone()
            places = masked.positions[at : at + count]
            for place, new in zip(places, masked.ids[at : at + count], strict=True):
                ids[place] = new
            at += count
            found.append((ids[None], places))
    return found


@pytest.mark.parametrize(
    ("signal", "masks", "temperature"),
    [("masked", "masks", 1.0), ("masked", "masks", 2.0), ("original", "kept", 1.0)],
)
def test_the_classifier_learns_what_the_teacher_says_of_what_both_read(
    mlm, signal, masks, temperature
):
    model = student_of(mlm)
    term = {"loss": "masked_kl", "signal": signal, "weight": 0.5, "temperature": temperature}
    module = distilled(mlm.cache, model, term)
    batch = one_batch(mlm.cache, module)
    (micro,) = batch.micro
    total, values = module(micro, batch.counts, module.objective.at(1, 10))
    total.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()

    classifier, losses, changed = module.beside["0"].classifier, [], 0
    for sample, (ids, places) in enumerate(rows_as_read(micro, masks)):
        with torch.no_grad():
            logits = mlm.teacher(ids).logits[0, places] / temperature
        states = model.get_encoder()(ids).last_hidden_state[0, places]
        p = torch.log_softmax(classifier(states) / temperature, 1)
        q = torch.log_softmax(logits, 1)
        losses.append((q.exp() * (q - p)).sum(1))
        original = micro.streams["src"].ids[sample // (2 if masks == "masks" else 1)]
        changed += int((original[places] != ids[0, places]).sum())
    assert (changed > 0) == (masks == "masks")
    expected = torch.cat(losses).mean()
    assert len(torch.cat(losses)) == batch.counts[signal]
    assert values.item() == pytest.approx(expected.item(), rel=1e-4)
    assert total.item() == pytest.approx(0.5 * temperature**2 * values.item())
    (0.5 * temperature**2 * expected).backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    mask_row = model.get_encoder().embed_tokens.weight.grad[WORDS.split().index("[MASK]")]
    assert (mask_row.abs().sum() > 0) == (masks == "masks")


@pytest.mark.parametrize("loss", ["hidden_mse", "hidden_cosine"])
def test_states_of_masked_inputs_are_compared_with_the_students_of_the_same(mlm, loss):
    model = student_of(mlm)
    module = distilled(mlm.cache, model, {"loss": loss, "signal": "states"})
    batch = one_batch(mlm.cache, module)
    (micro,) = batch.micro
    _, values = module(micro, batch.counts, module.objective.at(1, 10))
    (projection,) = module.beside["0"].projections.values()
    rows = []
    for ids, _ in rows_as_read(micro, "masks"):
        theirs = mlm.teacher(ids, output_hidden_states=True).hidden_states[-2][0]
        own = projection(model.get_encoder()(ids).last_hidden_state[0])
        cosine = 1 - torch.cosine_similarity(own, theirs, dim=1)
        rows.append(((own - theirs) ** 2).mean(1) if loss == "hidden_mse" else cosine)
    assert values.item() == pytest.approx(torch.cat(rows).mean().item(), rel=1e-3)  # float16


EVERY = [
    {"loss": "cross_entropy"},
    {"loss": "masked_kl", "signal": "masked"},
    {"loss": "masked_kl", "signal": "original", "weight": 0.3},
    {"loss": "hidden_mse", "signal": "states"},
]


def test_micro_batches_of_masked_terms_add_up_and_a_weight_of_zero_builds_nothing(mlm):
    model = student_of(mlm)
    module = distilled(mlm.cache, model, *EVERY, {**EVERY[1], "weight": 0.0})
    assert sorted(module.beside) == ["1", "2", "3"]
    assert module.objective.signals == ["masked", "masks", "original", "kept", "states"]
    moments = module.objective.at(1, 10)
    for one, other in zip(*(global_batches(mlm.cache, module, n) for n in (1, 3)), strict=True):
        sums = []
        for batch in (one, other):
            module.zero_grad()
            found = [module(micro, batch.counts, moments) for micro in batch.micro]
            sum(total for total, _ in found).backward()
            grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            sums.append((sum(values for _, values in found), grads))
        torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-8)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return open_cache(make_kinds(tmp_path_factory.mktemp("kinds") / "cache").path)


def test_a_sample_weighs_at_each_of_its_masked_tokens(kinds):
    weight = {"by": "teacher_loss", "signal": "targets", "strength": 0.8}
    terms = [{"loss": "masked_kl", "signal": "mlm"} for _ in range(2)]
    terms[1]["sample_weight"] = weight
    module = distilled(kinds, make_student(), *terms)
    with torch.no_grad():
        module.beside["1"].classifier.weight.copy_(module.beside["0"].classifier.weight)
    batch = one_batch(kinds, module)
    _, values = module(batch.micro[0], batch.counts, module.objective.at(1, 10))
    section = module.objective.terms[1].sample_weight
    plain, weighed = 0.0, 0.0
    for whole in global_batches(kinds, module, 99):
        if whole.rows.tolist() != batch.rows.tolist():
            continue
        for micro in whole.micro:
            assert len(micro) == 1
            _, (one, _) = module(micro, batch.counts, module.objective.at(1, 10))
            factor = sample_factors(section, micro.signals["targets"], micro.streams["tgt"].mask)
            plain, weighed = plain + one.item(), weighed + one.item() * factor.item()
    assert values.tolist() == pytest.approx([plain, weighed], rel=1e-5)
    assert abs(weighed - plain) > 1e-3


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        ({"loss": "masked_kl", "signal": "none"}, RecipeError,
         r"'none' is not in the cache; masked_kl needs .* of which the cache has \['mlm'\]: dump "
         r"with a masked model masks: \{kind: masks, stream: src\} and none: \{at: masked"),
        ({"loss": "masked_kl", "signal": "targets"}, RecipeError,
         r"'targets' is of kind logits at targets; masked_kl needs"),
        ({"loss": "masked_kl", "signal": "hidden"}, RecipeError, r"'hidden' is of kind hidden"),
        ({"loss": "forward_kl", "signal": "mlm"}, RecipeError, r"'mlm' is logits at masked"),
        ({"loss": "masked_kl", "signal": "mlm", "tail": "sampled"}, RecipeError, r"tail 'sampled'"),
        ({"loss": "masked_kl", "signal": "mlm", "sample_weight": {"by": "teacher_loss"}},
         RecipeError, r"sample_weight\.signal: is missing; masked_kl has no labels of the target"),
        ({"loss": "hidden_mse", "signal": "absent"}, RecipeError,
         r"no signal 'absent'; dump one of kind hidden"),
    ],
)  # fmt: skip
def test_a_cache_without_what_the_term_needs_says_what_to_dump(kinds, term, error, message):
    with pytest.raises(error, match=message) as caught:
        distilled(kinds, make_student(), term)
    assert "\n" not in str(caught.value)


def test_masks_of_another_stream_and_ids_that_the_student_lacks_are_refused(kinds):
    term = {"loss": "masked_kl", "signal": "mlm"}
    with pytest.raises(IdentityError, match=r"labels stream 'src', the student's encoder reads"):
        distilled(kinds, make_student(), term, source="pair")
    model = make_student(rows=MASK_ID)
    module = distilled(kinds, model, term)
    micro = one_batch(kinds, module).micro[0]
    micro.streams["src"].ids.clamp_(max=MASK_ID - 1)
    micro.streams["tgt"].ids.clamp_(max=MASK_ID - 1)
    known = KnownIds.of(model, kinds, "src", "tgt", False)
    with pytest.raises(ModelError, match=r"has 3 ids, and masks signal 'masks' puts id \d+ into"):
        known.checked(micro)


def mask_task(mlm, **more):
    """A run of a student that reads the teacher's tokens and writes other ones."""
    fields = {side: str(mlm.root / side) for side in ("src", "tgt")}
    tree = {
        "student": {"config": STUDENT | {"share_encoder_decoder_embeddings": False}},
        "objective": EVERY[:2],
        "gate": {"terms": ["masked_kl"]},
        "device": "cpu",
        "max_steps": 6,
        "batch_tokens": 120,
        "accumulate": 2,
        "log_every": 1,
        "schedule": {"warmup_steps": 1},
        "validation": {"corpus": {"fields": fields, "limit": 9}, "every_steps": 3},
        "checkpoints": {"every_steps": 2, "average_last": 2},
    }
    return parse_recipe({"name": "test", "train": tree | more})


def test_a_run_with_two_tokenizers_goes_on_bitwise_and_is_evaluated(mlm, tmp_path, monkeypatch):
    recipe, cache = mask_task(mlm), mlm.cache.path
    train(recipe, cache, tmp_path / "whole")
    real = Trainer.step

    def stopping(self, batch):
        if self.state.step == 3:
            raise KeyboardInterrupt
        real(self, batch)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, cache, tmp_path / "halves")
    monkeypatch.undo()
    train(recipe, cache, tmp_path / "halves")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    for folder in ("last", "averaged"):
        assert weights(tmp_path / "whole" / folder) == weights(tmp_path / "halves" / folder)
    lines = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    shares = [3 * line["gated"] for line in lines]  # embeddings, attention, feed-forward
    assert shares == pytest.approx([round(share) for share in shares], abs=1e-5)
    assert 0 < sum(shares) < 3 * len(shares)
    assert all(set(line["terms"]) == {"cross_entropy", "masked_kl"} for line in lines)

    run = tmp_path / "whole"
    tokenizer = AutoTokenizer.from_pretrained(run / "averaged" / "source_tokenizer")
    assert tokenizer.convert_ids_to_tokens(tokenizer("the cat")["input_ids"])[0] == "[CLS]"
    section = {"corpus": {"fields": {s: str(mlm.root / s) for s in ("src", "tgt")}, "limit": 9}}
    section |= {"checkpoint": "averaged", "device": "cpu", "latency_sentences": 0, "num_beams": 1}
    result = evaluate(run, EvaluateSection.model_validate(section))
    dev = Trainer(recipe.train, mlm.cache)
    assert result["num_tokens"] == sum(map(len, dev.dev.tgt))  # the target's own pieces
    assert json.loads((run / "evaluation.json").read_text())["loss_nats"] == result["loss_nats"]
    hypotheses = (run / "hypotheses.txt").read_text()
    assert "[CLS]" not in hypotheses
