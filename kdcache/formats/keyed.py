"""Keyed hashes: random numbers that depend on what they are for and on nothing else.

Every draw, stochastic rounding and shuffle is a hash of its key, so no batch shape, rank,
thread or library version enters. The arithmetic is 64-bit and wraps.

Source: the finaliser of SplitMix64 (Steele, Lea & Flood 2014); Feistel permutation with
cycle walking (Black & Rogaway 2002).
"""

# M samples, N positions

from __future__ import annotations

import numpy as np
import xxhash

from kdcache.formats.native import library

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLY_1 = 0xBF58476D1CE4E5B9
MULTIPLY_2 = 0x94D049BB133111EB


def text_key(*parts: object) -> int:
    """64-bit key of some values, each length-prefixed: ("a", "bc") differs from ("ab", "c")."""
    encoded = [str(part).encode() for part in parts]
    return xxhash.xxh3_64_intdigest(b"".join(b"%d:%s" % (len(part), part) for part in encoded))


def mix64(x: np.ndarray) -> np.ndarray:
    """Bijective mix of uint64 values, any shape."""
    x = x.astype(np.uint64, copy=True)
    x ^= x >> np.uint64(30)
    x *= np.uint64(MULTIPLY_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(MULTIPLY_2)
    x ^= x >> np.uint64(31)
    return x


def sample_keys(
    seed: int,
    purpose: str,
    signal: str,
    sample_ids: np.ndarray,
    rows: np.ndarray,
    replica: int = 0,
    hypothesis: int = 0,
) -> np.ndarray:
    """Key of each sample for one purpose.

    Args:
        seed: recipe seed.
        purpose: what the numbers are for ("draw", "round"); compile uses purposes of its own.
        signal: signal name.
        sample_ids: [M, 16] uint8.
        rows: [M] int64 corpus rows.
        replica: which masking of the sample, for signals that have several.
        hypothesis: which hypothesis of the sample, for signals that have several.

    Returns:
        [M] uint64.
    """
    words = np.ascontiguousarray(sample_ids).view("<u8")  # [M, 2]
    base = np.uint64(text_key(seed, purpose, signal, replica, hypothesis))
    key = mix64(words[:, 0] ^ base)
    key = mix64(key ^ words[:, 1])
    return mix64(key ^ rows.astype(np.uint64))


def position_hash(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[N] uint64 hash of each position. keys: [N] uint64 sample key of each; positions: [N]."""
    return mix64(keys + np.uint64(GOLDEN) * (positions.astype(np.uint64) + np.uint64(1)))


def permutation(n: int, key: int) -> np.ndarray:
    """A keyed permutation of range(n), the same for ever.

    Args:
        n: length, at least 0.
        key: 64-bit key, from `text_key`.

    Returns:
        [n] int64.
    """
    half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    round_keys = mix64(np.uint64(key) + np.uint64(GOLDEN) * np.arange(1, 7, dtype=np.uint64))
    # What a round adds to either half depends on the other alone, which has few values: a table.
    halves = np.arange(1 << half, dtype=np.uint64)
    rounds = (mix64(halves ^ round_keys[:, None]) & mask).astype(np.uint32)  # [6, 2 ** half]
    compiled = library()
    if compiled is not None:
        permuted = np.empty(n, dtype=np.int64)
        compiled.kdcache_permute(n, half, rounds.ctypes.data, permuted.ctypes.data)
        return permuted

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for added in rounds:
            left, right = right, left ^ added[right]
        return (left << np.uint64(half)) | right

    out = encrypt(np.arange(n, dtype=np.uint64))
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = encrypt(out[outside])
    return out.astype(np.int64)
