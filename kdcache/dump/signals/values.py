"""Floats as they are stored: rounded where the teacher runs, refused where they do not fit."""

# W features of one vector

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import ModelError

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

#: Largest int8 code; -128 is not used, so that a vector and its negative have the same codes.
MAX_INT8 = 127

#: Index of a value, as long as the tensor has dimensions, to the words of a message.
Place = Callable[[Sequence[int]], str]


def float_codes(values: Tensor, kind: str, wider: str, place: Place) -> Tensor:
    """Values in the type they are stored in, rounded to the nearest.

    Args:
        values: any shape and float dtype.
        kind: a key of `FLOATS`.
        wider: what `values` of the recipe should be where a number is too large for `kind`.
        place: says where a value stands.

    Returns:
        The same shape, all finite.

    Raises:
        ModelError: a value is NaN or infinite, or becomes so; names the first.
    """
    codes = values.to(FLOATS[kind])
    _check(codes, values, kind, wider, place)
    return codes


def int8_codes(values: Tensor, place: Place) -> tuple[Tensor, Tensor]:
    """Values as int8 with a scale per vector: value = code * scale, rounded to the nearest.

    The scale is max|x| / 127, so a code is off by at most scale / 2. Over a vector of W normal
    values that is 0.6% (W = 64) to 0.9% (W = 4,096) of their size, root mean square by root mean
    square. One value far above the rest makes it more, up to 0.23% * sqrt(W).

    Args:
        values: [..., W] any float dtype.
        place: says where a value stands.

    Returns:
        [..., W] int8 and [...] float32.

    Raises:
        ModelError: a value is NaN or infinite; names the first.
    """
    wide = values.float()
    largest = wide.abs().amax(dim=-1)  # [...], NaN where any is
    if not bool(largest.isfinite().all()):
        _check(wide, values, "int8", "float16", place)
    scale = largest / MAX_INT8
    # Vectors of zeros, and those so small that their scale is 0, have codes of 0.
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (wide / divisor.unsqueeze(-1)).round().clamp(-MAX_INT8, MAX_INT8)
    return codes.to(torch.int8), scale


def to_host(codes: Tensor) -> np.ndarray:
    """Stored values as numpy has them; bfloat16 as the uint16 of its bits."""
    if codes.dtype == torch.bfloat16:
        return codes.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
    return codes.cpu().numpy()


def _check(codes: Tensor, values: Tensor, kind: str, wider: str, place: Place) -> None:
    """Every code is finite, or the first that is not is named with the value it was made of."""
    finite = codes.isfinite()
    if bool(finite.all()):
        return
    faults = (~finite).nonzero()
    # Of the layers of [N, L, W] the lowest: those above have it from there.
    index = faults[faults[:, -2].argmin()].tolist()
    value = float(values[tuple(index)])
    if math.isfinite(value):
        largest = torch.finfo(FLOATS[kind]).max
        raise ModelError(
            f"{place(index)} is {value:g}, more than {kind} holds ({largest:g}); set values: "
            f"{wider}"
        )
    raise ModelError(
        f"{place(index)} is {value}, expected a finite number; check the teacher and its dtype"
    )
