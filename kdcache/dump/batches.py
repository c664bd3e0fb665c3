"""Batches of one teacher forward: planned by length and padded without a per-sample loop."""

# M samples, B batch, S source positions, T target positions

from __future__ import annotations

import numpy as np

from kdcache.formats.ragged import Ragged


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


def pad(column: Ragged, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of some samples as a padded matrix.

    Args:
        column: a stream; field "id", any integer dtype.
        rows: [B] sample indices.
        pad_id: fills the rest.

    Returns:
        ids [B, S] int64 and mask [B, S] bool, S the longest of them (at least 1).
    """
    starts = column.offsets[rows].astype(np.int64)  # [B]
    lengths = column.offsets[rows + 1].astype(np.int64) - starts  # [B]
    steps = np.arange(max(1, int(lengths.max(initial=0))), dtype=np.int64)  # [S]
    mask = steps < lengths[:, None]  # [B, S]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = column.fields["id"][(starts[:, None] + steps)[mask]]
    return ids, mask
