"""Runs: what they write, that they learn, and that a killed one goes on exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from kdcache.errors import IdentityError, ModelError, RecipeError, StorageError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.recipe import dump_recipe
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from kdcache.train.runs.validate import score, score_shuffled


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(world, make_recipe, tmp_path_factory):
    """A run that nothing interrupted, and its summary."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, train(make_recipe(), world.cache, run)


def test_a_run_writes_everything(whole, world):
    run, summary = whole
    names = {path.name for path in run.iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml", "run.json", "metrics.jsonl", "checkpoint", "best", "last", "averaged"
    }  # fmt: skip
    assert summary["steps"] == 12
    assert summary["best_dev_loss"] <= summary["dev_loss"]
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert set(lines[0]) == {"step", "epoch", "loss", "terms", "lr", "grad_norm", "tokens"}
    assert set(lines[0]["terms"]) == {"cross_entropy", "forward_kl"}
    dev = [line for line in lines if "dev_loss" in line]
    assert [line["step"] for line in dev] == [6, 12]
    assert set(dev[0]) == {"step", "dev_loss", "dev_loss_shuffled", "dev_accuracy"}
    total = 0.5 * lines[0]["terms"]["cross_entropy"] + 0.5 * lines[0]["terms"]["forward_kl"]
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-5)
    left = sorted(path.name for path in (run / "checkpoint").iterdir())
    assert left == ["step-00000008", "step-00000012"]
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "best")
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    inputs = tokenizer(world.src[:2], return_tensors="pt", padding=True)
    out = model.generate(**inputs, num_beams=2, max_new_tokens=8)
    assert out.shape[0] == 2


def with_metric(make_recipe, name):
    recipe = make_recipe(checkpoints={"every_steps": 3, "average_last": 4})
    section = recipe.train.validation.model_copy(update={"metric": name, "every_steps": 3})
    train = recipe.train.model_copy(update={"validation": section})
    return recipe.model_copy(update={"train": train})


@pytest.mark.parametrize(
    ("name", "best"), [("dev_loss", 9), ("dev_accuracy", 6), ("dev_perplexity", 12)]
)
def test_any_score_chooses_the_best_weights(world, make_recipe, tmp_path, monkeypatch, name, best):
    said = {
        0: {"dev_loss": 9.0, "dev_accuracy": 0.9, "dev_perplexity": 1.0},
        3: {"dev_loss": 4.0, "dev_accuracy": 0.1, "dev_perplexity": 9.0},
        6: {"dev_loss": 3.0, "dev_accuracy": 0.3, "dev_perplexity": 8.0},
        9: {"dev_loss": 2.0, "dev_accuracy": 0.3, "dev_perplexity": 7.0},
        12: {"dev_loss": 2.5, "dev_accuracy": 0.2, "dev_perplexity": 6.0},
    }
    monkeypatch.setattr(Trainer, "validate", lambda self: said[self.state.step])
    run = tmp_path / "run"
    summary = train(with_metric(make_recipe, name), world.cache, run)
    assert summary["best_step"] == best
    assert summary["best_dev_loss"] == said[best]["dev_loss"]
    assert summary[f"best_{name}"] == said[best][name]
    here = load_file(run / "best" / "model.safetensors")
    step = load_file(run / "checkpoint" / f"step-{best:08d}" / "model.safetensors")
    there = {name.partition(".")[2]: tensor for name, tensor in step.items()}
    assert len(here) > 10
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())


def test_an_unknown_metric_is_refused_before_the_first_step(world, make_recipe, tmp_path):
    said = "no 'dev_bleu'; its scores are dev_loss, dev_loss_shuffled, dev_accuracy"
    with pytest.raises(RecipeError, match=said):
        train(with_metric(make_recipe, "dev_bleu"), world.cache, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_averaged_weights_are_the_mean(whole):
    from safetensors.torch import load_file

    run, _ = whole
    parts = [
        load_file(run / "checkpoint" / f"step-{step:08d}" / "model.safetensors") for step in (8, 12)
    ]
    found = load_file(run / "averaged" / "model.safetensors")
    name = "model.encoder.layers.0.fc1.weight"
    kept = f"student.{name}"
    assert torch.allclose(found[name], (parts[0][kept] + parts[1][kept]) / 2)
    assert weights(run / "last") != weights(run / "averaged")


def test_a_finished_run_is_not_touched(whole, world, make_recipe):
    run, summary = whole
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert train(make_recipe(), world.cache, run) == summary
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_the_loss_falls_and_the_source_matters(world, make_recipe, tmp_path):
    summary = train(
        make_recipe(None, max_steps=80, log_every=10, student={"dropout": 0.0}),
        world.cache,
        tmp_path / "run",
    )  # no teacher: the signals of the cache are not read
    lines = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert summary["dev_loss"] < summary["dev_loss_shuffled"]
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "last").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "last")
    args = (model, tokenizer, world.src[100:], world.tgt[100:], torch.device("cpu"))
    assert score(*args).loss_nats == pytest.approx(summary["dev_loss"], rel=1e-5)
    assert score(*args, batch_tokens=7).loss_nats == pytest.approx(summary["dev_loss"], rel=1e-5)
    assert score_shuffled(*args).loss_nats == pytest.approx(summary["dev_loss_shuffled"], rel=1e-5)


@pytest.mark.parametrize("kill_at", [1, 4, 5, 11])
def test_an_interrupted_run_goes_on_bitwise(
    whole, world, make_recipe, tmp_path, monkeypatch, kill_at
):
    run, real = tmp_path / "run", Trainer.step

    def step(self, batch):
        if self.state.step == kill_at:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe(), world.cache, run)
    summary = train(make_recipe(), world.cache, run)
    assert metrics(run) == metrics(whole[0])
    for folder in ("best", "last", "averaged"):
        assert weights(run / folder) == weights(whole[0] / folder)
    for key in set(summary) - {"run", "seconds"}:
        assert summary[key] == whole[1][key], key


def test_sums_between_two_log_lines_survive_a_kill(world, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(log_every=5, dev=False)
    train(recipe, world.cache, tmp_path / "whole")
    real = Trainer.step

    def step(self, batch):
        if self.state.step == 9:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, world.cache, tmp_path / "run")
    train(recipe, world.cache, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from kdcache.recipe import load_recipe
from kdcache.train.runs import trainer
from kdcache.train.runs.loop import train
real = trainer.Trainer.step
def step(self, batch):
    if self.state.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, batch)
trainer.Trainer.step = step
assert not any(name.startswith("kdcache.dump") for name in sys.modules)
train(load_recipe(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


def test_a_run_killed_by_sigkill_goes_on_bitwise(whole, world, make_recipe, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe()))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(world.cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([*command, str(run)], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not (run / "last").exists()
    train(make_recipe(), world.cache, run)
    assert metrics(run) == metrics(whole[0])
    assert weights(run / "last") == weights(whole[0] / "last")


def gradients(recipe, cache) -> tuple[list[torch.Tensor], torch.Tensor]:
    trainer = Trainer(recipe.train, cache)
    batches = iter(trainer.stream)
    values = trainer.backward(next(batches))
    batches.close()
    return [parameter.grad for parameter in trainer.parameters], values


def test_accumulated_gradients_equal_those_of_the_whole_batch(world, make_recipe):
    cache = open_cache(world.cache)
    student = {"dropout": 0.0}
    (one, loss), *others = (
        gradients(make_recipe(student=student, accumulate=n, batch_tokens=400), cache)
        for n in (1, 4, 1000)
    )
    for many, other_loss in others:
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=1e-6)
        for left, right in zip(one, many, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.25, None])
def test_gradients_are_clipped(world, make_recipe, clip_norm):
    trainer = Trainer(make_recipe(clip_norm=clip_norm, dev=False).train, open_cache(world.cache))
    norms = []

    def norm_of_gradients(optimizer, *_):
        gradients = [p.grad.flatten() for p in trainer.parameters if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    trainer.optimizer.register_step_pre_hook(norm_of_gradients)
    batches = iter(trainer.stream)
    trainer.step(next(batches))
    batches.close()
    measured = trainer.state.sums[-1]
    assert measured > 0.25
    assert norms == [pytest.approx(clip_norm or measured, rel=1e-4)]


def test_max_epochs_ends_a_run(world, make_recipe, tmp_path):
    recipe = make_recipe(max_epochs=1, max_steps=1000, dev=False, log_every=1000)
    summary = train(recipe, world.cache, tmp_path / "run")
    cache = open_cache(world.cache)
    assert summary["epochs"] == 1
    assert summary["steps"] < 1000
    assert summary["tokens"] == cache.manifest.streams["tgt"].num_tokens
    assert weights(tmp_path / "run" / "best") == weights(tmp_path / "run" / "last")


def test_bfloat16_trains(world, make_recipe, tmp_path):
    recipe = make_recipe(precision="bfloat16", max_steps=2, dev=False)
    summary = train(recipe, world.cache, tmp_path / "run")
    reference = train(make_recipe(max_steps=2, dev=False), world.cache, tmp_path / "other")
    assert summary["loss"] == pytest.approx(reference["loss"], rel=0.05)
    assert summary["loss"] != reference["loss"]


def test_temperatures_and_weights_enter_the_total(world, make_recipe):
    term = {"loss": "forward_kl", "signal": "threshold", "temperature": 2.0, "weight": 0.5}
    objective = [
        term,
        term | {"temperature_squared": False, "weight": 0.25},
        {"loss": "forward_kl", "signal": "missing", "weight": 0.0},
    ]
    trainer = Trainer(make_recipe(objective=objective).train, open_cache(world.cache))
    assert trainer.objective.names == ["forward_kl.0", "forward_kl.1"]
    batches = iter(trainer.stream)
    total, first, second = trainer.backward(next(batches)).tolist()
    batches.close()
    assert first == pytest.approx(second)
    assert total == pytest.approx(0.5 * 4 * first + 0.25 * second, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"optimizer": {"lr": 0.001}}, "train.optimizer.lr is 0.005 there and 0.001 here"),
        ({"seed": 2}, "train.seed is 1 there and 2 here"),
        ({"signal": "full"}, "train.objective.1.signal is 'threshold' there and 'full' here"),
    ],
    ids=["learning rate", "seed", "signal"],
)
def test_another_run_is_refused(whole, world, make_recipe, change, key):
    with pytest.raises(IdentityError, match=key):
        train(make_recipe(**change), world.cache, whole[0])


def test_a_directory_with_other_files_is_refused(world, make_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StorageError, match=r"already holds other files \(thesis.tex\)"):
        train(make_recipe(), world.cache, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"signal": "beams"}, RecipeError, "cache has no signal 'beams'; it has"),
        ({"objective": []}, RecipeError, "train.objective has no term with a weight"),
        ({"student": {"max_position_embeddings": 8}}, ModelError, "takes 8 positions"),
        ({"student": {"model_type": "marion"}}, ModelError, "knows no such model"),
        ({"student": {"encoder_layer": 3}}, ModelError, "has no encoder_layer"),
        (
            {"validation": {"corpus": {"fields": {"src": "nowhere"}}}},
            RecipeError,
            r"validation.corpus.fields has \['src'\]",
        ),
        ({"optimizer": {"lr": 1e30}, "max_steps": 50}, TrainingError, r"step \d+: loss is"),
    ],
    ids=["signal", "objective", "positions", "model type", "config key", "dev fields", "nan"],
)
def test_what_cannot_be_trained_says_why(world, make_recipe, tmp_path, change, error, message):
    dev = "validation" in change
    with pytest.raises(error, match=message):
        train(make_recipe(**({"dev": dev} | change)), world.cache, tmp_path / "run")


def test_shifted_labels_stop_the_run(world, make_recipe, tmp_path, monkeypatch):
    from kdcache.train.batches import gather

    real = gather.wide_labels

    def shifted(spec, columns):
        coded = real(spec, columns)
        return type(coded)(**(vars(coded) | {"gold": coded.gold.roll(1)}))

    monkeypatch.setattr(gather, "wide_labels", shifted)
    with pytest.raises(TrainingError, match="labels are shifted"):
        train(make_recipe(), world.cache, tmp_path / "run")
