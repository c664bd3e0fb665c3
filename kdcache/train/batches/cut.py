"""Cutting: tensors of several batches, which are made at once, into those of each."""

# B samples of a batch

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, repeat
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.ragged import Ragged

Record = TypeVar("Record")
Value = TypeVar("Value")


def joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Samples of several batches one after another, and where each batch begins.

    Args:
        parts: int64 samples of each batch.

    Returns:
        [R] int64 samples of all, and [batches + 1] samples before each batch, and of all.
    """
    ends = np.array([0, *accumulate(map(len, parts))])
    return np.concatenate(parts or [np.empty(0, np.int64)]), ends


def record_counts(column: Ragged, ends: np.ndarray) -> list[int]:
    """Records of each batch in a column.

    Args:
        column: of the samples of all batches, one after another.
        ends: [batches + 1] samples before each batch, and of all.
    """
    before = column.offsets.take(ends)
    return (before[1:] - before[:-1]).tolist()


def by_name(found: Mapping[str, Sequence[Value]], number: int) -> list[dict[str, Value]]:
    """What several batches have under some names, of each batch.

    Args:
        found: name to what each batch has.
        number: of batches.
    """
    if not found:
        return [{} for _ in range(number)]
    return [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]


def cut(
    record: Record, units: Mapping[str, str], sizes: Mapping[str, Sequence[int]]
) -> list[Record]:
    """A dataclass of tensors of several batches, as one of each batch.

    Args:
        record: whose tensors have all batches one after another in their first dimension.
        units: name of a tensor to what its rows are; "" where it is not named.
        sizes: what rows are to their number in each batch.
    """
    number = len(next(iter(sizes.values())))
    found: list[Any] = []
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            found.append(split(value, sizes[units.get(field.name, "")]))
        else:
            found.append(repeat(value, number))
    return [type(record)(*values) for values in zip(*found, strict=True)]


def split(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Pieces of a tensor, each on its own for autograd: a change of one is none of another.

    Args:
        tensor: without a gradient.
        sizes: rows of each piece.
    """
    return torch.unsafe_split_with_sizes(tensor, sizes)
