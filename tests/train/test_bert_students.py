"""PKD and TinyBERT for BERT classifiers: recipes against the papers' equations, text by text."""

import json
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers import BertForSequenceClassification as Bert

from kdcache.dump.runner import dump
from kdcache.errors import RecipeError
from kdcache.formats.cache import open_cache
from kdcache.recipe import load_recipe, parse_recipe
from kdcache.train.runs.trainer import Trainer
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import BERT, save_tokenizer

LABELS = ["no", "maybe", "yes"]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What both paper recipes read of a teacher of 12 narrow layers, and other pooled states."""
    root = tmp_path_factory.mktemp("bert")
    lines = make_lines(24)[0]
    rows = [{"text": t, "label": LABELS[len(t.split()) % 3]} for t in lines]
    (root / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = save_tokenizer(root / "teacher", lines)
    torch.manual_seed(3)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    config = BERT | STILL | {"vocab_size": size, "num_hidden_layers": 12} | names
    teacher = Bert(BertConfig(**config)).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    teacher.save_pretrained(root / "teacher")
    signals = {}
    for name in ("pkd-bert-paper", "tinybert-paper"):
        signals |= load_recipe(name).model_dump(mode="json")["dump"]["signals"]
    mean = {"kind": "hidden", "stream": "text", "layers": [6], "pool": "mean"}
    masks = {"kind": "masks", "stream": "text"}
    signals |= {"mean": mean, "masks": masks, "masked": mean | {"pool": "cls", "masks": "masks"}}
    tree = {
        "name": "test",
        "corpus": {
            "format": "jsonl",
            "path": str(root / "rows"),
            "fields": {"text": "text", "label": "label"},
            "label": "label",
        },
        "dump": {
            "teacher": {"path": str(root / "teacher"), "device": "cpu"},
            "streams": {"text": {"field": "text"}},
            "signals": signals,
        },
    }
    dump(parse_recipe(tree), root / "cache")
    return SimpleNamespace(root=root, cache=open_cache(root / "cache"), rows=rows)


def trainer(world, name, **student):
    keys = {"train.device": "cpu", "train.batch_tokens": "4000"}
    if "pkd" in name:
        keys["train.student.path"] = str(world.root / "teacher")
    else:
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16} | STILL
        keys |= {f"train.student.config.{key}": str(one) for key, one in sizes.items()}
    keys |= {f"train.student.{key}": one for key, one in student.items()}
    made = Trainer(load_recipe(name, list(keys.items())).train, world.cache)
    with closing(iter(made.stream)) as batches:
        batch = next(batches)
    made.distillation.eval()
    return made, batch


def by_itself(model, ids):
    """Scores, states and attentions of one text."""
    return model(input_ids=ids[None], output_hidden_states=True, output_attentions=True)


def pairs_of(made, batch, world):
    """Outputs of student and teacher and the gold class, text by text."""
    (micro,) = batch.micro
    tokens = micro.streams["text"]
    teacher = AutoModelForSequenceClassification.from_pretrained(
        world.root / "teacher", attn_implementation="eager"
    ).eval()
    made.model.set_attn_implementation("eager")
    assert len(set(tokens.mask.sum(1).tolist())) > 2
    for ids, mask, row in zip(tokens.ids, tokens.mask, micro.rows, strict=True):
        with torch.no_grad():
            theirs = by_itself(teacher, ids[mask])
        gold = torch.tensor([LABELS.index(world.rows[row]["label"])])
        yield by_itself(made.model, ids[mask]), theirs, gold


def agree(made, total, expected):
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-4)  # float16 states
    both = [
        torch.autograd.grad(one, made.parameters, retain_graph=True, allow_unused=True)
        for one in (total, expected)
    ]
    for one, other in zip(*both, strict=True):
        if one is None or other is None:  # what no term reaches, or with a factor of 0
            assert all(found is None or not found.any() for found in (one, other))
            continue
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_pkd_is_the_papers_objective(world):
    made, batch = trainer(world, "pkd-bert-paper")
    # The student begins as the teacher's first six layers here.
    assert made.model.config.num_hidden_layers == 6
    with torch.no_grad():
        for parameter in made.model.bert.encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    (micro,) = batch.micro
    total, values = made.distillation(micro, batch.counts, made.objective.at(1, 10))
    hard, soft, patient, entropy = [], [], [], []
    for own, theirs, gold in pairs_of(made, batch, world):
        hard.append(F.cross_entropy(own.logits, gold))
        warm = (theirs.logits / 10).softmax(1)
        soft.append(-(warm * (own.logits / 10).log_softmax(1)).sum())
        entropy.append(-(warm * warm.log()).sum())
        for j in range(1, 6):
            s, t = own.hidden_states[j][0, 0], theirs.hidden_states[2 * j][0, 0]
            patient.append((s / s.norm() - t / t.norm()).square().sum())
    count = len(hard)
    constant = sum(entropy) / count
    parts = [sum(one) / count for one in (hard, soft, patient)]
    expected = 0.5 * parts[0] + 0.5 * (parts[1] - constant) + 10 * parts[2]
    agree(made, total, expected)
    assert values[2].item() == pytest.approx(parts[2].item() / 2, rel=1e-3)
    assert parts[2] > 0.1
    assert batch.counts["cls"] == count  # a row of each text


def test_tinybert_is_the_papers_objective_stage_by_stage(world):
    made, batch = trainer(world, "tinybert-paper")
    (micro,) = batch.micro
    layers, loss = made.distillation.beside["0"], made.objective.at(1, 48000)
    assert [one.number for one in loss] == [0, 1]
    late = made.objective.at(42101, 48000)
    assert [(one.number, one.weight) for one in late] == [(2, 1.0)]
    total, _ = made.distillation(micro, batch.counts, loss)
    hidden = [[] for _ in range(5)]
    attention = [[] for _ in range(4)]
    kl = []
    for own, theirs, _ in pairs_of(made, batch, world):
        kl.append(F.kl_div(own.logits.log_softmax(1), theirs.logits.softmax(1), reduction="sum"))
        for m in range(5):
            projected = own.hidden_states[m][0] @ layers.projections[str(m)].weight.T
            hidden[m].append((projected - theirs.hidden_states[3 * m][0]).square().mean(1))
        for m in range(4):
            squares = (own.attentions[m][0] - theirs.attentions[3 * m + 2][0]).square()
            attention[m].append(squares.mean(0).flatten())
    expected = sum(torch.cat(rows).mean() for rows in (*hidden, *attention))
    agree(made, total, expected)
    total, _ = made.distillation(micro, batch.counts, late)
    agree(made, total, sum(kl) / len(kl))


def test_states_are_pooled_as_the_teachers_were(world):
    def make(signal, **student):
        tree = load_recipe("pkd-bert-paper").model_dump(mode="json")["train"]
        tree["student"] |= {"path": str(world.root / "teacher")} | student
        term = {"loss": "hidden_mse", "signal": signal}
        term["layers"] = [{"student": 3, "teacher": 6}]
        return Trainer(
            parse_recipe({"name": "t", "train": tree | {"objective": [term]}}).train, world.cache
        )

    made = make("mean", labels=LABELS)
    made.distillation.eval()
    with closing(iter(made.stream)) as batches:
        batch = next(batches)
    total, _ = made.distillation(batch.micro[0], batch.counts, made.objective.at(1, 10))
    rows = [
        (own.hidden_states[3][0].mean(0) - theirs.hidden_states[6][0].mean(0)).square().mean()
        for own, theirs, _ in pairs_of(made, batch, world)
    ]
    torch.testing.assert_close(total, sum(rows) / len(rows), rtol=1e-3, atol=1e-4)
    message = "'masked' is of inputs masked by 'masks'; a classifier learns layers of an encoder"
    with pytest.raises(RecipeError, match=message):
        make("masked", labels=LABELS)


def test_recipes_of_both_sizes_agree_in_all_but_sizes():
    for name in ("pkd-bert", "tinybert"):
        small, paper = (load_recipe(f"{name}-{size}") for size in ("small", "paper"))
        terms = [
            [one.model_dump(exclude={"layers", "weight_schedule"}) for one in of.train.objective]
            for of in (small, paper)
        ]
        assert terms[0] == terms[1]
        for recipe in (small, paper):
            for term in recipe.train.objective:
                for pair in getattr(term, "layers", None) or ():
                    assert set(pair.teacher) <= set(recipe.dump.signals[term.signal].layers)
    config = load_recipe("tinybert-paper").train.student.config
    with torch.device("meta"):
        model = Bert(BertConfig(**config | {"vocab_size": 30522}))
    assert model.num_parameters() / 1e6 == pytest.approx(14.5, abs=0.2)  # as published
