"""Coding: numbers of a soft label to their stored bytes, on the teacher's device.

Rounding that must add no bias is stochastic, by a hash of the position and the id, so it
depends on neither batch nor device order.
"""

# N positions, E entries

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.codec import WIDE_RANGE_NATS, Codec
from kdcache.formats.codes import ENTROPY_ID, MAX_CODE, code_log_probs, entropy_step
from kdcache.formats.keyed import MULTIPLY_1, MULTIPLY_2
from kdcache.formats.schema import count_dtype, id_fields

HostColumns = dict[str, dict[str, np.ndarray]]

_VALUE_DTYPES = {"float16": torch.float16, "float32": torch.float32}
#: torch cannot compute in unsigned types wider than a byte; the signed ones wrap the same.
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def signed64(value: int) -> int:
    """The int64 whose bits are those of a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 taken as uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """`kdcache.formats.keyed.mix64` over int64 whose bits are uint64's."""
    x = (x ^ shift_right(x, 30)) * signed64(MULTIPLY_1)
    x = (x ^ shift_right(x, 27)) * signed64(MULTIPLY_2)
    return x ^ shift_right(x, 31)


def entry_hash(round_hash: Tensor, ids: Tensor) -> Tensor:
    """int64 hash of entries from their position's hash and their id, broadcast."""
    return mix64(round_hash ^ mix64(ids))


def _uniform(hashed: Tensor) -> Tensor:
    """Float32 in [0, 1) from the upper 24 bits of a hash."""
    return shift_right(hashed, 40).to(torch.float32) * 2.0**-24


def code_values(
    codec: Codec, log_probs: Tensor, round_hash: Tensor, ids: Tensor, range_nats: float
) -> Tensor:
    """Codes of entries.

    Args:
        codec: says the kind of the codes.
        log_probs: [...] float32 nats.
        round_hash: int64 of each entry's position, broadcast to log_probs.
        ids: int64 of each entry, broadcast to log_probs.
        range_nats: of uint8 codes.

    Returns:
        [...] uint8, float16 or float32.
    """
    if codec.values != "uint8":
        return log_probs.clamp(max=0).to(_VALUE_DTYPES[codec.values])
    rising = np.exp(code_log_probs(range_nats)[::-1]).astype(np.float32)
    table = torch.from_numpy(rising).to(log_probs.device)  # [256], code 255 first
    probs = log_probs.exp()
    above = torch.searchsorted(table, probs, right=True).clamp(1, MAX_CODE)
    low, high = table[above - 1], table[above]
    share = (probs - low) / (high - low)  # of roundings that go up, to the smaller code
    up = _uniform(entry_hash(round_hash, ids)) < share
    return (MAX_CODE + 1 - above - up.to(torch.int64)).to(torch.uint8)


def code_gold(log_probs: Tensor) -> Tensor:
    """[N] uint8 codes of the target's log-probs in nats, to the nearest."""
    share = (-log_probs / WIDE_RANGE_NATS).clamp(0, 1)
    return (share.sqrt() * MAX_CODE).round().to(torch.uint8)


def code_entropy(entropy: Tensor, vocab_size: int, round_hash: Tensor) -> Tensor:
    """[N] uint8 codes of entropies in nats, rounded stochastically."""
    step = max(entropy_step(vocab_size), 1e-9)  # one id alone has no entropy
    hashed = entry_hash(round_hash, torch.full_like(round_hash, ENTROPY_ID))
    return (entropy / step + _uniform(hashed)).clamp(0, MAX_CODE).to(torch.uint8)


def host_fields(
    fields: Mapping[str, Tensor], vocab_size: int, largest: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Fields of one column in host memory, narrowed on the device to the schema's dtypes.

    Args:
        fields: name to flat tensor; `id` is split into its stored bytes.
        vocab_size: V.
        largest: name of each count to the largest it can be.
    """
    host = {}
    for name, values in fields.items():
        if name == "id":
            host["id"] = _narrow(values, np.dtype(np.uint16))
            if len(id_fields(vocab_size)) > 1:
                host["id_high"] = _narrow(values >> 16, np.dtype(np.uint8))
        elif name in largest:
            host[name] = _narrow(values, count_dtype(largest[name]))
        else:
            host[name] = values.cpu().numpy()
    return host


def _narrow(values: Tensor, dtype: np.dtype) -> np.ndarray:
    """Low bytes of int64 values as an unsigned numpy array."""
    narrow: np.ndarray = values.to(_SIGNED[dtype.itemsize]).cpu().numpy()
    return narrow.view(dtype)
