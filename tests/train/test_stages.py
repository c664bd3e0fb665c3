"""Several stages as one run: what each begins with, resuming in and between them, refusals."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from kdcache.cli import main
from kdcache.formats.cache import open_cache
from kdcache.recipe import dump_recipe, load_recipe, parse_recipe
from kdcache.recipe.tree import read_yaml
from kdcache.train.evaluation.evaluate import count_parameters
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students.student import build_student
from tests.train import many_ranks
from tests.train.conftest import make_lines
from tests.train.test_masked_lm import BERT, save_tokenizer

LABELS = ["no", "yes"]
STAGES = ["pretraining", "finetuning"]
TINY = {
    "train.student.config.hidden_size": "16",
    "train.student.config.num_hidden_layers": "1",
    "train.student.config.num_attention_heads": "2",
    "train.student.config.intermediate_size": "32",
    "train.device": "cpu",
    "train.max_steps": "4",
    "train.checkpoints.every_steps": "2",
    "train.log_every": "1",
    "train.batch_tokens": "200",
    "train.schedule.warmup_steps": "1",
}


def words_of(values):
    return [word for key, value in values.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Text, a task with labels and one without, a teacher for each stage, and their caches."""
    root = tmp_path_factory.mktemp("stages")
    lines = make_lines(60)[0]
    (root / "text").write_text("".join(line + "\n" for line in lines[:40]))
    labelled = [{"text": line, "label": LABELS[len(line) % 2]} for line in lines[40:55]]
    write(root / "task", labelled)
    write(root / "more", [{"text": line} for line in lines[:10]])
    write(root / "dev", [{"text": line, "label": "no"} for line in lines[55:]])
    torch.manual_seed(3)
    for name, kind in (("bert", BertForMaskedLM), ("task-bert", BertForSequenceClassification)):
        size = save_tokenizer(root / f"{name}-model", lines)
        keys = BERT | {"max_position_embeddings": 128}
        keys |= {"vocab_size": size, "id2label": dict(enumerate(LABELS))}
        kind(BertConfig(**keys)).save_pretrained(root / f"{name}-model")
    teacher = "--dump.teacher.device", "cpu", "--dump.teacher.path"
    words = ["--corpus.fields.text", str(root / "text"), *teacher, str(root / "bert-model")]
    assert main(["dump", "lightpaff-bert:pretraining", "--out", str(root / "pre"), *words]) == 0
    tasks = {
        "given": {**jsonl(root / "task"), "fields": {"text": "text", "label": "label"}},
        "more": jsonl(root / "more"),
    }
    words = ["--corpus.tasks", json.dumps(tasks), "--corpus.label", "label"]
    words += ["--corpus.empty", "keep", *teacher, str(root / "task-bert-model")]
    assert main(["dump", "lightpaff-bert:finetuning", "--out", str(root / "fine"), *words]) == 0
    caches = [f"pretraining={root / 'pre'}", f"finetuning={root / 'fine'}"]
    return SimpleNamespace(root=root, caches=caches, lines=lines)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def jsonl(path):
    return {"format": "jsonl", "path": str(path), "fields": {"text": "text"}}


def command(world, out, *more, caches=None):
    given = [word for cache in caches or world.caches for word in ("--cache", cache)]
    dev = jsonl(world.root / "dev") | {"label": "label"}
    dev["fields"] = {"text": "text", "label": "label"}
    return [
        *("train", "lightpaff-bert", "--out", str(out), *given, *words_of(TINY)),
        *("--stages.finetuning.train.validation.corpus", json.dumps(dev)),
        *("--stages.finetuning.evaluate.corpus", json.dumps(dev), *more),
    ]


def weights(run, stage, folder="last"):
    return load_file(run / stage / folder / "model.safetensors")


def test_stages_are_one_command_and_go_on_where_they_stopped(world, tmp_path, monkeypatch, capsys):
    steps = []
    real, stops = Trainer.step, [2, 6]

    def step(self, batch):
        if stops and len(steps) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        real(self, batch)
        steps.append((self.section.student.kind, self.state.step))

    monkeypatch.setattr(Trainer, "step", step)
    for code in (130, 130, 0, 0):  # stopped in either stage; all is done the last time
        assert main(command(world, tmp_path / "parts")) == code
    stages = [("masked_lm", n) for n in (1, 2, 3, 4)] + [("classifier", n) for n in (1, 2, 3, 4)]
    assert steps == stages
    assert main(["train", *command(world, tmp_path / "whole", "--json")[1:]]) == 0
    capsys.readouterr()
    for stage in ("pretraining", "finetuning"):
        one, other = (weights(tmp_path / run, stage) for run in ("parts", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    # The body goes on with the best of the stage before, the head is new.
    run = load_recipe(str(tmp_path / "whole" / "finetuning" / "recipe.yaml")).train
    assert run.student.path == str(tmp_path / "whole" / "pretraining" / "best")
    made, best = (
        Trainer(run, open_cache(world.root / "fine")),
        weights(tmp_path / "whole", "pretraining", "best"),
    )
    begun = made.model.state_dict()
    body = [name for name in begun if name in best]
    assert len(body) > 10
    assert {name.split(".")[0] for name in set(begun) - set(body)} <= {"classifier", "bert"}
    assert all(torch.equal(begun[name], best[name]) for name in body)
    # A text without a gold label counts in the teacher's term alone, each term over its own.
    batch = next(iter(made.stream))
    labelled = sum(row < 15 for row in batch.rows.tolist())
    assert 0 < labelled < len(batch.rows)
    over = [made.objective.count(number, batch.counts) for number in (0, 1)]
    assert over == [labelled, len(batch.rows)]
    # What is scored is the last stage.
    words = ["--json", "--evaluate.perturb", "{sigmas: [0, 2.0], seeds: [1, 2]}"]
    assert main(["evaluate", str(tmp_path / "whole"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_texts"] == 5
    assert found["latency_seconds"]["num_tokens"] == 128
    assert "latency_cpu_seconds" not in found  # it is on the cpu
    noise = found["perturbed"]
    assert noise["sigma=0"]["loss"] == {"mean": pytest.approx(found["loss"]), "sd": 0}
    assert noise["sigma=2"]["loss"]["sd"] > 0
    assert (tmp_path / "whole" / "finetuning" / "evaluation.json").is_file()


def test_a_stage_does_not_go_on_from_another_start(world, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(command(world, run)) == 0
    run = run.rename(tmp_path / "moved")  # a folder may move
    assert main(command(world, run)) == 0
    (run / "pretraining").rename(tmp_path / "gone")
    (run / "finetuning").rename(run / "later")
    (run / "later" / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    assert main(["evaluate", str(run)]) == 1
    assert "its last stage, finetuning, has not begun; finish" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").rename(run / "later" / "recipe.yaml")
    (run / "later").rename(run / "finetuning")
    assert main(command(world, run)) == 1
    assert "stage finetuning: " in (said := capsys.readouterr().err.splitlines()[-1])
    assert "holds another run: cache.start.digest" in said
    assert main(command(world, run, "--stages.finetuning.train.max_steps", "5")) == 1
    assert "train.max_steps is 4 there and 5 here" in capsys.readouterr().err
    stands = load_recipe(str(run / "recipe.yaml"))  # what was refused has not taken its place
    assert stands.stages["finetuning"].train.max_steps == 4


@pytest.mark.slow
def test_ranks_go_from_stage_to_stage(world, tmp_path):
    overrides = list(TINY.items())
    tree = load_recipe("lightpaff-bert", overrides)
    caches = dict(one.split("=") for one in world.caches)
    keys = {"recipe": dump_recipe(tree), "caches": caches, "out": str(tmp_path / "run")}
    many_ranks.run_ranks(tmp_path / "ranks", [("stages", keys)])
    for stage in ("pretraining", "finetuning"):
        assert json.loads((tmp_path / "run" / stage / "run.json").read_text())["summary"]


PRE = "--stages.pretraining.train"
OTHER = "--stages.finetuning.train"
REFUSED = [
    (
        [f"{PRE}.student.kind", "causal_lm", f"{PRE}.objective", "[{loss: cross_entropy}]"],
        "stage finetuning: train.student.kind is classifier, which a causal_lm of stage pre",
    ),
    ([f"{OTHER}.student.config.hidden_size", "8"], "train.student.config is not that of stage pre"),
    ([f"{OTHER}.objective.1.signal", "no"], "stage finetuning: train.objective.1.signal: "),
    ([f"{OTHER}.objective.7.signal", "no"], "no item train.objective.7|objective.7"),
    (["--train.objective.2.weight", "1"], r"no item .*in stage pretraining; --stages.pretraining"),
    (["--stages.finetuning.stages", "{a: {name: a}}"], "stages.finetuning has stages of its own"),
    (["--stages.finetuning.trian", "{}"], "stages.finetuning.trian: unknown key; did you mean tr"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_stages_that_cannot_be_are_refused_before_the_first(
    world, tmp_path, capsys, words, message
):
    assert main(command(world, tmp_path / "run", *words)) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(message, said), said
    assert not (tmp_path / "run" / "pretraining").exists()


def test_caches_and_outputs_that_do_not_fit_are_refused(world, tmp_path, capsys):
    def said(*words):
        assert main(list(words)) == 1
        return capsys.readouterr().err.splitlines()[-1]

    one, other = world.caches
    wrong = [
        ([one], "stage finetuning of lightpaff-bert-small has no cache: --cache finetuning=CACHE"),
        ([one, one, other], "stage pretraining has a cache already"),
        ([one.partition("=")[2]], "give each its own: --cache pretraining=CACHE --cache fin"),
    ]
    for caches, message in wrong:
        assert message in said(*command(world, tmp_path / "run", caches=caches))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "novel.txt").write_text("It was")
    assert "already holds other files (novel.txt)" in said(*command(world, tmp_path / "full"))
    for name in ("dump", "train"):
        found = said(name, "lightpaff-bert:middle", "--out", "x", "--print-recipe")
        assert "there is no stage 'middle'; it has pretraining, finetuning" in found
    assert "it has none" in said("train", "word-level:one", "--print-recipe")
    more = ["--stages.finetuning.train.seed", "7", "--print-recipe"]
    assert "of stage pretraining alone" in said("train", "lightpaff-bert:pretraining", *more)
    assert main(["train", "lightpaff-bert:finetuning", *more]) == 0
    assert "seed: 7" in capsys.readouterr().out
    words = ["--corpus.fields.text", str(world.root / "text")]
    found = said("dump", "lightpaff-bert", "--out", str(tmp_path / "x"), *words)
    assert "name one of lightpaff-bert-small:pretraining, lightpaff-bert-small:fin" in found
    # Another tokenizer, which gives the same ids to other tokens.
    save_tokenizer(tmp_path / "tokens", [line[::-1] for line in world.lines])
    words += ["--dump.teacher", "null", "--dump.tokenizers.teacher.path", str(tmp_path / "tokens")]
    words += ["--dump.signals", "{masks: {kind: masks, stream: text}}"]
    assert main(["dump", "lightpaff-bert:pretraining", "--out", str(tmp_path / "c"), *words]) == 0
    caches = [f"pretraining={tmp_path / 'c'}", other]
    plain = ["--stages.pretraining.train.objective", "[{loss: cross_entropy, masks: masks}]"]
    found = said(*command(world, tmp_path / "run", *plain, caches=caches))
    assert "stage finetuning: " in found
    assert "are not those of stage pretraining" in found
    assert "dump both with one tokenizer" in found
    assert not (tmp_path / "run").exists()


def test_a_resolved_recipe_of_stages_is_read_back_as_it_is():
    for name in ("lightpaff-bert", "lightpaff-gpt2-paper"):
        recipe = load_recipe(name)
        text = dump_recipe(recipe)
        assert dump_recipe(parse_recipe(read_yaml(text))) == text
        assert recipe.stages["finetuning"].name == f"{recipe.name}:finetuning"
        assert load_recipe(f"{name}:finetuning") == recipe.stages["finetuning"]


#: Recipe, pieces of the vocabulary, and millions of parameters as published and as they are here.
SIZES = [
    ("lightpaff-bert-paper:pretraining", 30522, 25, 25.6),
    ("lightpaff-bert-paper:finetuning", 30522, 25, 25.6),
    ("lightpaff-bert-paper:finetuning", 21128, 20, 20.8),  # BERT's Chinese vocabulary
    ("lightpaff-gpt2-paper:finetuning", 50257, 67, 67.7),
    ("lightpaff-mass-paper:pretraining", 32000, 42, 41.6),
]


@pytest.mark.parametrize(("name", "vocab_size", "published", "ours"), SIZES)
def test_parameters_are_those_of_the_paper(name, vocab_size, published, ours):
    tokenizer = SimpleNamespace(pad_id=0, eos_id=3, bos_id=2)
    with torch.device("meta"):
        model = build_student(load_recipe(name).train.student, tokenizer, vocab_size, 1)
    found = count_parameters(model)["total"] / 1e6
    assert round(found, 1) == ours
    assert found == pytest.approx(published, rel=0.045)


def test_a_stage_without_distillation_needs_no_teacher():
    """The six rows of the paper's Table 7, by the overrides that docs/systems.md gives."""
    hard = [("objective.0.weight", "1"), ("objective.1.weight", "0")]
    first, second = ([(f"stages.{s}.train.{k}", v) for k, v in hard] for s in STAGES)
    both = [(f"train.{k}", v) for k, v in hard]
    for name in ("bert", "gpt2", "mass"):
        for overrides, soft in (
            (both, []),
            (second, STAGES[:1]),
            (first, STAGES[1:]),
            ([], STAGES),
        ):
            stages = load_recipe(f"lightpaff-{name}", overrides).stages
            used = {s: [t.loss for t in one.train.objective if t.used] for s, one in stages.items()}
            assert [s for s in STAGES if any("kl" in loss for loss in used[s])] == soft
            assert all(used[s] for s in STAGES)
        alone = load_recipe(f"lightpaff-{name}:finetuning", both)
        assert [t.used for t in alone.train.objective] == [True, False]


def test_a_classifier_without_distillation_has_the_classes_of_the_cache(world, tmp_path):
    """Rows 1 and 4 of Table 7, whose only classes signal has no weight."""
    hard = {"objective.0.weight": "1", "objective.1.weight": "0"}
    alone = [
        *("train", "lightpaff-bert:finetuning", "--out", str(tmp_path / "ft")),
        *("--cache", world.caches[1].partition("=")[2], *words_of(TINY)),
        *words_of({f"train.{key}": value for key, value in hard.items()}),
    ]
    both = words_of({f"stages.finetuning.train.{key}": value for key, value in hard.items()})
    for words, out in ((alone, "ft"), (command(world, tmp_path / "pt", *both), "pt/finetuning")):
        assert main(words) == 0
        config = json.loads((tmp_path / out / "last" / "config.json").read_text())
        assert config["id2label"] == {"0": "no", "1": "yes"}


def test_lambdas_are_the_papers():
    said = {"bert": (0.0, 1.0), "gpt2": (0.6, 0.4), "mass": (0.3, 0.7)}
    for name, weights in said.items():
        for scale in ("small", "paper"):
            objective = load_recipe(f"lightpaff-{name}-{scale}:pretraining").train.objective
            assert [term.loss for term in objective] == ["cross_entropy", "forward_kl"]
            assert tuple(term.weight for term in objective) == weights
            assert objective[1].temperature == 1
