"""Samples for every peer: one neutral folder of flat arrays, and the batch that all must deliver.

A peer's environment has no kdcache. It gets the samples as `NAME.npy` and `NAME.offsets.npy` files,
writes its own format from them, and makes of B samples the tensors that kdcache makes of them:

    rows                         [B] int64
    src.ids, tgt.ids             [B, T] int64, padded with 0
    src.mask, tgt.mask           [B, T] bool
    num_exact, num_drawn         [N] int64 entries at each target token
    gold, entropy                [N] uint8
    tail                         [N, 4] float16
    exact_id, drawn_id           [E] uint16
    exact_code                   [E] uint8
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KNOTS = 4  # of the tail, at every token
STREAMS = ("src", "tgt")
_DTYPES = {
    "num_exact": np.int64,
    "num_drawn": np.int64,
    "exact_id": np.uint16,
    "drawn_id": np.uint16,
    "tail": np.float16,
}


class Samples:
    """The neutral folder; sample m is a dict of small arrays.

    Args:
        folder: with a pair of files for each field.
    """

    def __init__(self, folder: Path) -> None:
        self.names = sorted(
            path.name.removesuffix(".offsets.npy") for path in folder.glob("*.offsets.npy")
        )
        self.values = {name: np.load(folder / f"{name}.npy") for name in self.names}
        self.offsets = {name: np.load(folder / f"{name}.offsets.npy") for name in self.names}

    def __len__(self) -> int:
        return len(self.offsets["tgt"]) - 1

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        sample = {}
        for name in self.names:
            a, b = self.offsets[name][number], self.offsets[name][number + 1]
            sample[name] = self.values[name][a:b]
        return sample


def collate(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
    """The batch of some samples, each a dict with `row` and the fields."""
    names = list(samples[0])
    return collate_columns({name: [sample[name] for sample in samples] for name in names})


def collate_columns(columns: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Tensor]:
    """The batch of some samples, every field a list of arrays, `row` one of numbers."""
    columns = dict(columns)
    rows = np.array(columns.pop("row"), dtype=np.int64)
    lengths = {name: np.array([len(one) for one in columns[name]]) for name in STREAMS}
    flat = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    return assemble(rows, flat, lengths)


def assemble(
    rows: np.ndarray, flat: Mapping[str, np.ndarray], lengths: Mapping[str, np.ndarray]
) -> dict[str, Tensor]:
    """The batch of flat arrays.

    Args:
        rows: [B].
        flat: every field, sample after sample.
        lengths: [B] tokens of each stream.
    """
    batch = {"rows": rows.astype(np.int64)}
    for name, values in flat.items():
        if name in STREAMS:
            mask = np.arange(lengths[name].max()) < lengths[name][:, None]
            ids = np.zeros(mask.shape, dtype=np.int64)
            ids[mask] = values
            batch |= {f"{name}.ids": ids, f"{name}.mask": mask}
        else:
            values = values.astype(_DTYPES.get(name, np.uint8), copy=False)
            batch[name] = values.reshape(-1, KNOTS) if name == "tail" else values
    writable = {name: np.require(array, requirements="W") for name, array in batch.items()}
    return {name: torch.from_numpy(array) for name, array in writable.items()}
