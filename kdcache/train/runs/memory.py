"""Memory: how much a process had at most, and what helps where that was too little."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdcache.errors import TrainingError
from kdcache.recipe import TrainSection
from kdcache.train.batches.stream import GlobalBatch


@contextmanager
def memory_errors(step: int, batch: GlobalBatch, section: TrainSection) -> Iterator[None]:
    """Say of a step that runs out of memory what it was, and what to change.

    Args:
        step: its number.
        batch: what it trains on.
        section: the recipe's train section.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_memory(error):
            raise
        free = f"raise train.accumulate (now {section.accumulate})"
        if not section.activation_checkpointing:
            free += ", or set train.activation_checkpointing true"
        raise TrainingError(
            f"step {step}: out of memory; the batch has {batch.counts['']} samples, "
            f"{batch.num_tokens} target tokens, and is computed in {len(batch.micro)} parts here; "
            f"{free}, and the run goes on; or begin another with a lower train.batch_tokens (now "
            f"{section.batch_tokens})"
        ) from None


def machine_of(device: torch.device) -> dict[str, Any]:
    """What this process runs on, and the most memory it had.

    Args:
        device: that it trains on.

    Returns:
        device, threads (of torch), peak_memory_bytes: on cuda the most that tensors held, else the
        largest resident memory, both since the process began; runs before this one count too.
    """
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        name = device.type
    return {"device": name, "threads": torch.get_num_threads(), "peak_memory_bytes": peak}


def _is_memory(error: BaseException) -> bool:
    """Whether an allocator gave up; that of the CPU has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in str(error)
    )
