"""Half precision, activations computed again, and memory that runs out."""

import json
from contextlib import closing

import pytest
import torch

from kdcache.errors import ModelError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from kdcache.train.students import distillation as module
from tests.report.kinds import make_kinds
from tests.train.test_loop import metrics, weights

HALF = {"precision": "float16", "dev": False}


def gradients(trainer: Trainer) -> list[torch.Tensor]:
    """Of the first batch, without the loss scale."""
    with closing(iter(trainer.stream)) as batches:
        trainer.backward(next(batches))
    trainer.scaler.unscale_(trainer.optimizer)
    return [parameter.grad for parameter in trainer.parameters]


@pytest.mark.parametrize("signal", [None, "threshold"])
def test_float16_gradients_are_those_of_float32(world, make_recipe, signal):
    cache, student = open_cache(world.cache), {"dropout": 0.0}
    made = [
        Trainer(make_recipe(signal, student=student, dev=False, precision=name).train, cache)
        for name in ("float32", "float16")
    ]
    wide, half = (torch.cat([g.flatten() for g in gradients(one)]) for one in made)
    assert made[1].scaler.get_scale() == 2.0**16
    # Without the scale, or with it left in, they would be off by four orders of magnitude.
    assert (half - wide).norm() < 0.01 * wide.norm()
    assert not torch.equal(half, wide)


def test_small_gradients_survive_float16(world, make_recipe):
    """A mean over a large batch makes gradients that float16 alone would round to zero."""
    cache = open_cache(world.cache)
    tiny = [{"loss": "cross_entropy", "weight": 1e-5}]
    found = []
    for scale in (1.0, 2.0**16):
        trainer = Trainer(
            make_recipe(objective=tiny, student={"dropout": 0.0}, **HALF).train, cache
        )
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        found.append(sum(int((g == 0).sum()) for g in gradients(trainer)))
    assert found[1] < 0.5 * found[0]


def overflowing(monkeypatch, at: set[int], real=Trainer.backward) -> None:
    """Has gradients of some steps overflow."""

    def backward(self, batch):
        values = real(self, batch)
        if self.state.step + 1 in at:
            self.parameters[0].grad.view(-1)[0] = torch.inf
        return values

    monkeypatch.setattr(Trainer, "backward", backward)


def test_a_step_whose_gradients_overflow_is_left_out(world, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(**HALF, max_steps=6, log_every=3)
    overflowing(monkeypatch, {2, 3})
    moved, real = [], Trainer.step

    def step(self, batch):
        before = [p.detach().clone() for p in self.parameters]
        real(self, batch)
        pairs = zip(before, self.parameters, strict=True)
        moved.append(
            (not all(map(torch.equal, *zip(*pairs, strict=True))), self.scaler.get_scale())
        )

    monkeypatch.setattr(Trainer, "step", step)
    summary = train(recipe, world.cache, tmp_path / "run")
    assert [went for went, _ in moved] == [True, False, False, True, True, True]
    assert [scale / 2**16 for _, scale in moved] == [1, 0.5, 0.25, 0.25, 0.25, 0.25]
    lines = metrics(tmp_path / "run")
    assert [(line["step"], line["skipped"]) for line in lines] == [(3, 2), (6, 0)]
    assert all(0 < line["grad_norm"] < 100 for line in lines)
    assert summary["steps"] == 6


def test_the_loss_scale_is_resumed(world, make_recipe, tmp_path, monkeypatch):
    overflowing(monkeypatch, {2, 7})
    train(make_recipe(**HALF), world.cache, tmp_path / "whole")
    real = Trainer.step

    def step(self, batch):
        if self.state.step == 6:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe(**HALF), world.cache, tmp_path / "run")
    train(make_recipe(**HALF), world.cache, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "run" / "last") == weights(tmp_path / "whole" / "last")
    path = "checkpoint/step-00000012/state.json"
    assert json.loads((tmp_path / "run" / path).read_text())["scaler"]["scale"] == 2.0**14


def test_gradients_that_never_fit_stop_the_run(world, make_recipe, tmp_path, monkeypatch):
    overflowing(monkeypatch, set(range(1, 100)))
    with pytest.raises(TrainingError, match=r"step 18: gradients overflow float16 at .* of 0\.5"):
        train(make_recipe(**HALF, max_steps=50), world.cache, tmp_path / "run")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_names_its_samples(world, make_recipe, monkeypatch, precision):
    recipe = make_recipe(dev=False, precision=precision)
    trainer = Trainer(recipe.train, open_cache(world.cache))
    with torch.no_grad():
        trainer.parameters[0].fill_(torch.nan)
    with closing(iter(trainer.stream)) as batches:
        batch = next(batches)
    with pytest.raises(TrainingError, match="step 1: loss is nan") as caught:
        trainer.step(batch)
    said = str(caught.value)
    assert f"holds {len(batch.rows)} samples" in said
    assert ", ".join(map(str, batch.rows[:8].tolist())) in said
    assert all(row.tobytes().hex() in said for row in batch.micro[0].sample_ids[:4])
    assert "\n" not in said


ALL = [
    {"loss": "cross_entropy", "weight": 1.0},
    {"loss": "forward_kl", "weight": 0.5, "signal": "targets"},
    {"loss": "hidden_mse", "weight": 0.2, "signal": "hidden"},
    {"loss": "attention_mse", "weight": 1.0, "signal": "attention"},
]


@pytest.mark.parametrize("terms", [2, 3, 4], ids=["over ids", "hidden states", "attentions"])
def test_activations_computed_again_change_nothing(make_recipe, tmp_path, terms):
    cache = make_kinds(tmp_path / "cache").path
    student = {"dropout": 0.2, "encoder_layers": 2, "decoder_layers": 2, "d_model": 16}
    runs = []
    for again in (False, True):
        recipe = make_recipe(
            objective=ALL[:terms],
            student=student,
            dev=False,
            batch_tokens=24,
            max_steps=5,
            activation_checkpointing=again,
            checkpoints={"average_last": 0},
        )
        out = tmp_path / str(again)
        train(recipe, cache, out)
        runs.append((metrics(out), weights(out / "last")))
    assert runs[0] == runs[1]


def test_activations_are_computed_again(world, make_recipe):
    """So that the test above compares what it says."""
    cache, calls = open_cache(world.cache), []
    for again in (False, True):
        recipe = make_recipe(dev=False, activation_checkpointing=again)
        trainer = Trainer(recipe.train, cache)
        count = []
        layer = trainer.model.get_encoder().layers[0].fc1
        layer.register_forward_hook(lambda *_, count=count: count.append(1))
        with closing(iter(trainer.stream)) as batches:
            trainer.step(next(batches))
        calls.append(len(count))
    assert calls == [1, 2]


def test_a_student_that_cannot_compute_again_says_so(world, make_recipe, monkeypatch):
    from transformers import MarianMTModel

    monkeypatch.setattr(MarianMTModel, "supports_gradient_checkpointing", False)
    recipe = make_recipe(dev=False, activation_checkpointing=True)
    with pytest.raises(ModelError, match=r"train\.activation_checkpointing: MarianMTModel"):
        Trainer(recipe.train, open_cache(world.cache))


def cpu_allocator() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def accelerator() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize("fault", [cpu_allocator, accelerator])
@pytest.mark.parametrize("again", [False, True])
def test_out_of_memory_says_what_to_change(world, make_recipe, monkeypatch, fault, again):
    recipe = make_recipe(dev=False, accumulate=2, activation_checkpointing=again)
    trainer = Trainer(recipe.train, open_cache(world.cache))
    with closing(iter(trainer.stream)) as batches:
        batch = next(batches)
    monkeypatch.setattr(module.Distillation, "forward", lambda *_: fault())
    with pytest.raises(TrainingError, match="step 1: out of memory") as caught:
        trainer.step(batch)
    said = str(caught.value)
    assert f"{len(batch.rows)} samples, {batch.num_tokens} target tokens" in said
    assert "raise train.accumulate (now 2)" in said
    assert "lower train.batch_tokens (now 120)" in said
    assert ("train.activation_checkpointing true" in said) != again
    assert "\n" not in said


def test_another_error_of_a_step_stays_what_it_is(world, make_recipe, monkeypatch):
    trainer = Trainer(make_recipe(dev=False).train, open_cache(world.cache))
    with closing(iter(trainer.stream)) as batches:
        batch = next(batches)

    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(module.Distillation, "forward", broken)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        trainer.step(batch)


def test_memory_settings_may_change_when_a_run_goes_on(world, make_recipe, tmp_path, monkeypatch):
    real = Trainer.step

    def step(self, batch):
        if self.state.step == 5:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe(dev=False), world.cache, tmp_path / "run")
    recipe = make_recipe(dev=False, accumulate=3, activation_checkpointing=True, parallel="fsdp")
    assert train(recipe, world.cache, tmp_path / "run")["steps"] == 12
