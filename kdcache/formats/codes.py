"""Codes: what the stored numbers of a soft label mean.

An exact entry's uint8 code i means a log-prob of -(i/255)^2 x the codec's range: fine near
probability 1, coarse where little mass lies. It is rounded stochastically in probability,
so the mean over roundings is the probability itself. Where drawn entries have log-probs, their
codes follow the same law over a range of their own. `gold` uses the same law over
`WIDE_RANGE_NATS`, rounded to the nearest; `entropy` is linear up to ln V, its largest value,
and rounded stochastically. Tail sums are float16 nats as they are.
"""

# E entries, D drawn entries, N positions, V vocabulary

from __future__ import annotations

import math

import numpy as np

from kdcache.formats.codec import WIDE_RANGE_NATS, Codec

#: Largest uint8 code.
MAX_CODE = 255

#: Stands for the id in the rounding hash of an entropy. Ids have at most 24 bits.
ENTROPY_ID = (1 << 32) - 1


def code_log_probs(range_nats: float) -> np.ndarray:
    """[256] float64 log-probs in nats of the uint8 codes, descending from 0 to -range_nats."""
    return -((np.arange(MAX_CODE + 1) / MAX_CODE) ** 2) * range_nats


def exact_log_probs(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Log-probs of exact entries from their codes.

    Args:
        codec: whose `values` say what the codes are.
        codes: [E] uint8, float16 or float32.

    Returns:
        [E] float32 nats.
    """
    return _log_probs(codec, codes, codec.range_nats)


def drawn_log_probs(codec: Codec, codes: np.ndarray) -> np.ndarray:
    """Log-probs of drawn entries from their codes, where the codec stores them.

    Args:
        codec: whose `values` say what the codes are.
        codes: [D] uint8, float16 or float32.

    Returns:
        [D] float32 nats.
    """
    return _log_probs(codec, codes, codec.drawn_range_nats)


def _log_probs(codec: Codec, codes: np.ndarray, range_nats: float) -> np.ndarray:
    if codec.values == "uint8":
        return code_log_probs(range_nats).astype(np.float32)[codes]
    return codes.astype(np.float32)


def gold_log_probs(codes: np.ndarray) -> np.ndarray:
    """[N] float32 nats of the teacher's log-prob of the target, from uint8 codes."""
    return code_log_probs(WIDE_RANGE_NATS).astype(np.float32)[codes]


def gold_codes(log_probs: np.ndarray) -> np.ndarray:
    """[N] uint8 code nearest to each log-prob in nats; beyond the range, its end."""
    share = np.clip(-log_probs / WIDE_RANGE_NATS, 0, 1)
    return np.rint(np.sqrt(share) * MAX_CODE).astype(np.uint8)


def entropy_step(vocab_size: int) -> float:
    """Nats from one entropy code to the next."""
    return math.log(vocab_size) / MAX_CODE


def entropy_nats(codes: np.ndarray, vocab_size: int) -> np.ndarray:
    """[N] float32 teacher entropy in nats from uint8 codes."""
    return codes.astype(np.float32) * np.float32(entropy_step(vocab_size))
