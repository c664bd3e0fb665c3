"""Batches of one teacher forward: planned by length and padded without a per-sample loop."""

# M samples, B batch, S source positions, T positions of the described stream

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.ragged import Ragged


@dataclass(frozen=True)
class Batch:
    """What a teacher reads in one forward; rows are right-padded with the teacher's pad_id.

    Attributes:
        ids: [B, T] int64, the tokens that are described or predicted.
        mask: [B, T] bool, true at tokens; every row has at least one.
        segments: [B, T] int64 token types of pairs; None where there are none.
        source_ids: [B, S] int64, what the encoder reads while the decoder side of an
            encoder-decoder is described.
        source_mask: [B, S] bool.
        from_start: a decoder begins with its start token, as it does when it writes; without it
            as the model shifts the labels of a reference (mBART's last one, a language).
        seen: [B, T] bool, the part of `ids` that a decoder writes and sees, at its positions in
            the whole; None: all of it.
    """

    ids: Tensor
    mask: Tensor
    segments: Tensor | None = None
    source_ids: Tensor | None = None
    source_mask: Tensor | None = None
    from_start: bool = False
    seen: Tensor | None = None

    @classmethod
    def from_numpy(
        cls,
        ids: np.ndarray,
        mask: np.ndarray,
        segments: np.ndarray | None = None,
        source_ids: np.ndarray | None = None,
        source_mask: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        from_start: bool = False,
    ) -> Batch:
        """A batch on a device, of arrays as `pad` gives them."""
        arrays = (ids, mask, segments, source_ids, source_mask)
        tensors = (None if array is None else to_device(array, device) for array in arrays)
        return replace(cls(*tensors), from_start=from_start)  # type: ignore[arg-type]

    def select(self, rows: Tensor) -> Batch:
        """Some of its samples: [B'] int64 indices or [B] bool."""
        parts = (self.ids, self.mask, self.segments, self.source_ids, self.source_mask)
        chosen = (None if part is None else part[rows] for part in parts)
        seen = None if self.seen is None else self.seen[rows]
        return replace(Batch(*chosen), from_start=self.from_start, seen=seen)  # type: ignore[arg-type]


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """An array as a tensor on a device, without waiting for the copy."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def plan_batches(
    src_lengths: np.ndarray, tgt_lengths: np.ndarray, batch_tokens: int
) -> list[np.ndarray]:
    """Cut samples, sorted by length, into batches of at most `batch_tokens` padded tokens.

    A pure function of the lengths. A sample that is larger than a batch has one of its own.

    Args:
        src_lengths: [M] int64.
        tgt_lengths: [M] int64.
        batch_tokens: most padded source plus target tokens of a batch.

    Returns:
        Index arrays that together hold every sample once, the longest samples first (so that
        what does not fit in memory fails at once).
    """
    order = np.lexsort((np.arange(len(src_lengths)), -src_lengths, -tgt_lengths))
    batches, begin = [], 0
    src_max = tgt_max = 0
    for at, (src, tgt) in enumerate(
        zip(src_lengths[order].tolist(), tgt_lengths[order].tolist(), strict=True)
    ):
        wide, high = max(src_max, src), max(tgt_max, tgt)
        if at > begin and (at - begin + 1) * (wide + high) > batch_tokens:
            batches.append(order[begin:at])
            begin, wide, high = at, src, tgt
        src_max, tgt_max = wide, high
    if begin < len(order):
        batches.append(order[begin:])
    return batches


def pad(
    column: Ragged, rows: np.ndarray, pad_id: int, field: str = "id"
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of some samples as a padded matrix.

    Args:
        column: a stream; its field is of any integer dtype.
        rows: [B] sample indices.
        pad_id: fills the rest.
        field: what to take in place of the ids.

    Returns:
        ids [B, S] int64 and mask [B, S] bool, S the longest of them (at least 1).
    """
    starts = column.offsets[rows].astype(np.int64)  # [B]
    lengths = column.offsets[rows + 1].astype(np.int64) - starts  # [B]
    steps = np.arange(max(1, int(lengths.max(initial=0))), dtype=np.int64)  # [S]
    mask = steps < lengths[:, None]  # [B, S]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = column.fields[field][(starts[:, None] + steps)[mask]]
    return ids, mask
