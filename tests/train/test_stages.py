"""Several stages as one run: what each begins with, resuming in and between them, refusals."""

import json
import re
import shlex
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from kdcache.cli import main
from kdcache.errors import RecipeError
from kdcache.formats.cache import open_cache
from kdcache.recipe import dump_recipe, load_recipe, parse_recipe
from kdcache.recipe.tree import read_yaml
from kdcache.sweep.runner import _next, commands, plan_sweep, run_one, run_sweep
from kdcache.train.evaluation.evaluate import count_parameters
from kdcache.train.runs.run import locked
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
    keys["share"] = str(tmp_path / "shared")
    many_ranks.run_ranks(tmp_path / "ranks", [("stages", keys)])
    assert (tmp_path / "run" / "pretraining").is_symlink()
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


def ablations(world, out, *pairs):
    """LightPAFF's Table 7 as a sweep, with a development set of the task."""
    dev = jsonl(world.root / "dev") | {"fields": {"text": "text", "label": "label"}}
    corpus = json.dumps(dev | {"label": "label"})
    given = [*TINY.items(), *((f"{OTHER[2:]}.{k}", v) for k, v in [("validation.corpus", corpus)])]
    given += [("stages.finetuning.evaluate.corpus", corpus), *pairs]
    return plan_sweep("lightpaff-bert-ablations", world.caches, out, given)


def test_table_7_is_one_sweep_that_trains_each_stage_once(world, tmp_path, monkeypatch, capsys):
    steps = []
    real = Trainer.step

    def step(self, batch):
        real(self, batch)
        steps.append(self.section.student.kind)

    monkeypatch.setattr(Trainer, "step", step)
    sweep = ablations(world, tmp_path / "sweep")
    hard, soft = (1.0, 0.0), (0.0, 1.0)
    both = (0.5, 0.5)
    rows = {
        "FT": (None, hard),
        "FT + KD": (None, both),
        "PT, FT": (hard, hard),
        "PT + KD, FT": (soft, hard),
        "PT, FT + KD": (hard, both),
        "PT + KD, FT + KD": (soft, both),
    }
    found = {}
    for number, run in enumerate(sweep.runs):
        stages = [run.recipe.kept.get(stage) for stage in STAGES]
        (name,) = run.settings.values()
        found[name] = tuple(
            None if one is None else tuple(term.weight for term in one.train.objective)
            for one in stages
        )
        assert run_one(sweep, number)["state"] == "done"
    assert found == rows
    assert len({run.name for run in sweep.runs}) == 6
    # Two pre-trainings, of four steps each, for four rows; a fine-tuning for every row.
    assert [steps.count(kind) for kind in ("masked_lm", "classifier")] == [2 * 4, 6 * 4]
    shared = sorted((tmp_path / "sweep" / "shared").iterdir())
    links = [run.run_path(sweep.out) / "pretraining" for run in sweep.runs]
    assert [link.is_symlink() for link in links] == [False] * 2 + [True] * 4
    assert links[2].resolve() == links[4].resolve() != links[3].resolve() == links[5].resolve()
    assert {link.resolve() for link in links[2:]} == set(shared)
    # All of it is what each command alone makes, and what is there is found.
    alone = commands(ablations(world, tmp_path / "alone"))
    for number in (0, 4):
        for words in alone[number].split(" && "):
            assert main(shlex.split(words)[1:]) == 0
        one, other = (
            weights(sweep.runs[number].run_path(root), "finetuning")
            for root in (sweep.out, tmp_path / "alone")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
    capsys.readouterr()
    steps.clear()
    result = run_sweep(sweep)
    assert "6 of 6 runs are done already" in capsys.readouterr().err
    assert (result["done"], result["failed"], len(result["rows"])) == (6, 0, 6)
    for run in result["runs"]:
        path = tmp_path / "sweep" / "runs" / run["name"]
        assert run["run"] == str(path / "finetuning")
        assert run["evaluation"]["num_texts"] == 5
        parts = [json.loads(part.read_text()) for part in path.glob("*/run.json")]
        seconds = sum(part["summary"]["seconds"] for part in parts)
        assert run["summary"]["seconds"] == pytest.approx(seconds)
    assert not steps
    # A row without the first stage is that stage's own recipe.
    words = [*("train", "lightpaff-bert:finetuning", "--out", str(tmp_path / "own"))]
    words += ["--cache", world.caches[1].partition("=")[2], *words_of(TINY)]
    assert main(words) == 0
    own = load_file(tmp_path / "own" / "last" / "model.safetensors")
    row = weights(sweep.runs[1].run_path(sweep.out), "finetuning")
    assert all(torch.equal(own[name], row[name]) for name in row)
    assert main(["report", str(tmp_path / "sweep")]) == 0
    assert "PT + KD, FT + KD" in (tmp_path / "sweep" / "report.md").read_text()


def test_settings_of_stages_are_shown_as_they_are(world, tmp_path):
    seed, weight = "train.seed", "stages.pretraining.train.objective.0.weight"
    own = "stages.finetuning.train.seed"
    items = [{weight: 0.5}, {"stages.pretraining.skip": True, weight: 0.5}, {own: 7}]
    sweep = ablations(world, tmp_path / "sweep", ("sweep.list", json.dumps(items)))
    paths = (weight, "stages.pretraining.skip", own)
    found = [tuple(run.settings[path] for path in paths) for run in sweep.runs]
    assert found == [(0.5, False, 1), (None, True, 1), (0.0, False, 7)]
    pairs = ("sweep.list", json.dumps([{own: 7}])), (f"sweep.grid.{seed}", "3")
    (run,) = ablations(world, tmp_path / "sweep", *pairs).runs
    assert (run.settings[seed], run.settings[own]) == (3, 3)  # the grid comes last
    (run,) = ablations(world, tmp_path / "x", ("sweep.list", "[{name: a, train.seed: 9}]")).runs
    assert [stage.train.seed for stage in run.recipe.kept.values()] == [9, 9]
    assert run.label == "a"
    with pytest.raises(RecipeError, match="items of a list have names"):
        ablations(world, tmp_path / "x", ("sweep.grid.name", "a"))
    for names in ("[{name: a, train.seed: 1}, {train.seed: 2}]", "[{name: a}, {name: a}]"):
        with pytest.raises(RecipeError, match="give each item its own, or none any"):
            ablations(world, tmp_path / "x", ("sweep.list", names))


def test_workers_train_what_need_not_wait_first(world, tmp_path):
    sweep = ablations(world, tmp_path / "sweep", ("sweep.grid.train.seed", "1,2"))
    one, same, kd = sweep.runs[4], sweep.runs[8], sweep.runs[6]
    assert [run.settings["name"] for run in (one, same, kd)] == [
        "PT, FT",
        "PT, FT + KD",
        "PT + KD, FT",
    ]
    assert len({run.recipe.kept["pretraining"].train.seed for run in (one, same, kd)}) == 1
    waiting = [same, kd, sweep.runs[0]]
    # What another run is pre-training is left until all else has begun.
    assert [_next(sweep, waiting, None, [one]) for _ in range(3)] == [kd, sweep.runs[0], same]
    assert not waiting
    # It is no reason to wait once it is done.
    shared = one.first_shared(sweep.cache, sweep.out)
    shared.mkdir(parents=True)
    (shared / "run.json").write_text(json.dumps({"summary": {"steps": 4}}))
    assert _next(sweep, [same, kd], None, [one]) == same


def test_who_comes_second_waits_and_finds_the_stage_done(world, tmp_path, caplog):
    caplog.set_level("INFO", "kdcache")
    share = tmp_path / "shared"
    words = [*command(world, tmp_path / "one"), "--share", str(share)]
    assert main(words) == 0
    (stage,) = share.iterdir()
    done = []
    with locked(stage):
        other = [*command(world, tmp_path / "two"), "--share", str(share)]
        thread = threading.Thread(target=lambda: done.append(main(other)))
        thread.start()
        thread.join(3)
        assert thread.is_alive()  # it waits for whoever trains there
        assert "another run is training here; waiting for it to end" in caplog.text
    thread.join(60)
    assert done == [0]
    assert (tmp_path / "two" / "pretraining").resolve() == stage.resolve()
    one, two = (weights(tmp_path / name, "finetuning") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_shared_and_skipped_stages_that_cannot_be_are_refused(world, tmp_path, capsys):
    def said(*words):
        assert main(list(words)) == 1
        return capsys.readouterr().err.splitlines()[-1]

    run, share = tmp_path / "run", ["--share", str(tmp_path / "shared")]
    assert main([*command(world, run), *share]) == 0
    more = ["--stages.pretraining.train.seed", "5"]
    assert "is of another run" in said(*command(world, run, *more), *share)
    # A run that has its own stage keeps it.
    own = tmp_path / "own"
    assert main(command(world, own)) == 0
    assert main([*command(world, own), *share]) == 0
    assert not (own / "pretraining").is_symlink()
    skip = "--stages.pretraining.skip", "true"
    assert "already holds other files (pretraining)" in said(*command(world, own, *skip))
    assert main(command(world, tmp_path / "ft", *skip)) == 0
    assert not (tmp_path / "ft" / "pretraining").exists()
    both = [*skip, "--stages.finetuning.skip", "true"]
    assert "skip is true in all stages" in said(*command(world, tmp_path / "x", *both))
    alone = "train", "lightpaff-bert:finetuning", "--cache", str(world.root / "fine"), *both[2:]
    assert "skip is true" in said(*alone, "--out", str(tmp_path / "x"))
    sweep = "sweep", "lightpaff-bert-ablations", "--out", str(tmp_path / "sweep")
    first = ["--cache", world.caches[0]]
    assert "stage finetuning of lightpaff-bert-ablations-small has no cache" in said(*sweep, *first)
    given = [word for cache in world.caches for word in ("--cache", cache)]
    for path in ("stages.before.train.seed", "dump.signals.classes.codec", "skip", "stages.x"):
        found = said(*sweep, *given, f"--sweep.grid.{path}", "1")
        assert (
            f"{path!r} cannot be swept; a sweep varies fields of train, and of one stage" in found
        )
    assert not (tmp_path / "sweep").exists()
    one = "sweep", "word-level", "--out", str(tmp_path / "sweep"), *given
    assert "--cache is given 2 times" in said(*one, "--sweep.grid.train.seed", "1")
    with pytest.raises(SystemExit):
        main(["train", "word-level", "--cache", "c", "--out", "o", *share])
    assert "has no stages" in capsys.readouterr().err
