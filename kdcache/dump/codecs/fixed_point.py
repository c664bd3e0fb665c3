"""Fixed point: exact running sums of probabilities, and the search for points in them.

Probabilities are cut to whole numbers, held in float32, before anything is summed. So a sum
is the same in any order, and a drawn id depends on no block size, thread or device.
"""

# R rows, V vocabulary, W = G x GROUP padded width, D points

from __future__ import annotations

import torch
from torch import Tensor

#: Fractional bits; the weight of one draw is 1.
FIXED_BITS = 40

#: The sum of a row stays below 2 to this, so that float64 adds it exactly.
SUM_BITS = 52

#: Running sums over this many rows fit int64.
MAX_ROWS = 1024

#: Ids summed in one piece before points are located.
GROUP = 64


def grouped(padded: Tensor) -> Tensor:
    """[R, W] as [R, G, GROUP]."""
    return padded.view(len(padded), padded.shape[1] // GROUP, GROUP)


def group_sums(fixed: Tensor) -> Tensor:
    """[R, G] int64 sums of whole numbers in float32, exact in any order."""
    # float64 is the faster, and exact below 2^53; not every device has it.
    wide = torch.float64 if fixed.device.type == "cpu" else torch.int64
    return grouped(fixed).sum(dim=-1, dtype=wide).to(torch.int64)


def locate(fixed: Tensor, sums: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """[D] places at which the running sum of a row first reaches each point, at least 1.

    Few points are found in two steps, group and member, without a running sum over all ids.
    """
    totals = sums.sum(dim=-1)
    points = points + (totals.cumsum(0) - totals)[rows]
    # Sums run on from row to row, so that one search serves all rows.
    if len(points) * GROUP > fixed.numel():
        return torch.searchsorted(fixed.flatten().to(torch.int64).cumsum(0), points)
    sums = sums.flatten()  # [R x G]
    ends = sums.cumsum(0)
    group = torch.searchsorted(ends, points)
    running = fixed.view(-1, GROUP)[group].to(torch.int64).cumsum(dim=-1)  # [D, GROUP]
    points -= (ends - sums)[group]
    return group * GROUP + torch.searchsorted(running, points[:, None])[:, 0]
