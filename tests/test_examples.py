"""The examples: run as a user runs them, resumed, and held against `kdcache train`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdcache.formats.cache import open_cache
from kdcache.recipe import parse_recipe
from kdcache.train.runs.trainer import Trainer
from tests.formats.labels import SENTENCES, make_cache

FOLDER = Path(__file__).parent.parent / "examples"
STEPS = 18  # about two epochs
SIZES = {"batch-tokens": 30, "accumulate": 3, "size": 16, "lr": 0.02, "save-every": 3}
#: Library that an example needs beside the package's own, and its own options.
EXAMPLES = {
    "bare_loop": ("torch", ["--device", "cpu"]),
    "hf_trainer": ("accelerate", ["--device", "cpu", "--log-every", "1"]),
    "lightning_module": ("lightning", ["--accelerator", "cpu"]),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    texts = {side: lines * 5 for side, lines in SENTENCES.items()}
    return make_cache(tmp_path_factory.mktemp("examples") / "cache", sentences=texts)


@pytest.fixture(scope="module", autouse=True)
def _on_the_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module", params=EXAMPLES)
def name(request):
    pytest.importorskip(EXAMPLES[request.param][0])
    return request.param


def words(name: str, cache: Path, out: Path, **changed: object) -> list[str]:
    """The command line of an example."""
    options = SIZES | {"steps": STEPS} | changed
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["--cache", str(cache), "--out", str(out), *given, *EXAMPLES[name][1]]


def run(name: str, *args: object, **changed: object) -> None:
    """An example in this process."""
    importlib.import_module(name).main(words(name, *args, **changed))


def losses(name: str, out: Path) -> list[float]:
    """Loss of every step from the first; of a step that was done again, the last."""
    if name == "hf_trainer":
        history = json.loads((out / "trainer_state.json").read_text("utf-8"))["log_history"]
        lines = [line for line in history if "loss" in line]
    else:
        lines = [
            json.loads(line) for line in (out / "losses.jsonl").read_text("utf-8").split("\n")[:-1]
        ]
    found = {line["step"]: line["loss"] for line in lines}
    assert list(found) == list(range(1, len(found) + 1))
    return list(found.values())


#: Runs scripts as the shell would, in one process: each would take seconds to import torch.
SCRIPTS = """
import json, os, runpy, sys
for script, words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """Example to a run of it that nothing interrupted, from the shell."""
    root = tmp_path_factory.mktemp("runs")
    names = [name for name, (library, _) in EXAMPLES.items() if importlib.util.find_spec(library)]
    jobs = [[str(FOLDER / f"{name}.py"), words(name, cache, root / name)] for name in names]
    command = [sys.executable, "-c", SCRIPTS, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: root / name for name in names}


@pytest.fixture
def whole(name, runs):
    return runs[name]


def test_the_loss_falls(name, whole):
    found = losses(name, whole)
    assert len(found) == STEPS
    assert sum(found[-4:]) < 0.9 * sum(found[:4])


def test_a_run_that_stops_goes_on_as_if_it_had_not(name, whole, cache, tmp_path):
    run(name, cache, tmp_path / "run", steps=4)  # one step after a checkpoint
    run(name, cache, tmp_path / "run")
    assert losses(name, tmp_path / "run") == losses(name, whole)
    here, there = (
        (out / "student" / "model.safetensors").read_bytes() for out in (tmp_path / "run", whole)
    )
    assert here == there


def test_a_bare_loop_that_is_killed_goes_on_as_if_it_had_not(cache, tmp_path, monkeypatch):
    module = importlib.import_module("bare_loop")
    run("bare_loop", cache, tmp_path / "whole")
    real, calls = module.loss_share, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 8 * SIZES["accumulate"]:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "loss_share", killed)
        with pytest.raises(KeyboardInterrupt):
            run("bare_loop", cache, tmp_path / "run")
    assert len(losses("bare_loop", tmp_path / "run")) == 7
    run("bare_loop", cache, tmp_path / "run")
    assert losses("bare_loop", tmp_path / "run") == losses("bare_loop", tmp_path / "whole")


@pytest.mark.parametrize("accumulate", [1, 5])
def test_losses_are_those_of_kdcache_train(name, cache, tmp_path, accumulate):
    """Accumulating 5, some global batches have fewer samples than micro-batches."""
    changed = {"accumulate": accumulate, "steps": 10, "dropout": 0, "temperature": 2, "soft": 0.7}
    run(name, cache, tmp_path / "run", **changed)
    found = losses(name, tmp_path / "run")
    assert found == pytest.approx(expected_losses(cache, accumulate, 10), rel=2e-5)


def expected_losses(cache: Path, accumulate: int, steps: int) -> list[float]:
    """Of `kdcache train`'s trainer from the same weights."""
    student = importlib.import_module("student")
    opened, size = open_cache(cache), SIZES["size"]
    start = student.new_student(opened, ["src", "tgt"], "logits", size, 0.0, 1)
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 4 * size}
    config = {"model_type": "marian", "d_model": size, "max_position_embeddings": 256}
    config |= {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in sides.items()}
    recipe = parse_recipe(
        {
            "name": "test",
            "train": {
                "student": {"config": config | {"dropout": 0.0, "scale_embedding": True}},
                "objective": [
                    {"loss": "cross_entropy", "weight": 0.3},
                    {"loss": "forward_kl", "weight": 0.7, "temperature": 2.0},
                ],
                "device": "cpu",
                "batch_tokens": SIZES["batch-tokens"],
                "accumulate": accumulate,
                "schedule": {"name": "constant", "warmup_steps": 0},
                "optimizer": {"lr": SIZES["lr"]},
            },
        }
    )
    trainer = Trainer(recipe.train, opened)
    trainer.model.load_state_dict(start.state_dict())
    found, before = [], 0.0
    for batch in trainer.stream:
        trainer.step(batch)
        trainer.settle()
        found.append(trainer.state.sums[0] - before)
        before = trainer.state.sums[0]
        if len(found) == steps:
            break
    return found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"signal": "nothing"}, "no signal 'nothing'"),
        ({"temperature": 0.7, "signal": "src"}, "no signal 'src'"),
    ],
    ids=["signal", "a stream is no signal"],
)
def test_a_signal_that_is_not_there_is_one_line(name, cache, tmp_path, changed, message):
    with pytest.raises(SystemExit, match=message) as caught:
        run(name, cache, tmp_path / "run", **changed)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_a_cache_that_is_not_there_is_one_line(name, tmp_path):
    with pytest.raises(SystemExit, match="nowhere") as caught:
        run(name, tmp_path / "nowhere", tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_the_state_of_other_batches_is_one_line(name, whole, cache, tmp_path):
    run(name, cache, tmp_path / "run", steps=3)
    with pytest.raises(SystemExit, match="order state: digest is") as caught:
        run(name, cache, tmp_path / "run", **{"batch-tokens": 40})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("ranked", ["hf_trainer", "lightning_module"])
def test_two_ranks_see_the_losses_of_one(ranked, cache, tmp_path):
    pytest.importorskip(EXAMPLES[ranked][0])
    changed = {"dropout": 0, "steps": 10, "accumulate": 2}
    run(ranked, cache, tmp_path / "one", **changed)
    script = [str(FOLDER / f"{ranked}.py"), *words(ranked, cache, tmp_path / "two", **changed)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = (
        [*launcher, "--nproc-per-node", "2", *script]
        if ranked == "hf_trainer"
        else [*script, "--devices", "2"]
    )
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    one, two = (losses(ranked, tmp_path / number) for number in ("one", "two"))
    assert len(one) == 10
    assert two == pytest.approx(one, rel=2e-5)
    weights = [tmp_path / number / "student" / "model.safetensors" for number in ("one", "two")]
    first, second = map(load_file, weights)
    for key, tensor in first.items():
        if key.endswith("k_proj.bias"):
            continue  # softmax takes no notice: its gradient is rounding, which Adam scales up
        assert second[key].numpy() == pytest.approx(tensor.numpy(), abs=2e-4), key
