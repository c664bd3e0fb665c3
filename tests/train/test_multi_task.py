"""Students and teachers of several tasks: from gold labels to a teacher, a cache, a student."""

import itertools
import json
import math
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.models.multi_task import MultiTaskConfig, MultiTaskModel
from kdcache.models.tasks import Task
from kdcache.recipe import EvaluateSection, load_recipe, parse_recipe
from kdcache.train.batches.stream import BatchStream
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.evaluation.metrics import binary_f1
from kdcache.train.losses.task_losses import ranking_loss
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import BERT as MASKED_BERT
from tests.train.test_masked_lm import save_tokenizer

BERT = MASKED_BERT | {"max_position_embeddings": 48}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEADS = {
    "topic": {"labels": ["no", "maybe", "yes"]},
    "close": {"kind": "similarity", "range": [0, 5]},
    "rank": {"kind": "ranking", "labels": ["other", "answer"]},
}
GOLD = {"loss": "task_loss"}
SOFT = {"loss": "score_mse", "signal": "scores", "over_classes": "sum"}


def rows_of(task, lines):
    """Samples of a task; every fifth has no label, candidates of one query are apart."""
    found = []
    for number, line in enumerate(lines):
        words = line.split()
        row = {"text": line}
        if task == "topic":
            row["label"] = HEADS[task]["labels"][len(words) % 3]
        elif task == "close":
            row |= {"pair": " ".join(words[::-1]), "label": str(number % 6 * 0.9)}
        else:
            row["text"] = lines[number % 7]
            row |= {"pair": words[-1], "label": HEADS[task]["labels"][number % 2]}
        found.append(row | ({"label": ""} if number % 5 == 4 else {}))
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"format": "jsonl", "path": str(path), "fields": {name: name for name in rows[0]}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A cache of three tasks that a random model of them scored, and a fourth without labels."""
    root = tmp_path_factory.mktemp("multi")
    lines = make_lines(120)[0]
    size = save_tokenizer(root / "teacher", lines)
    torch.manual_seed(5)
    heads = {name: Task.of(tree).to_dict() for name, tree in HEADS.items()}
    config = MultiTaskConfig(text_config=BERT | {"vocab_size": size}, tasks=heads, head_size=0)
    teacher = MultiTaskModel(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    teacher.save_pretrained(root / "teacher")
    spans = {"topic": (0, 30), "close": (30, 55), "rank": (55, 90)}
    tasks = {n: write(root / n, rows_of(n, lines[slice(*at)])) for n, at in spans.items()}
    tasks["plain"] = write(root / "plain", [{"text": line} for line in lines[90:100]])
    dev = {n: write(root / f"dev-{n}", rows_of(n, lines[100:])) for n in HEADS}
    tree = {
        "name": "test",
        "corpus": {"tasks": tasks, "label": "label", "empty": "keep"},
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "streams": {"text": {"field": "text", "pair": "pair"}},
            "shard_tokens": 300,
            "signals": {f"scores_{n}": {"kind": "classes", "task": n} for n in HEADS},
        },
    }
    dump(parse_recipe(tree), root / "cache")
    corpus = {"tasks": dev, "label": "label", "empty": "keep"}
    return SimpleNamespace(root=root, size=size, tree=tree, tasks=tasks, dev=corpus)


def make_recipe(world, *objective, student=None, **train_keys):
    section = {
        "student": {"kind": "multi_task", "config": BERT, "tasks": HEADS, "head_size": 8}
        | (student or {}),
        "source": "text",
        "target": "text",
        "objective": list(objective) or [GOLD],
        "device": "cpu",
        "max_steps": 6,
        "batch_tokens": 100,
        "window_shards": 3,
        "optimizer": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "checkpoints": {"every_steps": 3, "average_last": 2},
        "validation": {"corpus": world.dev, "every_steps": 3},
    }
    return parse_recipe({**world.tree, "train": section | train_keys})


def make_trainer(world, *objective, **keys):
    return Trainer(make_recipe(world, *objective, **keys).train, open_cache(world.root / "cache"))


def samples(world):
    """All rows of the corpus with their task, by corpus row."""
    return [
        {"pair": "", "label": "", **json.loads(line), "task": name}
        for name, task in world.tasks.items()
        for line in Path(task["path"]).read_text().splitlines()
    ]


def score_of(model, ids, types, task):
    """[C] scores of one text by itself: transformers' own parts, a head by hand."""
    read = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    out = model.body(**read, token_type_ids=types[None], output_hidden_states=True)
    if model.config.pooling == "cls":
        pooled = out.last_hidden_state[0, 0]
    else:
        pooled = sum(layer[0, 0] for layer in out.hidden_states[1:]) / (len(out.hidden_states) - 1)
    head = model.heads[task]
    if isinstance(head, torch.nn.Linear):
        return pooled @ head.weight.T + head.bias
    hidden = (pooled @ head[0].weight.T + head[0].bias).clamp(min=0)
    return hidden @ head[2].weight.T + head[2].bias


def ranked(scores, gold, queries):
    """The loss of rankings, query by query: a plain reading of its definition."""
    total, count = 0.0, 0
    for query in set(queries):
        own = [(s, g) for s, g, q in zip(scores, gold, queries, strict=True) if q == query]
        below = 1 + sum(s.exp() for s, g in own if not g)
        positives = [-(s.exp() / (s.exp() + below)).log() for s, g in own if g]
        each = positives or [below.log()]
        total = total + len(own) * sum(each) / len(each)
        count += len(own)
    return total / max(1, count)


@pytest.mark.parametrize("pooling", ["cls", "mean_cls"])
def test_losses_are_those_of_one_text_at_a_time(world, pooling):
    config = BERT | STILL | {"num_hidden_layers": 2}
    made = make_trainer(
        world, GOLD, SOFT, student={"config": config, "pooling": pooling}, batch_tokens=400
    )
    assert [type(part).__name__ for part in made.model.heads["topic"]] == [
        "Linear",
        "ReLU",
        "Linear",
    ]
    assert made.model.heads["topic"][0].out_features == 8
    made.model.double()
    teacher = MultiTaskModel.from_pretrained(world.root / "teacher").double().eval()
    rows, seen = samples(world), set()
    with closing(iter(made.stream)) as batches:
        for _ in range(9):
            batch = next(batches)
            (micro,) = batch.micro
            made.optimizer.zero_grad()
            total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
            gradients = torch.autograd.grad(total, made.parameters, allow_unused=True)
            mine = [rows[row] for row in micro.rows]
            (task,) = {row["task"] for row in mine}
            assert micro.task == task
            seen.add(task)
            tokens = micro.streams["text"]
            read = [
                (ids[mask], types[mask])
                for ids, mask, types in zip(tokens.ids, tokens.mask, tokens.segments, strict=True)
            ]
            own = torch.stack([score_of(made.model, *one, task) for one in read])
            theirs = torch.stack([score_of(teacher, *one, task) for one in read]).detach()
            soft = (own - theirs).square().sum(1).mean()
            has = [n for n, row in enumerate(mine) if row["label"]]
            said = [mine[n]["label"] for n in has]
            if task == "close":
                gold = torch.tensor([float(one) for one in said], dtype=torch.float64)
                hard = (own[has, 0] - gold).square().mean()
            elif task == "topic":
                gold = torch.tensor([HEADS[task]["labels"].index(one) for one in said])
                hard = F.cross_entropy(own[has], gold)
            else:
                queries = [mine[n]["text"] for n in has]
                hard = ranked(own[has, 0], [one == "answer" for one in said], queries)
            torch.testing.assert_close(
                values.double(), torch.stack([hard, soft]).detach(), rtol=1e-5, atol=1e-6
            )
            others = torch.autograd.grad(hard + soft, made.parameters, allow_unused=True)
            for one, other in zip(gradients, others, strict=True):
                assert (one is None) == (other is None)  # the other tasks' heads
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert seen == set(HEADS)


def test_ranking_loss_by_hand():
    scores = torch.tensor([1.0, 0.5, -2.0, 3.0, 90.0, 0.0], dtype=torch.float64, requires_grad=True)
    gold = torch.tensor([1, 0, 1, 0, 1, math.nan])
    unit = torch.tensor([4, 4, 4, 9, 2, 4])
    e = math.exp
    one = -math.log(e(1) / (1 + e(1) + e(0.5))), -math.log(e(-2) / (1 + e(-2) + e(0.5)))
    expected = 3 * sum(one) / 2 + math.log(1 + e(3)) + 0.0
    found = ranking_loss(scores, gold, unit, 0.5)
    assert found.item() == pytest.approx(0.5 * expected)
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, gold, unit, 0.5), scores)
    assert ranking_loss(scores[:0], gold[:0], unit[:0], 1.0).item() == 0
    # A candidate a query: the logistic loss.
    alone = torch.arange(5)
    logistic = F.binary_cross_entropy_with_logits(scores[:5], gold[:5].double(), reduction="sum")
    assert ranking_loss(scores[:5], gold[:5], alone, 1.0).item() == pytest.approx(logistic.item())


def test_f1_of_two_classes():
    gold, said = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1])
    assert binary_f1(gold, said) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert binary_f1(gold * 0, said * 0) == 0


def batches_of(made, count, batch_tokens=100, window=3, **options):
    """Some global batches: rows of all micro-batches of a rank, and where the stream stands."""
    stream = BatchStream(
        *(made.cache, ["text"], made.objective.signals, batch_tokens, made.section.seed, window),
        **{"gold": made.objective.gold, "tasks": made.objective.tasks, **options},
    )
    with closing(iter(stream)) as batches:
        return [next(batches) for _ in range(count)]


def test_batches_are_of_one_task_and_mixed(world):
    made, rows = make_trainer(world), samples(world)
    total, both = (made.stream.count_batches(epochs, 1000) for epochs in (1, 2))
    first = batches_of(made, both)
    tasks = [{rows[row]["task"] for row in batch.rows} for batch in first]
    assert all(len(one) == 1 for one in tasks)
    order = [min(one) for one in tasks]
    # Every sample of the tasks once an epoch, the fourth task's never.
    for epoch in (0, 1):
        held = [batch for batch in first if batch.epoch == epoch]
        assert len(held) == (total, both - total)[epoch]
        seen = sorted(int(row) for batch in held for row in batch.rows)
        assert seen == [n for n, row in enumerate(rows) if row["task"] in HEADS]
    assert order[:total] != order[total:]
    changes = sum(one != other for one, other in itertools.pairwise(order))
    assert changes > 2 * len(HEADS)  # not task after task
    # Queries of a window stand together, whatever cuts the batch.
    for options in ({}, {"accumulate": 3}, {"accumulate": 2, "rank": 1, "world": 2}):
        for batch, whole in zip(batches_of(made, total, **options), first, strict=False):
            assert np.array_equal(batch.rows, whole.rows)
            parts = [set(micro.unit.tolist()) for micro in batch.micro]
            for n, one in enumerate(parts):
                assert all(not one & other for other in parts[:n])
    cut = (
        batches_of(made, total, world=2, rank=0),
        batches_of(made, total, world=2, rank=1),
    )
    for whole, one, other in zip(first, *cut, strict=False):
        got = [micro.rows for batch in (one, other) for micro in batch.micro]
        assert np.array_equal(np.concatenate(got), whole.rows)
    # It goes on from any batch, empty windows or not.
    for at in range(0, both - 3, 5):
        again = batches_of(made, 2, state=first[at].state)
        assert [b.rows.tolist() for b in again] == [b.rows.tolist() for b in first[at + 1 : at + 3]]
    assert any(len(set(m.unit.tolist())) < len(m) for batch in first for m in batch.micro)
    # Most windows of a shard have nothing of one task: they are passed over, and it goes on.
    alone = make_trainer(world, tasks=["rank"], validation={})
    few = batches_of(alone, 30, window=1)
    per_epoch = {epoch: [r for b in few if b.epoch == epoch for r in b.rows] for epoch in (0, 1)}
    ranks = [n for n, row in enumerate(rows) if row["task"] == "rank"]
    assert sorted(per_epoch[0]) == sorted(per_epoch[1]) == ranks
    assert per_epoch[0] != per_epoch[1]
    for at in range(28):
        (again,) = batches_of(alone, 1, window=1, state=few[at].state)
        assert again.rows.tolist() == few[at + 1].rows.tolist()
    with pytest.raises(IdentityError, match="digest"):
        batches_of(made, 1, state=first[0].state, tasks=None)


def test_ranks_and_micro_batches_add_up(world):
    made = make_trainer(world, GOLD, SOFT, student={"config": BERT | STILL}, batch_tokens=300)
    whole = batches_of(made, 8, batch_tokens=300)
    assert {batch.micro[0].task for batch in whole} == set(HEADS)
    cuts = [
        [
            batches_of(made, 8, batch_tokens=300, rank=rank, world=world_size, accumulate=parts)
            for rank in range(world_size)
        ]
        for world_size, parts in ((1, 1), (1, 3), (2, 2))
    ]
    for number in range(8):
        found = []
        for ranks in cuts:
            made.optimizer.zero_grad()
            totals = 0
            for own in ranks:
                for micro in own[number].micro:
                    total, _ = made.distillation(
                        micro, own[number].counts, made.objective.at(1, 10)
                    )
                    total.backward()
                    totals += total.detach()
            found.append(
                [totals, *(None if p.grad is None else p.grad.clone() for p in made.parameters)]
            )
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-6, allow_subclasses=True)


def test_from_gold_to_a_teacher_to_a_student(world, tmp_path, monkeypatch):
    gold = make_recipe(world, max_steps=60, optimizer={"lr": 0.003})
    summary = train(gold, world.root / "cache", tmp_path / "gold")
    metrics = (tmp_path / "gold" / "metrics.jsonl").read_text().splitlines()
    losses = [one["dev_loss"] for one in map(json.loads, metrics) if "dev_loss" in one]
    assert summary["best_dev_loss"] == min(losses) < losses[0]
    assert {"dev_topic_accuracy", "dev_close_pearson", "dev_rank_f1", "dev_score"} <= set(summary)
    best = tmp_path / "gold" / "best"
    # One cache of all its tasks, without a teacher afterwards.
    tree = world.tree
    teacher = {"path": str(best), "device": "cpu"}
    dump(parse_recipe({**tree, "dump": tree["dump"] | {"teacher": teacher}}), tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    records = [cache.signal(f"scores_{name}") for name in HEADS]
    assert [one.teacher.kind for one in records] == ["multi_task"] * 3
    assert [one.problem for one in records] == ["classification", "regression", "regression"]
    assert records[0].labels == HEADS["topic"]["labels"]
    best.rename(tmp_path / "gone")
    soft = make_recipe(world, SOFT, student={"tasks": HEADS | {"topic": {}}})
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
        one, other = (tmp_path / run / folder / "model.safetensors" for run in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()
    found = evaluate(tmp_path / "whole", EvaluateSection(corpus=world.dev, device="cpu"))
    assert set(found["tasks"]) == set(HEADS)
    assert found["loss"] == pytest.approx(whole["best_dev_loss"], rel=1e-5)
    assert found["score"] == pytest.approx(
        np.mean([one["score"] for one in found["tasks"].values()])
    )
    assert found["tasks"]["close"].keys() >= {"pearson", "spearman", "num_texts"}
    assert found["tasks"]["topic"].keys() >= {"accuracy", "macro_f1", "mcc"}
    assert found["tasks"]["topic"]["labels"] == HEADS["topic"]["labels"]
    # Fine-tuning on one task starts from the student, with all of its weights.
    last = tmp_path / "whole" / "last"
    student = {"config": None, "path": str(last), "tasks": {}, "head_size": None}
    tuned = make_trainer(world, student=student, tasks=["close"])
    held = MultiTaskModel.from_pretrained(last)
    assert list(tuned.model.heads) == ["close"]
    for name, weight in tuned.model.named_parameters():
        assert torch.equal(weight, held.get_parameter(name))
        assert weight.requires_grad
    assert tuned.objective.heads["close"].range == (0, 5)
    assert {row["task"] for row in samples(world) if row["task"] == "close"} == set(
        batches_of(tuned, 1)[0].micro[0].task.split()
    )


def test_a_body_of_the_first_layers_of_a_model(world, tmp_path):
    torch.manual_seed(1)
    base = BertForMaskedLM(BertConfig(**BERT | {"vocab_size": world.size, "num_hidden_layers": 3}))
    base.save_pretrained(tmp_path / "base")
    student = {
        "config": None,
        "path": str(tmp_path / "base"),
        "layers": {"encoder": [1, 2]},
        "pooling": "mean_cls",
    }
    one, other = (make_trainer(world, student=student, seed=seed).model for seed in (1, 2))
    assert len(one.body.encoder.layer) == 2
    for name, weight in one.body.named_parameters():
        assert torch.equal(weight, base.bert.get_parameter(name))
    assert not torch.equal(one.heads["rank"][0].weight, other.heads["rank"][0].weight)
    assert one.config.pooling == "mean_cls"


@pytest.mark.parametrize("head_size", [0, 64])
def test_heads_start_as_the_documentation_says(head_size):
    torch.manual_seed(2)
    body = BERT | {"hidden_size": 96, "vocab_size": 30}
    tasks = {"topic": {"kind": "classification", "labels": [str(n) for n in range(77)]}}
    model = MultiTaskModel(MultiTaskConfig(body, tasks, head_size=head_size))
    head = model.heads["topic"]
    for layer in head[::2] if head_size else [head]:
        fans = sum(layer.weight.shape)
        deviation = (2 / fans) ** 0.5 if head_size else 0.02
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
        assert not layer.bias.any()
    query = model.body.encoder.layer[0].attention.self.query.weight
    assert query.std().item() == pytest.approx(0.02, rel=0.05)  # the body's own


GPT = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    ("recipe", "body", "beside"),
    [("mkd-paper", 21.3e6, 0), ("mkd-teacher-paper", 303.9e6, 1024 * 1025 + 514 * 1024)],
)
def test_published_sizes(recipe, body, beside):
    """Without embeddings; the teacher's count has its pooler, positions and token types."""
    student = load_recipe(recipe).train.student
    heads = {name: one.model_dump() for name, one in student.tasks.items()}
    config = student.config | {"vocab_size": 30522}
    with torch.device("meta"):
        model = MultiTaskModel(MultiTaskConfig(config, heads, head_size=student.head_size))
    tables = [one.weight for one in model.modules() if isinstance(one, torch.nn.Embedding)]
    apart = {id(one) for one in [*tables, *model.heads.parameters()]}
    found = sum(one.numel() for one in model.parameters() if id(one) not in apart)
    assert found + beside == pytest.approx(body, rel=2e-3)


REFUSED = [
    (
        {"tasks": ["topic"], "student": {"tasks": {"topic": {}}}},
        [SOFT | {"signal": "other"}],
        RecipeError,
        "no signal 'other_topic', which task 'topic' needs",
    ),
    (
        {"student": {"tasks": HEADS | {"plain": {}}}},
        [GOLD],
        RecipeError,
        r"tasks\.plain\.labels: is null",
    ),
    (
        {"student": {"tasks": HEADS | {"plain": {"labels": ["a", "b"]}}}},
        [GOLD],
        RecipeError,
        "task 'plain' has no gold labels",
    ),
    (
        {"student": {"tasks": HEADS | {"none": {"labels": ["a", "b"]}}}},
        [GOLD],
        RecipeError,
        r"tasks\.none: .* has the tasks",
    ),
    (
        {"student": {"tasks": HEADS | {"rank": {"kind": "ranking"}}}},
        [GOLD],
        RecipeError,
        "a ranking needs its two gold labels",
    ),
    (
        {"student": {"tasks": HEADS | {"topic": {"labels": ["yes", "no", "maybe"]}}}},
        [SOFT],
        RecipeError,
        r"tasks\.topic\.labels the same names",
    ),
    (
        {"student": {"tasks": HEADS | {"topic": {"kind": "similarity"}}}},
        [SOFT],
        RecipeError,
        "task 'topic' is a similarity with 1",
    ),
    ({}, [{"loss": "score_kl", "signal": "scores"}], RecipeError, "task 'close' says a number"),
    ({}, [{"loss": "cross_entropy"}], RecipeError, "is no term of a multi_task student"),
    ({"target": "src"}, [GOLD], RecipeError, "reads one stream"),
    ({"student": {"config": GPT}}, [GOLD], ModelError, "gpt2 is no encoder"),
    (
        {"student": {"config": BERT | {"num_labels": 2}}},
        [GOLD],
        ModelError,
        "num_labels: follows from",
    ),
    (
        {"student": {"kind": "classifier", "tasks": {}, "head_size": None}},
        [GOLD],
        RecipeError,
        "task_loss",
    ),
]


@pytest.mark.parametrize(("keys", "objective", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_in_a_line(world, keys, objective, error, message):
    with pytest.raises(error, match=message) as found:
        make_trainer(world, *objective, validation={}, **keys)
    assert "\n" not in str(found.value)


def test_labels_that_differ_are_named(world):
    tight = {"tasks": HEADS | {"close": {"kind": "similarity", "range": [0, 4]}}}
    made = make_trainer(world, student=tight, validation={})
    with pytest.raises(CorpusError, match=r"corpus row \d+: its gold label '4.5' lies outside"):
        list(made.stream)
    with pytest.raises(CorpusError, match=r"corpus.tasks.close: row 5 .* lies outside"):
        make_trainer(world, student=tight)
    few = {"tasks": HEADS | {"topic": {"labels": ["no", "yes"]}}}
    with pytest.raises(CorpusError, match=r"tasks.topic.*'maybe' is none of .*tasks.topic.labels"):
        make_trainer(world, student=few)
    # Without labels a term over signals is enough; gold labels then count where there are some.
    made = make_trainer(world, SOFT, GOLD, validation={})
    assert made.backward(next(iter(made.stream))).isfinite().all()
    # A task of no sample ends at once instead of looking for ever.
    made = make_trainer(world, SOFT, student={"tasks": HEADS}, tasks=["topic"], validation={})
    made.stream.tasks = made.stream.tasks.__class__(("none",))
    with pytest.raises(TrainingError, match="no sample of the tasks"):
        next(iter(made.stream))
