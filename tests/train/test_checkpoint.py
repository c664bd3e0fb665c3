"""Checkpoints: bitwise return, faults in mid-save, and no pickle."""

import shutil
from dataclasses import asdict

import pytest
import torch
from torch import nn

from kdcache.errors import StorageError, TrainingError
from kdcache.recipe import OptimizerSection
from kdcache.train.batches.order import ORDER_VERSION, OrderState
from kdcache.train.runs import checkpoint
from kdcache.train.runs.checkpoint import (
    RunState,
    average_weights,
    checkpoints,
    load_checkpoint,
    load_weights,
    publish,
    recover,
    save_checkpoint,
    weights_of,
)
from kdcache.train.runs.optimizer import build_optimizer

ORDER = OrderState("0f" * 8, ORDER_VERSION, 1, 2, 3, 4)


class Tied(nn.Module):
    """A model with a tied matrix, a buffer and a frozen table."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.projection = nn.Linear(4, 7, bias=True)
        self.projection.weight = self.embedding.weight
        self.register_buffer("shift", torch.ones(3))
        self.table = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, ids):
        return self.projection(self.embedding(ids))


def make(seed=0, name="adam"):
    torch.manual_seed(seed)
    model = Tied()
    section = OptimizerSection(name=name, lr=0.1, weight_decay=0.01)
    return model, build_optimizer(section, model, torch.device("cpu"))


def step(model, optimizer):
    model(torch.arange(7)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_at(number: int) -> RunState:
    return RunState(
        order=ORDER, step=number, tokens=12, best_step=1, best_loss=0.1 + 0.2, sums=[1 / 3, 2.0]
    )


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_training_goes_on_bitwise(tmp_path, name):
    model, optimizer = make(name=name)
    for _ in range(3):
        step(model, optimizer)
    save_checkpoint(tmp_path, state_at(3), model, optimizer, keep=2)
    step(model, optimizer)

    other, other_optimizer = make(seed=5, name=name)
    (folder,) = checkpoints(tmp_path)
    state = load_checkpoint(folder, other, other_optimizer)
    assert asdict(state) == asdict(state_at(3))
    step(other, other_optimizer)
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
    assert other.projection.weight is other.embedding.weight


def test_only_the_newest_has_moments_and_old_ones_go(tmp_path):
    model, optimizer = make()
    for number in range(1, 6):
        step(model, optimizer)
        save_checkpoint(tmp_path, state_at(number), model, optimizer, keep=3)
    found = checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-00000003", "step-00000004", "step-00000005"]
    assert [(path / "optimizer.safetensors").exists() for path in found] == [False, False, True]


def test_no_pickle_is_written(tmp_path):
    model, optimizer = make()
    step(model, optimizer)
    save_checkpoint(tmp_path, state_at(1), model, optimizer, keep=1)
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("fault", ["save_file", "sync", "json.dumps"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_in_mid_save_loses_nothing(tmp_path, monkeypatch, fault, error):
    model, optimizer = make()
    step(model, optimizer)
    save_checkpoint(tmp_path, state_at(1), model, optimizer, keep=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    expected = {name: tensor.clone() for name, tensor in weights_of(model).items()}
    step(model, optimizer)

    def broken(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"kdcache.train.runs.checkpoint.{fault}", broken)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            save_checkpoint(tmp_path, state_at(2), model, optimizer, keep=1)
    recover(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (folder,) = checkpoints(tmp_path)
    assert load_checkpoint(folder, model, optimizer).step == 1
    assert all(torch.equal(t, expected[name]) for name, t in weights_of(model).items())


def test_a_kill_at_every_move_leaves_one_whole_folder(tmp_path, monkeypatch):
    target = tmp_path / "best"
    publish(target, lambda folder: (folder / "weights").write_text("old"))
    real = type(target).rename
    for move in range(2):
        count = iter(range(10))

        def rename(self, to, count=count, move=move):
            if next(count) == move:
                raise KeyboardInterrupt
            return real(self, to)

        with monkeypatch.context() as patch:
            patch.setattr(type(target), "rename", rename)
            with pytest.raises(KeyboardInterrupt):
                publish(target, lambda folder: (folder / "weights").write_text("new"))
        recover(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["best"]
        assert (target / "weights").read_text() == "old"
    publish(target, lambda folder: (folder / "weights").write_text("new"))
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_recover_clears_a_temporary_and_an_old_folder(tmp_path):
    for name in (".tmp-best", ".old-best", "best"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_says_so(tmp_path, file, damage):
    model, optimizer = make()
    step(model, optimizer)
    save_checkpoint(tmp_path, state_at(1), model, optimizer, keep=1)
    (folder,) = checkpoints(tmp_path)
    path = folder / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(TrainingError, match="cannot be resumed") as caught:
        load_checkpoint(folder, model, optimizer)
    assert "\n" not in str(caught.value)


def test_weights_of_another_student_are_refused():
    model, _ = make()
    weights = weights_of(model)
    assert set(weights) == {"embedding.weight", "projection.bias", "shift", "table"}
    with pytest.raises(KeyError, match="other weights"):
        load_weights(model, {"embedding.weight": weights["embedding.weight"]})
    with pytest.raises(KeyError, match="shift is"):
        load_weights(model, weights | {"shift": torch.ones(4)})


def test_the_average_is_the_mean(tmp_path):
    model, optimizer = make()
    expected = torch.zeros(7, 4, dtype=torch.float64)
    for number in (1, 2, 3):
        step(model, optimizer)
        expected += model.embedding.weight.detach().double() / 3
        save_checkpoint(tmp_path, state_at(number), model, optimizer, keep=3)
    found = average_weights(checkpoints(tmp_path))
    torch.testing.assert_close(found["embedding.weight"], expected.float())
    assert found["shift"].dtype == torch.float32


def test_decay_spares_biases():
    model, optimizer = make(name="adamw")
    decays = [
        (parameter.dim(), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert decays == [(2, 0.01), (1, 0.0)]
    assert not any(p is model.table for g in optimizer.param_groups for p in g["params"])


def test_an_unreadable_folder_is_not_a_checkpoint(tmp_path):
    assert checkpoints(tmp_path) == []
    (tmp_path / checkpoint.FOLDER / ".tmp-step-00000001").mkdir(parents=True)
    assert checkpoints(tmp_path) == []
    shutil.rmtree(tmp_path / checkpoint.FOLDER)
    recover(tmp_path)
