"""Structural promises of dense signals: every chunk is read, one line a fault.

# M samples of a part, T tokens of a sample, R rows, L layers, W width
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdcache.errors import IntegrityError
from kdcache.formats.checks.structure import beyond
from kdcache.formats.dense import DensePart, DenseRecord, decode_values
from kdcache.formats.plan import plan_shards
from kdcache.formats.ragged import offsets_of
from kdcache.formats.signals import AttentionRecord

#: Most rows and bytes of a layer that are looked at together: whole samples, and at least one.
BLOCK_ROWS = 1 << 16
BLOCK_BYTES = 1 << 20

#: The number of every float16, by its bits.
_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)

#: Bits of the infinity above 0.
_BFLOAT16_INFINITY = 0x7F80

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
    row_bytes = part.values.shape[2] * part.values.dtype.itemsize
    blocks = plan_shards(counts, max(1, min(BLOCK_ROWS, BLOCK_BYTES // row_bytes)))
    for index, layer in enumerate(record.layers):
        for first, last in blocks:
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
    stored = part.read(*rows, index)
    scale = None if part.scale is None else part.scale.read(*rows, index)
    if not _finite(stored, record.values, scale):
        with np.errstate(over="ignore", invalid="ignore"):
            values = decode_values(stored, record.values, scale)
        bad = np.count_nonzero(~np.isfinite(values))
        if bad:
            return [f"{bad} values are NaN or infinite"]
    if scale is not None:
        negative = np.count_nonzero(scale < 0)
        return [f"{negative} scales are negative"] if negative else []
    if isinstance(record, AttentionRecord):
        return _attention_faults(_probabilities(stored, record.values), lengths)
    return []


def _finite(stored: np.ndarray, values: str, scale: np.ndarray | None) -> bool:
    """Whether it is plain from the bits alone that all values are numbers."""
    if scale is not None:
        # Times any int8 it is no more than a float32 holds.
        largest = float(np.finfo(np.float32).max) / 128
        return not beyond(scale.reshape(-1), largest, -largest)
    bits = stored.reshape(-1)
    if values == "bfloat16":
        return bool((bits & 0x7FFF).max(initial=0) < _BFLOAT16_INFINITY)
    largest = np.finfo(bits.dtype).max
    return not beyond(bits, largest, -largest)


def _probabilities(stored: np.ndarray, values: str) -> np.ndarray:
    """Float32 numbers from what is stored; for float16 half as dear as a conversion."""
    if values != "float16":
        return decode_values(stored, values)
    numbers: np.ndarray = _FLOAT16.take(stored.view(np.uint16))
    return numbers


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
