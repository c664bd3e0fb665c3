"""Two processes train as one: gradients, runs, checkpoints; and what happens when one dies."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcache.errors import ModelError, RecipeError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.recipe import dump_recipe, parse_recipe
from kdcache.train.runs.parallel import Ranks, joined
from kdcache.train.runs.trainer import Trainer
from tests.report.kinds import make_kinds
from tests.train.conftest import STUDENT
from tests.train.many_ranks import environment, free_port, run_ranks, steps, train

STEPS = 4
JUMPS = [{"step": 2, "value": 0.0}, {"step": 4, "value": 0.1}]
TERMS = [
    {"loss": "cross_entropy", "weight": 0.5},
    {"loss": "forward_kl", "weight": 0.7, "signal": ["targets", "best"]},
    {"loss": "jensen_shannon", "weight": 0.3, "signal": "targets"},
    {
        "loss": "hidden_mse",
        "weight": 0.2,
        "signal": "hidden",
        # Its projections rest at some steps, and must get no gradient then.
        "weight_schedule": {"shape": "steps", "jumps": JUMPS},
    },
    {"loss": "attention_mse", "weight": 3.0, "signal": "attention"},
    {"loss": "cross_entropy", "weight": 0.3, "hypotheses": "beams"},
    {"loss": "masked_kl", "weight": 0.4, "signal": "mlm"},
]
#: Over pairs of texts, some of which have scores.
SCORED = [{"loss": "cross_entropy"}, {"loss": "score_mse", "weight": 0.4, "signal": "nli"}]


def step_tree(parallel: str, accumulate: int, batch_tokens: int) -> dict:
    scored = batch_tokens == SCORED_TOKENS
    train = {
        "student": {"config": STUDENT | {"dropout": 0.0, "encoder_layers": 2}},
        "source": "pair" if scored else "src",
        "objective": SCORED if scored else TERMS,
        "device": "cpu",
        "parallel": parallel,
        "accumulate": accumulate,
        "activation_checkpointing": batch_tokens == 8,
        "batch_tokens": batch_tokens,
        "clip_norm": 0.5,
        "optimizer": {"lr": 0.01},
        "schedule": {"name": "constant", "warmup_steps": 0},
    }
    return {"name": "test", "train": train}


#: Batches of 1 to 8 samples: of several micro-batches each, and fewer than there are ranks.
SCORED_TOKENS = 50
CASES = [(1, 40), (3, 40), (3, 8), (2, SCORED_TOKENS)]


@pytest.fixture(scope="module")
def caches(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    return {"kinds": str(make_kinds(root / "cache").path), "text": str(world.cache)}


#: Of every kind, for a gate.
GATED = [*TERMS[:2], TERMS[3], TERMS[6]]


def gate_tree() -> dict:
    tree = step_tree("ddp", 3, 8)
    gate = {"terms": ["masked_kl", 1, "hidden_mse"], "module": "sublayer"}
    return tree | {"train": tree["train"] | {"objective": GATED, "gate": gate}}


def run_tree(make_recipe, **train) -> dict:
    """A recipe as a worker reads it; without dropout, which ranks draw for themselves."""
    settings = {"student": {"dropout": 0.0}, "max_steps": 8} | train
    settings["checkpoints"] = {"every_steps": 2, "average_last": 2}
    return make_recipe(**settings).model_dump(mode="json")


#: Runs with dropout, and where they are stopped.
DROPOUT_RUNS = {"at once": [None], "in three": [3, 5, None]}


@pytest.fixture(scope="module")
def done(caches, make_recipe, tmp_path_factory):
    """Everything that two ranks do together, in one pair of processes."""
    root = tmp_path_factory.mktemp("ranks")
    jobs = []
    for parallel in ("ddp", "fsdp"):
        for accumulate, tokens in CASES:
            tree = step_tree(parallel, accumulate, tokens)
            out = str(root / f"{parallel}.{accumulate}.{tokens}")
            jobs.append(
                ("steps", {"tree": tree, "cache": caches["kinds"], "out": out, "count": STEPS})
            )
    gated = {"tree": gate_tree(), "out": str(root / "gated"), "count": STEPS}
    jobs.append(("steps", gated | {"cache": caches["kinds"]}))
    # Rank 0 alone writes, so it alone sees that this is another run, or that the disk is full.
    (root / "other files").mkdir()
    (root / "other files" / "thesis.tex").write_text("")
    run = {"cache": caches["text"], "tree": run_tree(make_recipe)}
    where = {"out": str(root / "other files"), "message": str(root / "refused")}
    jobs.append(("refused", run | where))
    where = {"out": str(root / "full disk"), "message": str(root / "full"), "fault": "disk"}
    jobs.append(("refused", run | where))
    where = {"out": str(root / "poison"), "message": str(root / "nan"), "fault": "loss"}
    jobs.append(("refused", run | where))
    run = {"cache": caches["text"], "out": str(root / "half")}
    jobs.append(("train", run | {"tree": run_tree(make_recipe, **HALF), "overflow": 3}))
    for name, stops in DROPOUT_RUNS.items():
        run = {"cache": caches["text"], "out": str(root / name)}
        tree = run_tree(make_recipe, student={"dropout": 0.1})
        jobs.extend(("train", run | {"tree": tree, "stop": stop}) for stop in stops)
    run = {"cache": caches["text"], "out": str(root / "begun by ddp")}
    jobs.append(("train", run | {"tree": run_tree(make_recipe), "stop": 3}))
    jobs.append(("train", run | {"tree": run_tree(make_recipe, parallel="fsdp"), "stop": 5}))
    out = root / "begun by one"
    train(run_tree(make_recipe), caches["text"], str(out), stop=3)
    run = {"cache": caches["text"], "out": str(out)}
    jobs.append(("train", run | {"tree": run_tree(make_recipe, parallel="fsdp", accumulate=2)}))
    run_ranks(root, jobs)
    return root


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("accumulate", "batch_tokens"), CASES)
def test_two_ranks_take_the_steps_of_one(
    done, caches, tmp_path, parallel, accumulate, batch_tokens
):
    tree = step_tree(parallel, accumulate, batch_tokens)
    one = steps(tree, caches["kinds"], str(tmp_path / "one"), STEPS)
    name = f"{parallel}.{accumulate}.{batch_tokens}"
    ranks = [torch.load(done / f"{name}.{rank}") for rank in range(2)]
    for alone, first, second in zip(one, *ranks, strict=True):
        parts = [found.pop("parts").tolist() for found in (first, second)]
        assert parts[0][0] == parts[1][0] + parts[1][1]  # micro-batches and their stand-ins
        expected = {key: value for key, value in alone.items() if key != "parts"}
        for found in (first, second):
            assert set(found) == set(expected)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert any("beside" in key for key in one[0])
    if batch_tokens != SCORED_TOKENS:
        assert not any(key.startswith("gradient beside.3") for key in one[1])
        assert any(key.startswith("gradient beside.3") for key in one[3])


def test_a_gate_tests_the_gradients_of_all_ranks(done, caches, tmp_path):
    one = steps(gate_tree(), caches["kinds"], str(tmp_path / "one"), STEPS)
    shares = [alone["values"][-2].item() for alone in one]
    assert 0 < sum(shares) < STEPS
    for rank in range(2):
        for alone, found in zip(one, torch.load(done / f"gated.{rank}"), strict=True):
            assert set(found) == set(alone)
            for key in set(alone) - {"parts"}:
                torch.testing.assert_close(found[key], alone[key], rtol=1e-6, atol=1e-6, msg=key)


def test_some_of_those_batches_leave_a_rank_without_samples(done):
    parts = [step["parts"].tolist() for step in torch.load(done / "ddp.3.8.1")]
    assert any(part[0] == 0 for part in parts)
    assert any(part[0] > 0 for part in parts)


def test_two_ranks_go_on_bitwise(done):
    first, other = (done / name for name in DROPOUT_RUNS)
    assert metrics(first) == metrics(other)
    for folder in ("best", "last", "averaged"):
        left, right = ((run / folder / "model.safetensors").read_bytes() for run in (first, other))
        assert left == right


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(done):
    said = {(done / f"nan.{rank}").read_text() for rank in range(2)}
    (line,) = said
    assert line.startswith("TrainingError: step 1: loss is nan")
    assert "corpus rows" in line
    assert "sample ids" in line


#: In all that can be asked for at once.
HALF = {
    "precision": "float16",
    "parallel": "fsdp",
    "activation_checkpointing": True,
    "max_steps": 6,
}


def test_shards_leave_out_a_step_together_in_float16(done, caches, make_recipe, tmp_path):
    one = tmp_path / "one"
    train(run_tree(make_recipe, **HALF), caches["text"], str(one), overflow=3)
    lines = [line for line in metrics(done / "half") if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert lines[2]["grad_norm"] is None
    losses = [
        [line["loss"] for line in metrics(run) if "loss" in line] for run in (done / "half", one)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0][2] != losses[0][3]


@pytest.mark.parametrize(
    ("settings", "device", "error", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "cpu", RecipeError, "MASTER_ADDR is not set; start"),
        ({"WORLD_SIZE": "two"}, "cpu", RecipeError, "WORLD_SIZE is 'two', expected a number"),
        ({"WORLD_SIZE": "2"}, "mps", ModelError, "2 ranks train on cpu or cuda"),
    ],
    ids=["by hand", "no number", "mps"],
)
def test_ranks_that_cannot_meet_say_why(monkeypatch, settings, device, error, message):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(error, match=message), joined(torch.device(device)):
        raise AssertionError("joined")


def test_what_several_ranks_cannot_do_is_refused(world, make_recipe):
    cache = open_cache(world.cache)
    with pytest.raises(RecipeError, match=r"train\.while_dumping is set and 2 ranks train"):
        Trainer(make_recipe(while_dumping=True).train, cache, Ranks(0, 2))
    student = {"decoder_layerdrop": 0.1}
    with pytest.raises(RecipeError, match=r"decoder_layerdrop is 0\.1.* or train\.parallel ddp"):
        Trainer(make_recipe(student=student, parallel="fsdp").train, cache, Ranks(0, 2))


def test_another_error_is_not_taken_for_a_lost_rank(monkeypatch):
    for key, value in environment(0, 1, free_port()).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match=r"^shapes") as caught, joined(torch.device("cpu")):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, TrainingError)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def assert_same_run(run: Path, other: Path) -> None:
    """Metrics within the noise of float32 sums in another order."""
    for left, right in zip(metrics(run), metrics(other), strict=True):
        terms = (left.pop("terms", {}), right.pop("terms", {}))
        assert left == pytest.approx(right, rel=2e-4, abs=1e-6)
        assert terms[0] == pytest.approx(terms[1], rel=2e-4, abs=1e-6)


def test_runs_change_hands_between_worlds_and_ways(done, caches, make_recipe, tmp_path):
    whole = tmp_path / "whole"
    train(run_tree(make_recipe), caches["text"], str(whole))
    assert_same_run(done / "begun by one", whole)
    train(run_tree(make_recipe), caches["text"], str(done / "begun by ddp"))
    assert_same_run(done / "begun by ddp", whole)
    for folder in ("best", "last", "averaged"):
        names = sorted(path.name for path in (whole / folder).iterdir())
        for run in ("begun by one", "begun by ddp"):
            assert sorted(path.name for path in (done / run / folder).iterdir()) == names
            compare_weights(done / run / folder, whole / folder)


def compare_weights(folder: Path, other: Path) -> None:
    left, right = (load_file(path / "model.safetensors") for path in (folder, other))
    assert set(left) == set(right)
    for name, tensor in left.items():
        if name.endswith("k_proj.bias"):
            continue  # softmax does not see it: its gradient is noise, which Adam scales up
        torch.testing.assert_close(tensor, right[name], rtol=1e-3, atol=1e-4, msg=name)


def test_what_the_main_rank_meets_stops_the_others_too(done):
    said = [(done / f"refused.{rank}").read_text() for rank in range(2)]
    assert said[0].startswith("StorageError: ")
    assert "already holds other files (thesis.tex)" in said[0]
    assert said[1].startswith("TrainingError: rank 0 has stopped, so this one does: ")
    assert said[1].endswith(said[0].removeprefix("StorageError: "))
    said = [(done / f"full.{rank}").read_text() for rank in range(2)]
    assert "the disk is full" in said[0]
    assert said[1].startswith("TrainingError: rank 0 has stopped, so this one does: ")
    assert "the disk is full" in said[1]


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from kdcache.cli import main
from kdcache.train.runs import trainer
real = trainer.Trainer.step
def step(self, batch):
    if self.state.step == 5 and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, batch)
trainer.Trainer.step = step
sys.exit(main(sys.argv[1:]))
"""


def test_where_a_rank_is_killed_the_other_ends_and_one_goes_on(caches, make_recipe, tmp_path):
    recipe = parse_recipe(run_tree(make_recipe))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    words = ["train", str(tmp_path / "recipe.yaml"), "--cache", caches["text"]]
    command = [sys.executable, "-c", KILLED, *words, "--out", str(tmp_path / "run")]
    port = free_port()
    ranks = [
        subprocess.Popen(command, env=environment(rank, 2, port), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [one.communicate(timeout=300)[1] for one in ranks]
    assert [one.returncode for one in ranks] == [1, -signal.SIGKILL], said
    (line,) = [line for line in said[0].splitlines() if line.startswith("kdcache: ")]
    assert line.startswith("kdcache: rank 0 of 2: another rank is gone (")
    assert "goes on from the last checkpoint" in line
    assert "Traceback" not in said[0]
    whole = tmp_path / "whole"
    for run in (tmp_path / "run", whole):
        train(run_tree(make_recipe), caches["text"], str(run))
    assert [line["step"] for line in metrics(whole) if "loss" in line] == list(range(1, 9))
    assert_same_run(tmp_path / "run", whole)


LEAVING = """
import gc, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
torch.set_num_threads(1)
from kdcache.cli import main
real = dist.destroy_process_group
def destroy():
    print("left:", sum(type(one) is DistributedDataParallel for one in gc.get_objects()))
    # The group's own threads have something to free, and wait for the interpreter.
    sys.setswitchinterval(1000)
    dist.all_gather_object([None, None], "leaving")
    real()
dist.destroy_process_group = destroy
sys.exit(main(sys.argv[1:]))
"""


def test_ranks_leave_after_what_they_exchanged_with(caches, make_recipe, tmp_path):
    recipe = parse_recipe(run_tree(make_recipe, max_steps=2))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    words = ["train", str(tmp_path / "recipe.yaml"), "--cache", caches["text"]]
    command = [sys.executable, "-c", LEAVING, *words, "--out", str(tmp_path / "run")]
    port = free_port()
    ranks = [
        subprocess.Popen(command, env=environment(rank, 2, port), stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [one.communicate(timeout=120)[0] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
            one.communicate()
    assert [one.returncode for one in ranks] == [0, 0]
    assert [text.splitlines()[0] for text in said] == ["left: 0"] * 2
