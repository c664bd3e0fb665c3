"""Checkpoints: what a run needs to go on exactly, whole on disk or not there at all.

    checkpoint/step-00000500/state.json             step, order, best score, running sums
                             model.safetensors
                             optimizer.safetensors  of the newest checkpoint alone

Older checkpoints keep their weights as long as they may be averaged. Dropout is keyed by
(seed, step), so no generator state needs to be kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from kdcache.errors import StorageError, TrainingError
from kdcache.formats.stores.commit import storage_errors, sync
from kdcache.train.mix_state import MixState, state_from_dict
from kdcache.train.order import OrderState

FOLDER = "checkpoint"
_TEMPORARY, _OLD = ".tmp-", ".old-"


@dataclass
class RunState:
    """Everything of a run that is neither weights nor optimiser moments.

    Attributes:
        order: where the batch stream stands.
        step: optimiser steps done.
        tokens: target tokens trained on.
        best_step: step of the lowest dev loss; None before the first validation.
        best_loss: that loss, nats per token.
        sums: sums over the steps since the last line of metrics.
        num_summed: those steps.
    """

    order: OrderState | MixState
    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    sums: list[float] = field(default_factory=list)
    num_summed: int = 0


def save_checkpoint(
    run: Path, state: RunState, model: nn.Module, optimizer: Optimizer, keep: int
) -> None:
    """Write a checkpoint, then drop what no longer serves.

    Args:
        run: the run directory.
        state: to be written.
        model: the student.
        optimizer: over its parameters.
        keep: checkpoints whose weights stay, at least 1.

    Raises:
        StorageError: the disk refused; the checkpoints before it are as they were.
    """

    def write(folder: Path) -> None:
        save_file(weights_of(model), folder / "model.safetensors")
        save_file(_moments(model, optimizer), folder / "optimizer.safetensors")
        text = json.dumps(asdict(state), sort_keys=True, indent=1)
        (folder / "state.json").write_text(text + "\n", encoding="utf-8")

    publish(run / FOLDER / f"step-{state.step:08d}", write)
    kept = checkpoints(run)
    for old in kept[:-keep]:
        shutil.rmtree(old)
    for old in kept[-keep:-1]:
        (old / "optimizer.safetensors").unlink(missing_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((run / FOLDER).glob("step-*"))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer) -> RunState:
    """Put a checkpoint's weights and moments back.

    Args:
        folder: from `checkpoints`; the newest one.
        model: a student of the same recipe, on its device.
        optimizer: over its parameters.

    Raises:
        TrainingError: the checkpoint is damaged or of another student.
    """
    try:
        tree = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        order = state_from_dict(tree.pop("order"))
        state = RunState(order=order, **tree)
        load_weights(model, load_file(folder / "model.safetensors"))
        _load_moments(model, optimizer, load_file(folder / "optimizer.safetensors"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise TrainingError(
            f"{folder}: this checkpoint cannot be resumed ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}); delete the run "
            "and train again"
        ) from None
    return state


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, tied ones once, on the CPU."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            found[name] = tensor.detach().cpu().contiguous()
    return found


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model; the names must be those of `weights_of`.

    Raises:
        KeyError: they are not.
    """
    expected = weights_of(model)
    if set(expected) != set(weights):
        differing = sorted(set(expected) ^ set(weights))
        raise KeyError(f"other weights than this student's: {differing[:3]}")
    here = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            if tensor.shape != here[name].shape:
                raise KeyError(f"{name} is {list(tensor.shape)}, not {list(here[name].shape)}")
            here[name].copy_(tensor)


def average_weights(folders: Sequence[Path]) -> dict[str, Tensor]:
    """Mean of the weights of some checkpoints, summed in float64.

    Source: checkpoint averaging as in Vaswani et al. 2017, section 6.1.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for folder in folders:
        for name, tensor in load_file(folder / "model.safetensors").items():
            dtypes[name] = tensor.dtype
            sums[name] = tensor.double() + sums.get(name, 0.0)
    return {name: (total / len(folders)).to(dtypes[name]) for name, total in sums.items()}


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Write a folder so that it is there whole, the one before it, or not at all.

    Args:
        target: its path; a folder that stands there is replaced.
        write: fills an empty folder.

    Raises:
        StorageError: the disk refused.
    """
    temporary = target.with_name(_TEMPORARY + target.name)
    old = target.with_name(_OLD + target.name)
    with _disk_errors(target):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in sorted(temporary.rglob("*")):
                sync(file)
            sync(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover(run: Path) -> None:
    """Clear what an interrupted `publish` left, and put a folder back that it had moved away."""
    for parent in (run, run / FOLDER):
        for old in parent.glob(f"{_OLD}*"):
            target = old.with_name(old.name.removeprefix(_OLD))
            if target.exists():
                shutil.rmtree(old)
            else:
                old.rename(target)
        for temporary in parent.glob(f"{_TEMPORARY}*"):
            if temporary.is_dir():
                shutil.rmtree(temporary)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Safetensors wraps what the operating system said; report both alike."""
    try:
        with storage_errors(target):
            yield
    except SafetensorError as error:
        raise StorageError(f"{target}: cannot be written: {error}") from None


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimiser's parameters, in its own numbering."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: NAME/exp_avg and so on."""
    names = _names(model, optimizer)
    return {
        f"{names[number]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def _load_moments(model: nn.Module, optimizer: Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put `_moments` back."""
    numbers = {name: number for number, name in enumerate(_names(model, optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for path, tensor in moments.items():
        name, key = path.rsplit("/", 1)
        state.setdefault(numbers[name], {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
