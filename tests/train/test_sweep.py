"""Sweeps: which runs they stand for, that each is done once, and what becomes of failures."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kdcache.cli import main
from kdcache.errors import IdentityError, RecipeError, StoppedError
from kdcache.formats.cache import open_cache
from kdcache.recipe import SweepSection, dump_recipe, load_recipe
from kdcache.sweep import runner, workers
from kdcache.sweep.plan import plan_runs, points, short_names
from kdcache.sweep.runner import check_failures, commands, plan_sweep, run_one, run_sweep
from kdcache.sweep.status import Status
from kdcache.sweep.table import metric_names, metric_value, outcome_text
from kdcache.train.evaluation.metrics import lower_is_better
from kdcache.train.runs.loop import train
from tests.train.conftest import GRID
from tests.train.sweep_stub import BREAKS, DIES, FAILS, HANGS, StubWorker
from tests.train.test_loop import metrics, weights

DOCS = Path(__file__).parents[2] / "docs"
TEMPERATURE = "train.objective.1.temperature"


@pytest.fixture
def stubbed(recipe_file, world, tmp_path, monkeypatch):
    """Does a sweep over these seeds by a worker that trains nothing."""
    monkeypatch.setattr(runner, "Worker", StubWorker)

    def sweep(*seeds, jobs=1):
        pairs = [("sweep.grid.train.seed", f"{list(seeds)}"), ("evaluate.corpus", "null")]
        planned = plan_sweep(recipe_file, str(world.cache), tmp_path / "out", pairs)
        return planned, lambda: run_sweep(planned, jobs)

    return sweep


def plan(recipe_file, world, out, *pairs):
    return plan_sweep(recipe_file, str(world.cache), out, list(pairs))


def test_points_are_the_list_on_the_whole_grid():
    section = SweepSection(
        grid={"train.seed": "1, 2", "train.clip_norm": [0.5, None]},
        list=[{"train.batch_tokens": 60}, {"train.batch_tokens": 90, "train.accumulate": 2}],
    )
    found = [tuple(point.values()) for point in points(section)]
    grid = [(1, 0.5), (1, None), (2, 0.5), (2, None)]
    assert found == [(60, *one) for one in grid] + [(90, 2, *one) for one in grid]
    assert points(SweepSection(grid={"train.seed": 7})) == [{"train.seed": 7}]


def test_a_run_is_known_by_its_resolved_recipe(recipe_file, world, tmp_path):
    def names(*pairs):
        return [run.name for run in plan(recipe_file, world, tmp_path / "x", *pairs).runs]

    first = names(*GRID)
    assert len(set(first)) == 4
    # Other words for the same; more of it; and in another order.
    assert names((f"sweep.grid.{TEMPERATURE}", "[1.0, 3.0]"), GRID[1]) == first
    assert names((f"sweep.grid.{TEMPERATURE}", "3,1,5"), GRID[1])[:4] == first[2:] + first[:2]
    lists = "[{train.seed: 2}, {train.seed: 2, train.device: cpu}]"
    assert names(GRID[0], ("sweep.list", lists)) == [first[1], first[3]]
    assert not set(names(*GRID, ("train.max_steps", "7"))) & set(first)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "has no sweep section"),
        ([("sweep.grid.corpus.limit", "5")], "'corpus.limit' cannot be swept"),
        ([("sweep.grid.train.sed", "1")], "train.sed: unknown key; did you mean seed"),
        ([("sweep.grid.train.objective.5.weight", "1")], "no item train.objective.5"),
        ([("sweep.grid.train.seed", "[]")], "sweep.grid.train.seed"),
        ([GRID[1], ("sweep.list", "[{train.seed: 4}]")], "list.0 and grid both set train.seed"),
        (
            [("sweep.grid.dump.signals.threshold.codec", "[{name: threshold, c: 1/20}]")],
            "ask for threshold with c of 0.125 or more",
        ),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_runs(
    recipe_file, world, tmp_path, pairs, said
):
    with pytest.raises(RecipeError, match=re.escape(said)) as caught:
        plan(recipe_file, world, tmp_path / "out", *pairs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sweep_trains_what_train_does(swept, recipe_file, world, tmp_path):
    planned, done = swept
    run = planned.runs[3]
    assert run.settings == {TEMPERATURE: 3.0, "train.seed": 2}
    pairs = [(TEMPERATURE, "3"), ("train.seed", "2")]
    train(load_recipe(recipe_file, pairs), world.cache, tmp_path / "alone")
    there = run.run_path(planned.out)
    # The development set that the runs share gives the same scores, too.
    assert metrics(there) == metrics(tmp_path / "alone")
    for folder in ("best", "last"):
        assert weights(there / folder) == weights(tmp_path / "alone" / folder)
    assert [one["state"] for one in done] == ["done"] * 4
    assert done[3]["evaluation"]["num_sentences"] == 3


def test_what_is_done_is_not_done_again(swept, recipe_file, world, tmp_path, capsys):
    out = Path(shutil.copytree(swept[0].out, tmp_path / "out"))
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "sweep.json"]
    before = {path: path.stat().st_mtime_ns for path in files}
    words = ["sweep", recipe_file, "--cache", str(world.cache), "--out", str(out)]
    grid = [word for path, values in GRID for word in (f"--{path}", values)]
    assert main([*words, *grid, "--json"]) == 0
    said = capsys.readouterr()
    assert "4 of 4 runs are done already" in said.err
    found = json.loads(said.out)
    values = {run["name"]: run["summary"]["best_dev_loss"] for run in found["runs"]}
    means = [row["mean"] for row in found["rows"]]
    assert means == sorted(means)
    for row in found["rows"]:
        one, other = (values[name] for name in row["runs"])
        assert row["mean"] == pytest.approx((one + other) / 2)
        assert row["std"] == pytest.approx(abs(one - other) / 2**0.5)
    left = {path: path.stat().st_mtime_ns for path in before}
    assert left == before
    # By another number, of the evaluations.
    assert main([*words, *grid, "--metric", "chrf"]) == 0
    assert "best first by chrf, higher is better" in capsys.readouterr().out


def test_single_commands_do_the_same(swept, recipe_file, world, tmp_path, monkeypatch, capsys):
    codec = ("sweep.list", "[{dump.signals.threshold.codec: {name: threshold, c: 1/4}}]")
    planned = plan(recipe_file, world, tmp_path / "out", codec, ("train.log_every", "3"))
    [line] = commands(planned)
    steps = [shlex.split(step)[1:] for step in line.split(" && ")]
    assert [step[0] for step in steps] == ["compile", "train", "evaluate"]
    for step in steps:
        assert main(step) == 0
    [run] = planned.runs
    assert planned.folder.finished(run)
    place = run.cache_path(planned.cache, planned.out)
    assert float(open_cache(place).logits("threshold").codec.c) == 0.25
    # A worker finds the same cache, and finds that it is whole.
    state = {p: p.stat().st_mtime_ns for p in Path(place).rglob("*") if p.is_file()}
    again = plan(recipe_file, world, tmp_path / "out", codec, ("train.seed", "5"))
    assert run_one(again, 0)["state"] == "done"
    assert state == {p: p.stat().st_mtime_ns for p in state}


def test_another_cache_is_refused(swept, recipe_file, tiny_cache):
    with pytest.raises(IdentityError, match="holds a sweep over another cache"):
        plan_sweep(recipe_file, str(tiny_cache), swept[0].out, GRID)


def test_an_unknown_metric_is_said_after_the_first_run(stubbed, capsys):
    planned, _ = stubbed(1, 2)
    assert run_sweep(replace(planned, metric="blue"))["done"] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "'blue'" in line]
    said = "no number 'blue' that the table could be sorted by; all runs stay under another "
    assert [said in line for line in lines] == [True]
    assert lines[0].endswith("--metric: dev_loss, seconds, parameters")
    assert metric_names({"a": True, "b": None, "bleu": {"score": 1.5, "how": "x"}}) == ["bleu"]


def test_failures_are_noted_and_the_rest_goes_on(stubbed, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    assert workers.visible_gpus() == ["4", "7"]
    planned, run = stubbed(3, FAILS, BREAKS, DIES, 1, jobs=2)
    found = run()
    gpus = [(one.run_path(planned.out) / "gpu").read_text() for one in planned.runs]
    assert gpus[:2] == ["4", "7"]
    assert set(gpus) == {"4", "7"}
    assert [one["state"] for one in found["runs"]] == ["done", "failed", "failed", "failed", "done"]
    reasons = [one["failure"] for one in found["runs"][1:4]]
    assert reasons[0] == "step 3: loss is nan"
    assert reasons[1].startswith("ZeroDivisionError: something else")
    assert reasons[2].startswith("its process ended with 9")
    with pytest.raises(Exception, match=r"3 of 5 runs failed .*step 3: loss is nan"):
        check_failures(found)
    logs = [planned.folder.log_path(one).read_text() for one in planned.runs]
    assert logs[0].startswith("said by 3")
    assert "Traceback" in logs[2]
    assert [row["mean"] for row in found["rows"]] == [0.2]  # the two that differ in seed alone
    assert "2 done, 3 failed" in outcome_text(found)
    lines = capsys.readouterr().err.splitlines()
    assert any(re.match(r"\[2/5\] failed: seed 91: step 3: loss is nan", line) for line in lines)
    assert any(re.match(r"\[1/5\] done in [\d.]+ s, dev loss 0.3000: seed 3", x) for x in lines)
    # What failed is tried again, and what is done is not.
    pids = {one.name: (one.run_path(planned.out) / "pid").read_text() for one in planned.runs}
    run()
    again = {one.name: (one.run_path(planned.out) / "pid").read_text() for one in planned.runs}
    same = [pids[one.name] == again[one.name] for one in planned.runs]
    assert same == [True, False, False, False, True]


@pytest.mark.parametrize(("number", "raised"), [(15, StoppedError), (2, KeyboardInterrupt)])
def test_a_signal_ends_the_workers_and_all_resumes(stubbed, number, raised):
    planned, run = stubbed(1, HANGS)
    hanging = planned.runs[1].run_path(planned.out) / "pid"

    def stop():
        while not hanging.is_file() or not hanging.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    # Who starts the tests in the background of a shell hands down that Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(raised):
            run()
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(hanging.read_text()), 0)
    assert planned.folder.finished(planned.runs[0])
    assert not planned.folder.finished(planned.runs[1])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_live_table_fits(swept):
    planned, _ = swept
    status = Status(planned.out, planned.runs, [run.name for run in planned.runs[1:]])
    lines = status.lines(20)
    assert lines[0].split() == ["temperature", "seed", "step", "loss", "dev", "loss"]
    assert [line.split()[0] for line in lines[1:-1]] == ["done", "done", "done", "waiting"]
    assert lines[-1].startswith("4 runs: 3 done, 1 waiting")
    assert "6/6" in lines[1]
    assert len(status.lines(4)) == 4


def test_metrics_by_name():
    summary = {"best_dev_loss": 2.0, "steps": 5}
    evaluation = {"bleu": {"score": 30.0}, "shuffled": {"loss_nats": 4.0}}
    names = ("dev_loss", "bleu", "shuffled.loss_nats", "steps", "nothing")
    found = [metric_value(name, summary, evaluation) for name in names]
    assert found == [2.0, 30.0, 4.0, 5.0, None]
    assert [lower_is_better(name) for name in names[:4]] == [True, False, True, False]
    paths = ["train.objective.0.weight", "train.objective.1.weight", "train.seed"]
    assert list(short_names(paths).values()) == ["objective.0.weight", "objective.1.weight", "seed"]


def test_the_array_example_of_the_docs(recipe_file, world, tmp_path):
    """Bash runs it as a scheduler would; the command it comes to is what is asked for."""
    text = (DOCS / "sweeps.md").read_text("utf-8")
    [script] = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)
    [array] = re.findall(r"--array=(\d+)-(\d+)", script)
    tool = tmp_path / "bin" / "kdcache"
    tool.parent.mkdir()
    tool.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > args-$SLURM_ARRAY_TASK_ID\n')
    tool.chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    path = f"{tool.parent}:{os.environ['PATH']}"
    for task in (array[0], array[1]):
        env = {"PATH": path, "SLURM_ARRAY_TASK_ID": task}
        subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, check=True)
        words = (tmp_path / f"args-{task}").read_text().splitlines()
        assert words[0] == "sweep"
        assert words[words.index("--index") + 1] == task
    grid = [(w[2:], v) for w, v in itertools.pairwise(words) if w.startswith("--sweep.")]
    out = tmp_path / "out"
    runs = plan_sweep(recipe_file, str(world.cache), out, grid).runs
    assert len(runs) == int(array[1]) + 1  # no task too few or too many


def test_planning_is_without_torch(recipe_file, world, tmp_path):
    from tests.test_walls import loaded_after, running

    words = ["sweep", recipe_file, "--cache", str(world.cache), "--out", str(tmp_path / "out")]
    words += [word for path, values in GRID for word in (f"--{path}", values)]
    assert not loaded_after(running(*words, "--list")) & {"torch", "transformers"}


def test_a_plan_from_a_file(make_recipe, world):
    tree = yaml.safe_load(dump_recipe(make_recipe()))
    tree["sweep"] = {"grid": {TEMPERATURE: [1, 2], "train.student.config.d_model": [8, 16]}}
    runs = plan_runs(tree, "file", open_cache(world.cache))
    assert [run.label for run in runs] == [
        f"temperature {t}, d_model {d}" for t in (1, 2) for d in (8, 16)
    ]
    assert runs[1].recipe.sweep is None


@pytest.mark.slow
def test_twenty_four_runs_killed_twice(recipe_file, world, tmp_path):
    """Killed and resumed it comes to the same weights as runs that nothing interrupted."""
    grid = ["--sweep.grid." + TEMPERATURE, "1,2", "--sweep.grid.train.objective.1.weight"]
    grid += ["0.2,0.5,0.8", "--sweep.grid.train.seed", "1,2,3,4", "--evaluate.corpus", "null"]
    words = ["sweep", recipe_file, "--cache", str(world.cache), "--out", str(tmp_path / "out")]
    command = [*shlex.split(f"{os.sys.executable} -m kdcache"), *words, *grid, "--jobs", "2"]
    for number, wanted in ((signal.SIGTERM, 5), (signal.SIGKILL, 12)):
        process = subprocess.Popen(command)
        while len(list((tmp_path / "out").glob("runs/*/last"))) < wanted:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) == (143 if number == signal.SIGTERM else -9)
        time.sleep(1)  # workers of a killed sweep notice
    assert subprocess.run(command, check=False).returncode == 0
    pairs = [("evaluate.corpus", "null")]
    pairs += [(word[2:], value) for word, value in zip(grid[::2], grid[1::2], strict=True)][:3]
    planned = plan_sweep(recipe_file, str(world.cache), tmp_path / "out", pairs)
    assert len(planned.runs) == 24
    assert all(planned.folder.finished(run) for run in planned.runs)
    for run in planned.runs[::5]:
        alone = tmp_path / run.name
        train(run.recipe, world.cache, alone)
        assert weights(alone / "last") == weights(run.run_path(planned.out) / "last")
