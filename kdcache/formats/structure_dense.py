"""Structural promises of dense signals: every chunk is read, one line a fault.

# M samples of a part, T tokens of a sample, R rows, L layers, W width
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdcache.errors import IntegrityError
from kdcache.formats.dense import DensePart, DenseRecord
from kdcache.formats.plan import plan_shards
from kdcache.formats.ragged import offsets_of
from kdcache.formats.signals import AttentionRecord

#: Rows that are decoded at a time, whole samples and at least one.
BLOCK_ROWS = 1 << 16

#: What probabilities that were rounded to float16 or bfloat16 may add up to above 1.
ABOVE_ONE = 0.01


def dense_faults(
    record: DenseRecord, part: DensePart, counts: np.ndarray, lengths: np.ndarray
) -> Iterator[str]:
    """Check one part, layer by layer: checksums of all chunks, and the values.

    Args:
        record: of the signal.
        part: opened, so its metadata and chunk index are sound.
        counts: [M] rows of each sample.
        lengths: [M] tokens of each sample in the signal's stream.
    """
    ends = offsets_of(counts)
    for index, layer in enumerate(record.layers):
        for first, last in plan_shards(counts, BLOCK_ROWS):
            rows = int(ends[first]), int(ends[last])
            try:
                faults = _block_faults(record, part, rows, index, lengths[first:last])
            except IntegrityError as error:
                faults = [str(error)]
            if faults:  # the first block with a fault says enough of a layer
                yield f"layer {layer}: {faults[0]}"
                break


def _block_faults(
    record: DenseRecord, part: DensePart, rows: tuple[int, int], index: int, lengths: np.ndarray
) -> list[str]:
    """Some samples in one layer."""
    values = part.decode(*rows, index)
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        return [f"{bad} values are NaN or infinite"]
    if part.scale is not None:
        negative = np.count_nonzero(part.scale.read(*rows, index) < 0)
        return [f"{negative} scales are negative"] if negative else []
    return _attention_faults(values, lengths) if isinstance(record, AttentionRecord) else []


def _attention_faults(values: np.ndarray, lengths: np.ndarray) -> list[str]:
    """What a query pays to all keys is positive and at most 1.

    Not always 1: some models let a query look at nothing.

    Args:
        values: [R, W] float32.
        lengths: tokens of each sample.
    """
    negative = np.count_nonzero(values < 0)
    if negative:
        return [f"{negative} attentions are negative"]
    keys = np.repeat(lengths, lengths)  # keys of each query
    if not len(keys):
        return []
    sums = np.add.reduceat(values, offsets_of(keys)[:-1], axis=0)
    wrong = (sums <= 0) | (sums > 1 + ABOVE_ONE)
    if not wrong.any():
        return []
    first = float(sums[wrong][0])
    return [
        f"attentions of {np.count_nonzero(wrong)} queries do not add up to 1, the first {first:.4g}"
    ]
