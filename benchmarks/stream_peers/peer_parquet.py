"""A DistillKit-like reader: Parquet rows of nested lists, Python values, tensors in the collator.

As arcee's DistillKit keeps offline logits: a row a sample, tokens as a list, what belongs to a
token as a list inside a list, files of some thousand rows; read by `datasets`, shuffled, and made
tensors of by `torch.tensor` in the collator of a DataLoader, as a `Trainer` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peer_loop import Collated, serve
from peer_samples import KNOTS, STREAMS, Samples
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

FILE_ROWS = 50_000
GROUP_ROWS = 1_000
ENTRIES = {"exact_id": "num_exact", "exact_code": "num_exact", "drawn_id": "num_drawn"}
UINT16 = ("exact_id", "drawn_id")


class Parquet(Collated):
    """Rows of lists."""

    def convert(self, samples: Path, data: Path) -> None:
        """Write the samples in the peer's format."""
        table = nested_table(Samples(samples))
        data.mkdir()
        for number, start in enumerate(range(0, len(table), FILE_ROWS)):
            part = table.slice(start, FILE_ROWS)
            pq.write_table(part, data / f"data_{number}.parquet", row_group_size=GROUP_ROWS)

    def loader(
        self, data: Path, batch: int, workers: int, seed: int
    ) -> Iterable[dict[str, Tensor]]:
        """Shuffled batches of one epoch, each time it is iterated."""
        found = datasets.load_dataset(
            "parquet",
            data_files=sorted(map(str, data.glob("*.parquet"))),
            split="train",
            cache_dir=str(data / "cache"),
        ).shuffle(seed=seed)
        return DataLoader(
            found,
            batch_size=batch,
            shuffle=True,
            num_workers=workers,
            collate_fn=tensors_of,
            persistent_workers=workers > 0,
        )


def nested_table(samples: Samples) -> pa.Table:
    """One row a sample; the entries of a token are a list of their own."""
    columns = {"row": pa.array(np.arange(len(samples)))}
    per_token = samples.offsets["tgt"]
    for name in samples.names:
        values = pa.array(samples.values[name])
        if name in ENTRIES:
            counts = samples.values[ENTRIES[name]].astype(np.int64)
            ends = np.concatenate([[0], np.cumsum(counts)])
            values = pa.LargeListArray.from_arrays(pa.array(ends), values)
        elif name == "tail":
            values = pa.FixedSizeListArray.from_arrays(values, KNOTS)
        elif name in ENTRIES.values():
            continue  # the lengths of the lists
        offsets = samples.offsets[name] if name in STREAMS else per_token
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), values)
    return pa.table(columns)


def tensors_of(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The batch of some rows of Python lists."""
    batch = {"rows": torch.tensor([row["row"] for row in rows])}
    for name in STREAMS:
        each = [torch.tensor(row[name]) for row in rows]
        batch[f"{name}.ids"] = pad_sequence(each, batch_first=True)
        lengths = torch.tensor([len(one) for one in each])
        batch[f"{name}.mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    for name in set(rows[0]) - {*STREAMS, "row"}:
        values = list(chain.from_iterable(row[name] for row in rows))
        if name in ENTRIES:
            batch[ENTRIES[name]] = torch.tensor([len(one) for one in values])
            dtype = torch.uint16 if name in UINT16 else torch.uint8
            batch[name] = torch.tensor(list(chain.from_iterable(values)), dtype=dtype)
        elif name == "tail":
            batch[name] = torch.tensor(values, dtype=torch.float16)
        else:
            batch[name] = torch.tensor(values, dtype=torch.uint8)
    return batch


if __name__ == "__main__":
    datasets.disable_progress_bars()
    serve(Parquet())
