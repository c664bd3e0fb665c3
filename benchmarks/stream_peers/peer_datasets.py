"""Hugging Face datasets: Arrow on disk, shuffled, a batch of rows at a time.

Two ways, named by the first argument; in both a DataLoader asks for all rows of a batch at once.
`numpy`: `with_format("numpy")`, a batch of columns that are lists of arrays. `arrow`:
`with_format("arrow")`, a table, whose list columns are flattened without a look at single rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from peer_loop import Collated, serve
from peer_samples import STREAMS, Samples, assemble, collate_columns
from torch import Tensor
from torch.utils.data import DataLoader


class Arrow(Collated):
    """Both ways; the format and the collator differ."""

    def __init__(self, way: str) -> None:
        self.way = way

    def convert(self, samples: Path, data: Path) -> None:
        """Write the samples in the peer's format."""
        table = arrow_table(Samples(samples))
        datasets.Dataset(table).save_to_disk(data)

    def loader(
        self, data: Path, batch: int, workers: int, seed: int
    ) -> Iterable[dict[str, Tensor]]:
        """Shuffled batches of one epoch, each time it is iterated."""
        found = datasets.load_from_disk(str(data)).with_format(self.way)
        return DataLoader(
            Whole(found),
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            collate_fn=flatten if self.way == "arrow" else collate_columns,
            persistent_workers=workers > 0,
        )


class Whole:
    """A dataset whose batches are columns, not lists of rows."""

    def __init__(self, found: datasets.Dataset) -> None:
        self.found = found

    def __len__(self) -> int:
        return len(self.found)

    def __getitems__(self, rows: list[int]) -> Any:
        return self.found[rows]


def arrow_table(samples: Samples) -> pa.Table:
    """One row a sample, every field a list."""
    columns = {"row": pa.array(np.arange(len(samples)))}
    for name in samples.names:
        values = pa.array(samples.values[name])
        columns[name] = pa.LargeListArray.from_arrays(pa.array(samples.offsets[name]), values)
    return pa.table(columns)


def flatten(table: pa.Table) -> dict[str, Tensor]:
    """The batch of a table."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    rows = columns.pop("row").to_numpy()
    lengths = {name: np.diff(columns[name].offsets.to_numpy()) for name in STREAMS}
    flat = {name: column.flatten().to_numpy() for name, column in columns.items()}
    return assemble(rows, flat, lengths)


if __name__ == "__main__":
    datasets.disable_progress_bars()
    serve(Arrow(sys.argv[1]))
