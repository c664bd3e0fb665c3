"""Checkpoints: what a run needs to go on exactly, whole on disk or not there at all.

    checkpoint/step-00000500/state.json             step, order, best score, running sums
                             model.safetensors
                             optimizer.safetensors  of the newest checkpoint alone

Older checkpoints keep their weights as long as they may be averaged. Dropout is keyed by
(seed, step, rank), so no generator state needs to be kept. What is spread over ranks is gathered
before it is written, so any number of ranks can read it.
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
from kdcache.train.batches.mix_state import MixState, state_from_dict
from kdcache.train.batches.order import OrderState
from kdcache.train.runs.parallel import Ranks, spread_like, whole

FOLDER = "checkpoint"
_TEMPORARY, _OLD = ".tmp-", ".old-"


@dataclass
class RunState:
    """Everything of a run that is neither weights nor optimiser moments.

    Attributes:
        order: where the batch stream stands.
        step: optimiser steps done.
        tokens: target tokens trained on.
        best_step: step of the best weights; None before the first validation.
        best_value: their score by the recipe's metric.
        best_loss: their dev loss, nats per token.
        sums: sums over the steps since the last line of metrics.
        num_summed: those steps.
        num_skipped: those of them that were left out, since their float16 gradients overflowed.
        scaler: state of the loss scale of float16; empty without.
    """

    order: OrderState | MixState
    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best_loss: float | None = None
    sums: list[float] = field(default_factory=list)
    num_summed: int = 0
    num_skipped: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    state: RunState,
    model: nn.Module,
    optimizer: Optimizer,
    keep: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> None:
    """Write a checkpoint, then drop what no longer serves.

    Args:
        run: the run directory.
        state: to be written.
        model: the student.
        optimizer: over its parameters.
        keep: checkpoints whose weights stay, at least 1.
        ranks: all of them must call; the main one writes.

    Raises:
        StorageError: the disk refused; the checkpoints before it are as they were.
    """
    weights, moments = weights_of(model, ranks.main), _moments(model, optimizer, ranks.main)

    def write(folder: Path) -> None:
        save_file(weights, folder / "model.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        text = json.dumps(asdict(state), sort_keys=True, indent=1)
        (folder / "state.json").write_text(text + "\n", encoding="utf-8")

    with ranks.together():
        if ranks.main:
            publish(run / FOLDER / f"step-{state.step:08d}", write)
            drop_checkpoints(run, keep)


def drop_checkpoints(run: Path, keep: int) -> None:
    """Delete what no longer serves; a kill may have come between a checkpoint and this.

    Args:
        run: the run directory.
        keep: checkpoints whose weights stay, at least 1.
    """
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


def weights_of(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, tied ones once, whole, on the CPU.

    Args:
        model: whose weights may be spread over ranks; then all must call.
        keep: whether this rank wants them; else it only sends its parts.
    """
    here = _weights(model)
    return {name: tensor for name in here if (tensor := gathered(here[name], keep)) is not None}


def tied_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """As `weights_of`, but with what is tied under all of its names: one tensor for all."""
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    found = weights_of(model, keep)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if keep:
            found[name] = found[first[id(tensor)]]
    return found


def gathered(tensor: Tensor, keep: bool) -> Tensor | None:
    """A tensor of all ranks on the CPU; None where this one only sends its part."""
    full = whole(tensor.detach())
    return full.cpu().contiguous() if keep else None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, tied ones once, as they lie here."""
    own = (model.named_parameters(), model.named_buffers())  # which name what is tied but once
    names = {name for named in own for name, _ in named}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model; the names must be those of `weights_of`.

    Raises:
        KeyError: they are not.
    """
    expected = _weights(model)
    if set(expected) != set(weights):
        differing = sorted(set(expected) ^ set(weights))
        raise KeyError(f"other weights than this student's: {differing[:3]}")
    with torch.no_grad():
        for name, tensor in weights.items():
            here = expected[name]
            if tensor.shape != here.shape:
                raise KeyError(f"{name} is {list(tensor.shape)}, not {list(here.shape)}")
            here.copy_(spread_like(tensor, here))


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
            else:  # of a file that was to be replaced
                temporary.unlink()


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


def _moments(model: nn.Module, optimizer: Optimizer, keep: bool) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: NAME/exp_avg and so on; see `weights_of`."""
    names = _names(model, optimizer)
    return {
        f"{names[number]}/{key}": tensor
        for number, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if (tensor := gathered(torch.as_tensor(value), keep)) is not None
    }


def _load_moments(model: nn.Module, optimizer: Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put `_moments` back."""
    numbers = {name: number for number, name in enumerate(_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for path, tensor in moments.items():
        name, key = path.rsplit("/", 1)
        spread = tensor.shape == parameters[name].shape and tensor.dim() > 0
        part = spread_like(tensor, parameters[name]) if spread else tensor
        state.setdefault(numbers[name], {})[key] = part
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
