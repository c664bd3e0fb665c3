"""webdataset: tar shards, a pickled dict of arrays a sample, shuffled in a buffer, `WebLoader`.

The tutorial's way: shards are shuffled, samples in a buffer, batches are made in the workers. A
file for each field would cost a tar header and padding each, so a sample is one file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import webdataset as wds
from peer_loop import Collated, serve
from peer_samples import Samples, collate
from torch import Tensor

SHARDS = 16
BUFFER = 5_000


class Tars(Collated):
    """Samples of one file each."""

    def convert(self, samples: Path, data: Path) -> None:
        """Write the samples in the peer's format."""
        found = Samples(samples)
        data.mkdir()
        most = -(-len(found) // SHARDS)
        with wds.ShardWriter(f"{data}/%06d.tar", maxcount=most, maxsize=1 << 40) as writer:
            for row in range(len(found)):
                writer.write({"__key__": f"{row:09d}", "pyd": {"row": row, **found[row]}})

    def loader(
        self, data: Path, batch: int, workers: int, seed: int
    ) -> Iterable[dict[str, Tensor]]:
        """Shuffled batches of one epoch, each time it is iterated."""
        shards = sorted(map(str, data.glob("*.tar")))
        found = (
            wds.WebDataset(shards, shardshuffle=len(shards), seed=seed)
            .shuffle(BUFFER)
            .decode()
            .to_tuple("pyd")
            .map(lambda fields: fields[0])
            .batched(batch, collation_fn=collate)
        )
        return wds.WebLoader(
            found, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )


if __name__ == "__main__":
    serve(Tars())
