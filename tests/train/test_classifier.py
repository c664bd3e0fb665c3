"""Classifiers and regressors as students: gold labels, a teacher's scores, to a teacher again."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM
from transformers import BertForSequenceClassification as Bert

from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.recipe import EvaluateSection, parse_recipe
from kdcache.train.batches.stream import BatchStream
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.evaluation.metrics import accuracy, macro_f1, matthews, pearson, spearman
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import BERT as MASKED_BERT
from tests.train.test_masked_lm import save_tokenizer

BERT = MASKED_BERT | {"max_position_embeddings": 48}
LABELS = ["no", "maybe", "yes"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HARD = {"loss": "label_cross_entropy"}
MSE = {"loss": "score_mse", "signal": "scores"}
SUM = MSE | {"over_classes": "sum", "weight": 0.3}
KL = {"loss": "score_kl", "signal": "scores", "temperature": 2.0, "weight": 0.7}


def rows_of(lines, seed):
    """Pairs with a class and a number, both absent of every fifth."""
    found = []
    for number, line in enumerate(lines):
        words = line.split()
        other = " ".join(words[::-1]) if number % 2 else words[-1]
        value = (number * seed) % 5
        row = {"text": line, "pair": other, "label": LABELS[len(words) % 3], "value": str(value)}
        found.append(row | ({"label": "", "value": ""} if number % 5 == 4 else {}))
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "format": "jsonl",
        "path": str(path),
        "fields": {name: name for name in ("text", "pair", "label", "value")},
    }


def save_model(directory, size, labels, seed):
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    model = Bert(BertConfig(**BERT | {"vocab_size": size} | names))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two tasks of pairs, some without a label; a random teacher scored the first of them."""
    root = tmp_path_factory.mktemp("classifier")
    lines = make_lines(90)[0]
    size = save_tokenizer(root / "teacher", lines)
    save_tokenizer(root / "number", lines)
    save_model(root / "teacher", size, LABELS, 3)
    save_model(root / "number", size, ["score"], 4)
    tasks = {
        "nli": write(root / "a", rows_of(lines[:50], 2)),
        "other": write(root / "b", rows_of(lines[50:70], 3)),
    }
    dev = write(root / "dev", rows_of(lines[70:], 2))
    caches = {}
    for name, label in (("teacher", "label"), ("number", "value")):
        tree = {
            "name": "test",
            "corpus": {"tasks": tasks, "label": label, "empty": "keep"},
            "dump": {
                "teacher": {"path": str(root / name), "device": "cpu"},
                "streams": {"both": {"field": "text", "pair": "pair"}, "text": {"field": "text"}},
                "shard_tokens": 400,
                "signals": {
                    "scores": {"kind": "classes", "stream": "both", "task": "nli"},
                    "hidden": {"kind": "hidden", "stream": "both"},
                },
            },
        }
        dump(parse_recipe(tree), root / f"{name}-cache")
        caches[name] = tree
    dev |= {"empty": "keep"}
    return SimpleNamespace(root=root, size=size, trees=caches, tasks=tasks, dev=dev)


def make_recipe(world, *objective, student=None, label="label", **train_keys):
    section = {
        "student": {"kind": "classifier", "config": BERT, "init": "transformers"} | (student or {}),
        "source": "both",
        "target": "both",
        "objective": list(objective) or [HARD],
        "device": "cpu",
        "max_steps": 6,
        "batch_tokens": 500,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "checkpoints": {"every_steps": 3, "average_last": 2},
        "validation": {"corpus": world.dev | {"label": label}, "every_steps": 3},
    }
    return parse_recipe({**world.trees["teacher"], "train": section | train_keys})


def make_trainer(world, *objective, cache="teacher", **keys):
    path = world.root / f"{cache}-cache"
    label = "value" if cache == "number" else "label"
    return Trainer(make_recipe(world, *objective, label=label, **keys).train, open_cache(path))


def first_batch(made):
    with closing(iter(made.stream)) as batches:
        return next(batches)


def one_at_a_time(model, tokens):
    """[B, C] scores of each pair by itself, without padding."""
    found = []
    for ids, mask, types in zip(tokens.ids, tokens.mask, tokens.segments, strict=True):
        read = {"input_ids": ids[mask][None], "token_type_ids": types[mask][None]}
        found.append(model(**read).logits[0])
    return torch.stack(found)


def truth(world, batch, field):
    """Gold labels and tasks of a batch, from the corpus' own files."""
    rows = [
        {**json.loads(line), "task": name}
        for name, task in world.tasks.items()
        for line in Path(task["path"]).read_text().splitlines()
    ]
    chosen = [rows[row] for row in batch.rows]
    return [row[field] for row in chosen], [row["task"] for row in chosen]


@pytest.mark.parametrize("task", [None, "other"])
def test_losses_are_those_of_one_text_at_a_time(world, task):
    student = {"config": BERT | STILL, "task": task}
    made = make_trainer(world, HARD, MSE, SUM, KL, student=student, batch_tokens=4000)
    made.model.double()
    batch = first_batch(made)
    (micro,) = batch.micro
    total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    gradients = torch.autograd.grad(total, made.parameters)

    logits = one_at_a_time(made.model, micro.streams["both"])
    names, tasks = truth(world, micro, "label")
    # Gold labels count of the signals' task, unless the recipe says another.
    which = task or "nli"
    mine = [bool(name) and of == which for name, of in zip(names, tasks, strict=True)]
    scored = [of == "nli" for of in tasks]
    assert 0 < sum(mine) < len(names) > sum(scored) > 0
    assert batch.counts[".gold"] == sum(mine)
    gold = torch.tensor([LABELS.index(n) for n, own in zip(names, mine, strict=True) if own])
    teacher = AutoModelForSequenceClassification.from_pretrained(world.root / "teacher").eval()
    tokens = micro.streams["both"]
    with torch.no_grad():
        theirs = one_at_a_time(teacher, tokens)[torch.tensor(scored)].double()
    own = logits[torch.tensor(scored)]
    warm = [(one / 2).softmax(1) for one in (own, theirs)]
    expected = torch.stack(
        [
            F.cross_entropy(logits[torch.tensor(mine)], gold),
            (own - theirs).square().mean(),
            (own - theirs).square().sum(1).mean(),
            (warm[1] * (warm[1] / warm[0]).log()).sum(1).mean(),
        ]
    )
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    whole = expected[0] + expected[1] + 0.3 * expected[2] + 0.7 * 4 * expected[3]
    others = torch.autograd.grad(whole, made.parameters)
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_numbers_are_learned_by_their_squares(world):
    hard = {"loss": "label_mse"}
    made = make_trainer(
        world, hard, MSE, cache="number", student={"config": BERT | STILL}, batch_tokens=4000
    )
    batch = first_batch(made)
    (micro,) = batch.micro
    _, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    said = one_at_a_time(made.model, micro.streams["both"])[:, 0].detach()
    numbers, tasks = truth(world, micro, "value")
    # The signal is of one task, so gold labels of that task count.
    pairs = [
        (one, float(number))
        for one, number, of in zip(said.tolist(), numbers, tasks, strict=True)
        if number and of == "nli"
    ]
    assert batch.counts[".gold"] == len(pairs) < len(said)
    expected = np.mean([(one - other) ** 2 for one, other in pairs])
    assert values[0].item() == pytest.approx(expected, rel=1e-5)
    assert made.model.config.problem_type == "regression"
    made.model.double()
    found = made.validate()
    assert set(found) == {"dev_loss", "dev_pearson", "dev_spearman"}
    dev = made.dev
    assert len(dev.ids) == 16  # a fifth of twenty has no number
    with torch.no_grad():
        said = np.array(
            [
                made.model.eval()(
                    input_ids=torch.from_numpy(ids)[None],
                    token_type_ids=torch.from_numpy(types)[None],
                ).logits.item()
                for ids, types in zip(dev.ids, dev.segments, strict=True)
            ]
        )
    assert found["dev_loss"] == pytest.approx(np.mean((said - dev.gold) ** 2), rel=1e-5)
    assert found["dev_pearson"] == pytest.approx(np.corrcoef(said, dev.gold)[0, 1], rel=1e-4)


def test_a_number_out_of_range_is_refused_with_its_row(world, tmp_path):
    hard, student = {"loss": "label_mse"}, {"labels": ["score"]}
    keys = {"cache": "number", "student": student | {"range": [0, 4]}}
    first_batch(make_trainer(world, hard, **keys))  # they are from 0 to 4
    keys["student"]["range"] = [0, 3.5]
    with pytest.raises(CorpusError, match=r"label '4' lies outside train.student.range \[0, 3"):
        make_trainer(world, hard, **keys)  # of the development set
    made = make_trainer(world, hard, validation={}, **keys)
    with pytest.raises(CorpusError, match=r"corpus row \d+: its gold label '4' lies outside"):
        first_batch(made)
    with pytest.raises(RecipeError, match=r"train.student.range: is of a number, the student says"):
        make_trainer(world, HARD, KL, student={"range": [0, 1]})
    for wrong in ({"range": [1, 0]}, {"range": [0, 1], "labels": LABELS}):
        with pytest.raises(RecipeError, match=r"range is .* of a classifier with a single label"):
            make_trainer(world, HARD, student=wrong)


OTHERS = {
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "roberta": BERT | {"max_position_embeddings": 64},
    "modernbert": BERT,
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_classify(world, family):
    made = make_trainer(
        world, HARD, KL, student={"config": OTHERS[family] | {"model_type": family}}
    )
    batch = first_batch(made)
    made.distillation.eval()
    assert made.backward(batch).isfinite().all()
    assert all(one.grad is not None for one in made.parameters)


def test_micro_batches_add_up(world):
    found = []
    for parts in (1, 3):
        made = make_trainer(world, HARD, MSE, KL, accumulate=parts, batch_tokens=3000)
        made.distillation.eval()
        batch = first_batch(made)
        assert len(batch.micro) == parts
        found.append([made.backward(batch), *(one.grad for one in made.parameters)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_ranks_add_up(world):
    made = make_trainer(world, HARD, MSE, KL, batch_tokens=3000)
    made.distillation.eval()
    section, moments = made.section, made.objective.at(1, 10)
    found = []
    for world_size in (1, 2):
        made.optimizer.zero_grad()
        totals = 0
        for rank in range(world_size):
            stream = BatchStream(
                *(made.cache, ["both"], made.objective.signals, 3000, section.seed, 4),
                gold=made.objective.gold,
                rank=rank,
                world=world_size,
            )
            with closing(iter(stream)) as batches:
                batch = next(batches)
            assert len(batch.rows) > sum(map(len, batch.micro)) or world_size == 1
            for micro in batch.micro:
                total, _ = made.distillation(micro, batch.counts, moments)
                total.backward()
                totals += total.detach()
        found.append([totals, *(one.grad.clone() for one in made.parameters)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_label_moves_nothing(world):
    made = make_trainer(world, HARD, KL)
    batch = first_batch(made)
    (micro,) = batch.micro
    scores = micro.signals["scores"]
    empty = replace(scores, values=scores.values[:0], counts=torch.zeros_like(scores.counts))
    micro = replace(micro, gold=torch.full_like(micro.gold, -100), signals={"scores": empty})
    counts = {".gold": 0, "scores": 0}
    total, values = made.distillation(micro, counts, made.objective.at(1, 10))
    total.backward()
    assert total.item() == 0 == values.abs().sum()
    assert all(one.grad.abs().sum() == 0 for one in made.parameters)


def test_from_gold_to_a_teacher_to_a_student(world, tmp_path, monkeypatch):
    gold = make_recipe(world, max_steps=40, student={"labels": LABELS, "task": "nli"})
    summary = train(gold, world.root / "teacher-cache", tmp_path / "gold")
    metrics = (tmp_path / "gold" / "metrics.jsonl").read_text().splitlines()
    losses = [one["dev_loss"] for one in map(json.loads, metrics) if "dev_loss" in one]
    assert summary["best_dev_loss"] == min(losses) < losses[0]
    best = tmp_path / "gold" / "best"
    model = AutoModelForSequenceClassification.from_pretrained(best)
    assert model.config.id2label == dict(enumerate(LABELS))
    tree = world.trees["teacher"]
    teacher = {"path": str(best), "device": "cpu"}
    dump(parse_recipe({**tree, "dump": tree["dump"] | {"teacher": teacher}}), tmp_path / "cache")
    record = open_cache(tmp_path / "cache").signal("scores")
    assert (record.labels, record.problem, record.teacher.kind) == (
        *(LABELS, "classification"),
        "classifier",
    )
    soft = make_recipe(world, KL, max_steps=6)
    whole = train(soft, tmp_path / "cache", tmp_path / "whole")
    real = Trainer.step

    def step(self, batch):
        if self.state.step == 4:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(soft, tmp_path / "cache", tmp_path / "parts")
    parts = train(soft, tmp_path / "cache", tmp_path / "parts")
    for key in set(whole) - {"run", "seconds"}:
        assert parts[key] == whole[key], key
    for folder in ("best", "last", "averaged"):
        one, other = (
            (tmp_path / run / folder / "model.safetensors").read_bytes()
            for run in ("whole", "parts")
        )
        assert one == other
    section = EvaluateSection(corpus=world.dev | {"label": "label"}, device="cpu")
    found = evaluate(tmp_path / "whole", section)
    assert whole["dev_accuracy"] >= 0
    assert found["num_texts"] == 16
    assert found["loss"] == pytest.approx(whole["best_dev_loss"], rel=1e-5)
    assert set(found) >= {"loss", "accuracy", "macro_f1", "mcc", "parameters"}
    assert found["labels"] == LABELS
    # Its own labels go on with a student that starts from it, gold alone.
    again = make_recipe(world, student={"config": None, "path": str(best), "task": "nli"})
    made = Trainer(again.train, open_cache(world.root / "teacher-cache"))
    assert made.objective.labels == tuple(LABELS)
    assert torch.equal(made.model.classifier.weight, model.classifier.weight)
    with pytest.raises(
        ModelError, match=r"a classifier of \['no', 'maybe', 'yes'\], the student's"
    ):
        make_trainer(
            world, student={"config": None, "path": str(best), "labels": ["no", "yes", "maybe"]}
        )
    # Some of its layers alone.
    student = {"config": None, "path": str(best), "layers": {"encoder": [1, 1]}}
    kept = make_trainer(world, student=student).model.bert.encoder.layer
    for layer in kept:
        for one, other in zip(
            layer.parameters(), model.bert.encoder.layer[0].parameters(), strict=True
        ):
            assert torch.equal(one, other)
    assert len(kept) == 2
    student["layers"] = {"decoder": [1]}
    with pytest.raises(ModelError, match="keeps its decoder's layers where"):
        make_trainer(world, student=student)
    # Names that transformers made up may be replaced.
    save_model(tmp_path / "unnamed", world.size, ["LABEL_0", "LABEL_1", "LABEL_2"], 5)
    student = {"config": None, "path": str(tmp_path / "unnamed"), "labels": LABELS}
    assert make_trainer(world, student=student).model.config.id2label == dict(enumerate(LABELS))
    # The head of a model that has none is a function of the seed.
    BertForMaskedLM(model.config).save_pretrained(tmp_path / "bare")
    student = {"config": None, "path": str(tmp_path / "bare"), "labels": LABELS}
    heads = [
        make_trainer(world, student=student, seed=seed).model.classifier.weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_metrics_by_hand():
    gold, said = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 1, 0, 2])
    assert accuracy(gold, said) == pytest.approx(4 / 6)
    # F1: 2/4, 4/5, 2/3.
    assert macro_f1(gold, said) == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    # 4 right of 6, each class twice in gold and 2, 3, 1 times said: (24 - 12) / sqrt(22 x 24).
    assert matthews(gold, said) == pytest.approx(12 / (22 * 24) ** 0.5)
    assert matthews(gold, np.zeros(6, int)) == 0
    two = np.array([1, 1, 1, 0]), np.array([1, 1, 0, 0])  # (TP TN - FP FN) / sqrt(...)
    assert matthews(*two) == pytest.approx((2 * 1 - 0) / (2 * 3 * 1 * 2) ** 0.5)
    one, other = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 3.0, 2.0, 40.0])
    assert pearson(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    ranks = np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
    assert spearman(one, other) == pytest.approx(ranks)
    assert pearson(one, np.ones(4)) == 0


GPT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
REFUSED = [
    ([HARD], {}, RecipeError, "labels: is null, and no term names a classes signal"),
    ([HARD], {"target": "text"}, RecipeError, "a classifier reads one stream"),
    ([{"loss": "cross_entropy"}], {}, RecipeError, "cross_entropy is no term of a classifier"),
    ([KL | {"signal": "hidden"}], {}, RecipeError, "'hidden' is hidden; expected kind classes"),
    ([KL], {"source": "text", "target": "text"}, IdentityError, "describes stream 'both'"),
    ([KL], {"student": {"labels": LABELS[::-1]}}, RecipeError, r"\['no', 'maybe', 'yes'\], the st"),
    ([{"loss": "label_mse"}, KL], {}, RecipeError, "label_mse is of numbers, the student has"),
    ([HARD], {"student": {"labels": ["x"]}}, RecipeError, "one label, 'x', and says a number"),
    ([HARD], {"student": {"labels": LABELS, "task": "no"}}, RecipeError, r"task 'no', and .*nli"),
    ([KL], {"student": {"config": GPT}}, ModelError, "gpt2 is no encoder"),
    ([KL], {"student": {"config": {"model_type": "bart"}}}, ModelError, "'bart' is not a class"),
    ([KL], {"student": {"config": BERT | {"num_labels": 3}}}, ModelError, "num_labels: follows"),
    ([KL], {"gate": {"terms": [0]}}, RecipeError, "train.gate: goes with a student of kind"),
    ([KL], {"student": {"kind": "masked_lm"}}, RecipeError, "score_kl is no term of a masked LM"),
    (
        [HARD],
        {"student": {"kind": "encoder_decoder"}},
        RecipeError,
        "goes with a student of kind c",
    ),
]


@pytest.mark.parametrize(("objective", "keys", "error", "message"), REFUSED)
def test_what_a_classifier_cannot_have_is_refused_in_a_line(world, objective, keys, error, message):
    with pytest.raises(error, match=message) as found:
        make_trainer(world, *objective, **keys)
    assert "\n" not in str(found.value)


def test_labels_that_differ_are_named(world, tmp_path):
    made = make_trainer(world, HARD, student={"labels": ["no", "yes"]}, validation={})
    with pytest.raises(CorpusError, match=r"corpus row \d+: its gold label 'maybe' is none"):
        next(iter(made.stream))
    with pytest.raises(CorpusError, match=r"corpus: row 2 .*label 'maybe' is none of"):
        make_trainer(world, HARD, student={"labels": ["no", "yes"]})
    made = make_trainer(world, {"loss": "label_mse"}, student={"labels": ["x"]}, validation={})
    with pytest.raises(CorpusError, match="' is no finite number"):
        next(iter(made.stream))
    tree = world.trees["teacher"]
    bare = {"corpus": {**tree["corpus"], "label": None}}
    dump(parse_recipe({**tree, **bare, "dump": {**tree["dump"], "signals": {}}}), tmp_path / "c")
    recipe = make_recipe(world, student={"labels": LABELS})
    with pytest.raises(RecipeError, match=r"objective\.0: needs gold labels, and .* has none"):
        Trainer(recipe.train, open_cache(tmp_path / "c"))
