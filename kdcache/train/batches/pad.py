"""Padding: ragged tokens of several batches as a matrix of each."""

# B samples of a batch, T positions of it, N its tokens

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.buffers import BUFFERS
from kdcache.formats.native import library
from kdcache.formats.ragged import Ragged
from kdcache.train.batches.batch import Tokens
from kdcache.train.batches.cut import record_counts, split


def padded_parts(stream: Ragged, sizes: Sequence[int], pad: int) -> list[Tokens]:
    """Tokens of several batches, padded at the end.

    Args:
        stream: of the samples of all batches, one after another, in its wide form.
        sizes: B of each batch.
        pad: id that stands outside the mask.
    """
    ends = np.cumsum([0, *sizes])
    # A batch without samples has the width of the one that follows, or the zero at the end.
    longest = np.maximum.reduceat(np.append(stream.lengths, 0), ends[:-1])
    widths = np.maximum(longest, 1)
    flat = stream.fields["id"]
    ids, mask = _matrices(stream, flat, np.asarray(sizes, dtype=np.int64), widths, pad)
    stops = (widths * sizes).cumsum().tolist()
    shapes = list(zip(sizes, widths.tolist(), strict=True))
    matrices, masks = _cut(ids, stops, shapes), _cut(mask, stops, shapes)
    numbers = record_counts(stream, sizes)
    pieces = split(torch.from_numpy(flat), numbers)
    beside = {}
    for field, dtype in (("segment", torch.int64), ("loss", torch.bool)):
        if field in stream.fields:
            values = torch.zeros(len(mask), dtype=dtype)
            values[torch.from_numpy(mask)] = torch.from_numpy(stream.fields[field]).to(dtype)
            beside[field] = _cut(values.numpy(), stops, shapes)
    segments, losses = beside.get("segment"), beside.get("loss")
    return [
        Tokens(
            ids=matrices[number],
            mask=masks[number],
            flat=pieces[number],
            segments=None if segments is None else segments[number],
            loss=None if losses is None else losses[number],
        )
        for number in range(len(sizes))
    ]


def _matrices(
    stream: Ragged, flat: np.ndarray, sizes: np.ndarray, widths: np.ndarray, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of all batches, flat."""
    area = int(sizes @ widths)
    compiled = library()
    if compiled is not None:
        data = BUFFERS.empty(9 * area)
        ids, mask = data[: 8 * area].view(np.int64), data[8 * area :].view(np.bool_)
        offsets = np.ascontiguousarray(stream.offsets, dtype=np.int64)
        compiled.kdcache_pad(
            flat.ctypes.data,
            offsets.ctypes.data,
            len(sizes),
            sizes.ctypes.data,
            widths.ctypes.data,
            pad,
            ids.ctypes.data,
            mask.ctypes.data,
        )
        return ids, mask
    ids, mask = np.full(area, pad, dtype=np.int64), np.empty(area, dtype=np.bool_)
    lengths, row, place = stream.lengths, 0, 0
    for size, width in zip(sizes.tolist(), widths.tolist(), strict=True):
        part = mask[place : place + size * width].reshape(size, width)
        np.less(np.arange(width), lengths[row : row + size, None], out=part)
        row, place = row + size, place + size * width
    ids[mask] = flat
    return ids, mask


def _cut(
    values: np.ndarray, ends: Sequence[int], shapes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Matrices that lie one after another, each a tensor of its own."""
    return [
        torch.from_numpy(values[start:end].reshape(shape))
        for start, end, shape in zip([0, *ends], ends, shapes, strict=False)
    ]
