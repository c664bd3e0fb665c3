"""The bi-attentive BiLSTM as a student of several tasks, over pieces and over words."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcache.dump.runner import dump
from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import open_cache
from kdcache.models.loading import load_tokenizer
from kdcache.models.multi_task import MultiTaskConfig, MultiTaskModel
from kdcache.models.tasks import Task
from kdcache.recipe import EvaluateSection, load_recipe, parse_recipe
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.test_bi_attentive import reference
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import BERT, save_tokenizer

HEADS = {"topic": {"labels": ["no", "yes"]}, "close": {"kind": "similarity"}}
SIZES = {"embedding_size": 6, "feed_forward_size": 5, "lstm_size": 4, "hidden_size": 7}
SOFT = {"loss": "score_mse", "signal": "scores", "over_classes": "sum"}


def write(path, lines, paired):
    rows = []
    for number, line in enumerate(lines):
        pair = {"pair": " ".join(line.split()[:-1:2])} if paired else {}
        rows.append({"text": line, **pair, "label": str(number % 4) if paired else "no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"format": "jsonl", "path": str(path), "fields": {name: name for name in rows[0]}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows of two tasks and masked copies of them, scored; read as pieces and as words."""
    root = tmp_path_factory.mktemp("bilstm")
    lines = make_lines(60)[0]
    size = save_tokenizer(root / "teacher", lines)
    torch.manual_seed(5)
    heads = {name: Task.of(tree).to_dict() for name, tree in HEADS.items()}
    body = BERT | {"vocab_size": size, "max_position_embeddings": 48}
    teacher = MultiTaskModel(MultiTaskConfig(text_config=body, tasks=heads, head_size=0))
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    teacher.save_pretrained(root / "teacher")
    tasks = {
        "topic": write(root / "topic", lines[:20], False) | {"copies": 1},
        "close": write(root / "close", lines[20:30], True),
    }
    dev = {"topic": write(root / "dev", lines[40:], False)}
    tree = {
        "name": "test",
        "corpus": {"tasks": tasks, "label": "label", "augment": {"copies": 2}},
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "tokenizers": {
                "teacher": {"kind": "pretrained"},
                "words": {"kind": "wordpiece", "words": True, "fields": ["text"], "vocab_size": 12},
            },
            "streams": {
                "text": {"field": "text", "pair": "pair"},
                "words": {"field": "text", "pair": "pair", "tokenizer": "words"},
                "first": {"field": "text"},
            },
            "signals": {f"scores_{name}": {"kind": "classes", "task": name} for name in HEADS},
        },
    }
    dump(parse_recipe(tree), root / "cache")
    corpus = {"tasks": dev, "label": "label"}
    return SimpleNamespace(root=root, tree=tree, dev=corpus, cache=open_cache(root / "cache"))


def recipe(world, stream="text", config=None, **train_keys):
    student = {"kind": "multi_task", "tasks": HEADS, "head_size": 8, "init": "transformers"}
    student["config"] = {"model_type": "bi_attentive", **SIZES, "dropout": 0.0} | (config or {})
    section = {
        "student": student,
        "source": stream,
        "target": stream,
        "objective": [SOFT],
        "device": "cpu",
        "max_steps": 6,
        "batch_tokens": 120,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "validation": {"corpus": world.dev, "every_steps": 3},
    }
    return parse_recipe({**world.tree, "train": section | train_keys})


@pytest.mark.parametrize("stream", ["text", "words"])
@pytest.mark.parametrize("bi_attention", [True, False])
def test_its_scores_are_those_of_the_papers_equations(world, stream, bi_attention):
    made = recipe(world, stream, {"bi_attention": bi_attention})
    made = Trainer(made.train, world.cache)
    own = world.cache.tokenizer(world.cache.stream(stream).tokenizer)
    assert made.model.body.embeddings.num_embeddings == own.vocab_size
    made.model.double()
    seen, copied = set(), 0
    with closing(iter(made.stream)) as batches:
        for batch in batches:
            (micro,) = batch.micro
            if micro.task in seen:
                continue
            seen.add(micro.task)
            tokens, head = micro.streams[stream], made.model.heads[micro.task]
            losses = []
            scores = micro.signals[f"scores_{micro.task}"].values.view(len(micro), -1)
            for number, mask in enumerate(tokens.mask):
                ids, types = (of[number][mask] for of in (tokens.ids, tokens.segments))
                x, y = ids[types == 0].tolist(), ids[types == 1].tolist()
                assert bool(y) == (micro.task == "close")
                copied += own.mask_id in x
                pooled = reference(made.model.body, x, y or x, bi_attention)
                hidden = (pooled @ head[0].weight.T + head[0].bias).clamp(min=0)
                said = hidden @ head[2].weight.T + head[2].bias
                losses.append((said - scores[number]).square().sum())
            total, _ = made.distillation(micro, batch.counts, made.objective.at(1, 10))
            torch.testing.assert_close(total, sum(losses) / len(losses), check_dtype=False)
            if len(seen) == 2:
                break
    assert copied


def test_a_run_ends_in_a_model_that_can_be_scored(world, tmp_path):
    summary = train(recipe(world, "words", max_steps=20), world.root / "cache", tmp_path / "run")
    assert summary["best_dev_loss"] > 0
    best = MultiTaskModel.from_pretrained(tmp_path / "run" / "best")
    tokenizer = load_tokenizer(tmp_path / "run" / "best")
    assert best.config.text_config.lstm_size == 4
    scores = best.eval()(**tokenizer(["the cat"], return_tensors="pt"), task="topic").logits
    assert scores.shape == (1, 2)
    found = evaluate(tmp_path / "run", EvaluateSection(corpus=world.dev, device="cpu"))
    assert "topic" in json.dumps(found)
    # What lacks weights, as students of older names do, is refused and not scored at random.
    path = tmp_path / "run" / "best" / "model.safetensors"
    held = load_file(path)
    held["body.encoder.weight_ih_l0"] = held.pop("body.encoder.ahead.weight_ih_l0")
    save_file(held, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, body.encoder.ahead.weight_ih_l0"):
        evaluate(tmp_path / "run", EvaluateSection(corpus=world.dev, device="cpu"))


def test_scores_of_other_text_are_refused(world):
    with pytest.raises(IdentityError, match=r"describes stream 'text', the student's .* 'first'"):
        Trainer(recipe(world, "first").train, world.cache)
    for config, message in (
        ({"d_model": 4}, "a bi_attentive config has no d_model"),
        ({"lstm_size": 0}, "bi_attentive: lstm_size is 0; expected at least 1"),
        ({"dropout": 1.5}, "bi_attentive: dropout is 1.5; expected"),
    ):
        with pytest.raises(ModelError, match=message):
            Trainer(recipe(world, config=config).train, world.cache)


def test_a_config_of_another_model_takes_the_place_of_one(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "extends: masked-lm\ntrain: {student: {config: {model_type: bi_attentive, lstm_size: 8}}}\n"
    )
    config = load_recipe(str(tmp_path / "own.yaml")).train.student.config
    assert config == {"model_type": "bi_attentive", "lstm_size": 8}
