"""LitData: chunks written by `optimize`, `StreamingDataset` under `StreamingDataLoader`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize
from peer_loop import Collated, serve
from peer_samples import Samples, collate
from torch import Tensor


class Lit(Collated):
    """Every field a numpy array, chunks of 64 MB as the documentation has it."""

    def convert(self, samples: Path, data: Path) -> None:
        """Write the samples in the peer's format."""
        number = len(Samples(samples))
        optimize(
            fn=functools.partial(sample, str(samples)),
            inputs=list(range(number)),
            output_dir=str(data),
            chunk_bytes="64MB",
            num_workers=2,
        )

    def loader(
        self, data: Path, batch: int, workers: int, seed: int
    ) -> Iterable[dict[str, Tensor]]:
        """Shuffled batches of one epoch, each time it is iterated."""
        found = StreamingDataset(str(data), shuffle=True, seed=seed)
        return StreamingDataLoader(
            found,
            batch_size=batch,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
        )


@functools.cache
def opened(folder: str) -> Samples:
    """Once in each process."""
    return Samples(Path(folder))


def sample(folder: str, row: int) -> dict[str, Any]:
    """One sample."""
    return {"row": row, **opened(folder)[row]}


if __name__ == "__main__":
    serve(Lit())
