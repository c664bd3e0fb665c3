"""kdcache itself, under the same loop as its peers; `batch` counts tokens here, not samples."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from kdcache_tensors import SIGNAL, tensors_of
from peer_loop import serve
from torch import Tensor

import kdcache
from kdcache.train.batches.stream import GlobalBatch


class Side:
    """`kdcache.batches`.

    Args:
        threads: that gather; None: as many as an order says workers.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def loader(self, data: Path, batch: int, workers: int, seed: int) -> Iterable[GlobalBatch]:
        """Shuffled batches of one epoch, each time it is iterated."""
        threads = workers if self.threads is None else self.threads
        return kdcache.batches(
            data, signals=[SIGNAL], batch_tokens=batch, seed=seed, threads=threads
        )

    def tensors(self, batch: GlobalBatch) -> dict[str, Tensor]:
        """All tensors of a batch."""
        return tensors_of(batch.micro[0])

    def tokens(self, batch: GlobalBatch) -> int:
        """Target tokens of a batch."""
        return batch.num_tokens


if __name__ == "__main__":
    serve(Side(*map(int, sys.argv[1:])))
