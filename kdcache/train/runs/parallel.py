"""Processes that train one student together: who they are, and what they tell one another.

`torchrun` starts them; one process alone needs no process group. Every rank computes its share of
each global batch. Rank 0, the main one, alone writes the run directory.
"""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdcache.errors import KDCacheError, ModelError, RecipeError, TrainingError

#: Ranks wait this long for one that is busy (with a checkpoint, say) before they give up.
TIMEOUT = timedelta(minutes=30)
#: What messages of a collective that lost a peer have in common; their types say less.
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """One of the processes that train together.

    Attributes:
        rank: number of this one, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same on each; without others the values themselves.

        Args:
            values: any shape, the same on every rank, on the device of the process group.
        """
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def from_main(self, value: _T) -> _T:
        """The main rank's value, on all of them.

        Args:
            value: anything that can be pickled.
        """
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave only when all ranks do; an error of one is an error of all.

        Within it ranks may do different things, none of which wait for another rank.

        Raises:
            TrainingError: another rank failed; with its message.
        """
        if self.world == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        messages: list[str | None] = [None] * self.world
        dist.all_gather_object(messages, None if error is None else str(error) or repr(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise TrainingError(f"rank {rank} has stopped, so this one does: {message}")


def is_main() -> bool:
    """Whether this process is the one that speaks for all that torchrun started."""
    return _number("WORLD_SIZE", 1) == 1 or _number("RANK", 0) == 0


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes that torchrun started; alone where it did not.

    Nothing may hold what was `wrapped` within at its end: a group that ends with such a module
    waits, with the interpreter locked, for threads of its own that wait for the interpreter.

    Args:
        device: of this process; gloo connects those on cpu, nccl those on cuda.

    Raises:
        RecipeError: the environment names no meeting place.
        ModelError: ranks cannot train together on such a device.
        TrainingError: another rank is gone.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield Ranks()
        return
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"train.device {device}: {world} ranks train on cpu or cuda")
    if "MASTER_ADDR" not in os.environ:
        raise RecipeError(
            f"environment: WORLD_SIZE is {world} but MASTER_ADDR is not set; start the ranks with "
            "torchrun, or unset RANK and WORLD_SIZE to train with one process"
        )
    ranks = Ranks(_number("RANK", 0), world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    try:
        if started:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        yield ranks
    except RuntimeError as error:
        if isinstance(error, KDCacheError) or not _is_lost(error):
            raise
        raise TrainingError(
            f"rank {ranks.rank} of {world}: another rank is gone ({str(error).splitlines()[0]}); "
            "look for what it said; the same command, with any number of ranks, goes on from the "
            "last checkpoint"
        ) from None
    # Where a rank is gone the others may wait for it here, so only a good end takes leave.
    if started:
        gc.collect()  # modules in cycles, which would end after the group
        dist.destroy_process_group()


def wrapped(module: nn.Module, ranks: Ranks) -> nn.Module:
    """A module whose backward passes leave the mean over the ranks in its gradients.

    Parameters that no rank used keep no gradient, as with one rank.

    Args:
        module: on its device; where FSDP2 has sharded it, it does so by itself.
        ranks: this one and the others.
    """
    if ranks.world == 1 or is_sharded(module):
        return module
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # A term on a schedule may leave what is learned beside the student unused for a while.
    options: dict[str, Any] = {"find_unused_parameters": True, buffers: False}
    return DistributedDataParallel(module, **options)


def without_exchange(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it, backward passes through a `wrapped` module keep their gradients to this rank.

    FSDP2 exchanges them all the same: whole gradients are what does not fit.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def shard(distillation: nn.Module, student: nn.Module, device: torch.device) -> None:
    """Spread weights over all ranks (FSDP2), layer by layer, and what is left as one more.

    Args:
        distillation: a student and what is learned beside it; changed in place.
        student: the student in it.
        device: where the shards go.

    Raises:
        RecipeError: ranks would use other layers of the student than each other.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    config = student.config
    drops = ("encoder_layerdrop", "decoder_layerdrop", "layerdrop")
    if dropped := [name for name in drops if getattr(config, name, 0)]:
        raise RecipeError(
            f"train.parallel fsdp: the student's {dropped[0]} is {getattr(config, dropped[0])}, "
            "so ranks would leave out different layers; set it to 0, or train.parallel ddp"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in _layers(student):
        fully_shard(layer, mesh=mesh)
    fully_shard(distillation, mesh=mesh)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has spread a module."""
    return hasattr(module, "unshard")


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """Within it, a part of a `shard`ed module can be called by itself."""
    if not is_sharded(module):
        yield
        return
    module.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks; all must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where another is spread; else the tensor.

    Args:
        tensor: the same on every rank.
        like: of its shape.
    """
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    there = tensor.to(like.device)
    # No rank sends: each has read the same file.
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def _layers(student: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost module lists: a student's layers, whatever it calls them."""
    for child in student.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a peer is not there any more."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def _number(key: str, default: int) -> int:
    """A number of the environment, as torchrun sets it."""
    text = os.environ.get(key, str(default))
    if not text.isdecimal():
        raise RecipeError(f"environment: {key} is {text!r}, expected a number; use torchrun")
    return int(text)
