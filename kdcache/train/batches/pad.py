"""Padded streams as tensors: of several batches, which are made at once, the matrices of each."""

# B samples of a batch, T positions of it

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.padded import Padded
from kdcache.train.batches.batch import Tokens


def padded_tokens(stream: Padded, sizes: Sequence[int]) -> list[Tokens]:
    """Tokens of several batches.

    Args:
        stream: of all of them.
        sizes: B of each.
    """
    shapes = list(zip(sizes, stream.widths, strict=True))
    beside: list[Sequence[Tensor | None]] = []
    for field, dtype in (("segment", np.dtype(np.int64)), ("loss", np.dtype(np.bool_))):
        if field in stream.beside.fields:
            values = np.zeros(len(stream.mask), dtype=dtype)
            values[stream.mask] = stream.beside.fields[field]
            beside.append(_cut(values, shapes))
        else:
            beside.append([None] * len(sizes))
    return list(map(Tokens, _cut(stream.ids, shapes), _cut(stream.mask, shapes), *beside))


def _cut(values: np.ndarray, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Matrices that lie one after another, each a tensor of its own."""
    found, stop = [], 0
    for rows, width in shapes:
        start, stop = stop, stop + rows * width
        found.append(torch.from_numpy(values[start:stop].reshape(rows, width)))
    return found
