"""Out of memory: said in one line, with the settings that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def _is_memory(error: BaseException) -> bool:
    """Whether an allocator gave up; that of the CPU has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        "DefaultCPUAllocator" in str(error)
    )
