"""Redraws: draws of a soft label drawn once more, for fewer of them, without bias.

Both redraws work on what is stored. Where the first draw kept an entry with the weight w, so that
its mean is the teacher's probability, and the second keeps it with probability w/c' and the
weight c', the mean over both is that probability again: for this the second's random numbers
must not be the first's. Variances add up to those of drawing with weight c' at once.

Source: threshold sampling in stages (Duffield, Lund & Thorup 2005, "Learn more, sample less"). A
part of n independent draws, taken without replacement, is independent draws.
"""

# N positions, E entries, S draws of a position

from __future__ import annotations

import math

import numpy as np

from kdcache.dump.codecs.fixed_point import FIXED_BITS, SUM_BITS
from kdcache.formats.keyed import GOLDEN, mix64

#: Draws that are sorted at a time.
_BLOCK_DRAWS = 1 << 20


def fixed_bits(share: float) -> int:
    """Fractional bits with which weights over a weight of one draw are summed.

    Args:
        share: weight of one draw over the sum of all weights of a position, about.
    """
    return min(FIXED_BITS, SUM_BITS + math.floor(math.log2(share)))


def systematic_draws(
    rows: np.ndarray, weights: np.ndarray, draw_hash: np.ndarray, bits: int, most: int
) -> np.ndarray:
    """Which entries systematic draws take: each with its weight as probability, in one pass.

    Weights become whole numbers before they are summed, so the sums are exact in any order.

    Args:
        rows: [E] int64 position of each entry, ascending.
        weights: [E] float64 in units of one draw; those above 1 are taken as 1.
        draw_hash: [N] uint64, one random number for each position.
        bits: from `fixed_bits`.
        most: draws of a position; what the last turns would take beyond them is left.

    Returns:
        [E] bool.
    """
    fixed = np.minimum(weights * 2.0**bits, 2.0**bits).astype(np.uint64)
    start = draw_hash >> np.uint64(64 - bits)  # [N], u in [0, 1) as fixed point
    # The running sum wraps; differences within a position do not.
    ends = np.cumsum(fixed, dtype=np.uint64)
    first = np.searchsorted(rows, np.arange(len(draw_hash)))[rows]  # [E] of its position
    running = ends - (ends - fixed)[first] + start[rows]
    turn = running >> np.uint64(bits)
    taken: np.ndarray = (turn != (running - fixed) >> np.uint64(bits)) & (turn <= most)
    return taken


def fewer_draws(codes: np.ndarray, num_draws: int, fewer: int, keys: np.ndarray) -> np.ndarray:
    """Some of the draws of every position, chosen without replacement.

    Args:
        codes: [E] draws of each entry, position after position.
        num_draws: S, what those of a position add up to.
        fewer: draws that stay, at most S.
        keys: [N] uint64, one random number for each position.

    Returns:
        [E] int64 draws that stay, 0 among them; those of a position add up to `fewer`.
    """
    entry = np.repeat(np.arange(len(codes)), codes).reshape(len(keys), num_draws)
    turn = np.arange(1, num_draws + 1, dtype=np.uint64)
    left = np.zeros(len(codes), dtype=np.int64)
    step = max(1, _BLOCK_DRAWS // num_draws)
    for at in range(0, len(keys), step):
        block = entry[at : at + step]  # [R, S]
        hashed = mix64(keys[at : at + step, None] + turn * np.uint64(GOLDEN))
        stay = np.argpartition(hashed, fewer - 1, axis=1)[:, :fewer]
        here = slice(int(block[0, 0]), int(block[-1, -1]) + 1)
        chosen = np.take_along_axis(block, stay, axis=1).ravel() - here.start
        left[here] = np.bincount(chosen, minlength=here.stop - here.start)
    return left
