"""MosaicML streaming: MDS shards, `StreamingDataset` with its batch size, `StreamingDataLoader`."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterable
from pathlib import Path

from peer_loop import Collated, serve
from peer_samples import Samples, collate
from torch import Tensor

# `streaming` asks for two names of torchvision that its sets of pictures alone use, and the
# registry's torchvision does not load beside a torch without CUDA.
for _name in ("", ".datasets", ".transforms", ".transforms.functional"):
    _module = types.ModuleType(f"torchvision{_name}")
    _module.__spec__ = importlib.util.spec_from_loader(_module.__name__, None)
    sys.modules[_module.__name__] = _module
sys.modules["torchvision.datasets"].VisionDataset = type("VisionDataset", (), {})
sys.modules["torchvision.transforms.functional"].to_tensor = None

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


class MDS(Collated):
    """Every field an array of a known dtype, the default shard size."""

    def convert(self, samples: Path, data: Path) -> None:
        """Write the samples in the peer's format."""
        found = Samples(samples)
        columns = {name: f"ndarray:{found.values[name].dtype}" for name in found.names}
        with MDSWriter(out=str(data), columns={"row": "int", **columns}) as writer:
            for row in range(len(found)):
                writer.write({"row": row, **found[row]})

    def loader(
        self, data: Path, batch: int, workers: int, seed: int
    ) -> Iterable[dict[str, Tensor]]:
        """Shuffled batches of one epoch, each time it is iterated."""
        clean_stale_shared_memory()
        found = StreamingDataset(local=str(data), shuffle=True, batch_size=batch, shuffle_seed=seed)
        return StreamingDataLoader(
            found,
            batch_size=batch,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
        )


if __name__ == "__main__":
    serve(MDS())
