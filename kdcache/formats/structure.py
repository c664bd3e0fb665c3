"""Structural promises of shards, checked beyond checksums: pure, one line a fault.

# M samples, N positions, E entries, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kdcache.formats.codec import Codec
from kdcache.formats.identity import sample_id
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids
from kdcache.formats.shard import SampleShard

#: A log-prob may be above 0 by this much, for rounding in float16.
_ABOVE_ZERO_NATS = 0.01


def offset_faults(name: str, column: Ragged) -> list[str]:
    """Offsets must start at 0, never fall, and end at the number of records."""
    faults = []
    offsets = column.offsets
    if len(offsets) == 0 or offsets[0] != 0:
        faults.append(f"{name}: its offsets start at {int(offsets[0]) if len(offsets) else None}")
    if len(offsets) and np.any(offsets[1:] < offsets[:-1]):
        faults.append(f"{name}: its offsets fall")
    records = {len(array) for array in column.fields.values()}
    if len(offsets) and records != {int(offsets[-1])}:
        faults.append(f"{name}: offsets end at {int(offsets[-1])}, it has {sorted(records)}")
    return faults


def sample_faults(
    shard: SampleShard, fields: Sequence[str], streams: Mapping[str, int]
) -> list[str]:
    """Check one samples shard.

    Args:
        shard: the shard.
        fields: raw fields in the manifest's order.
        streams: name to vocabulary size.
    """
    faults: list[str] = []
    for name, vocab_size in streams.items():
        column = shard.streams[name]
        broken = offset_faults(f"stream {name}", column)
        faults += broken
        if not broken:
            faults += _range_faults(f"stream {name}", join_ids(column.fields), vocab_size)
    texts = [shard.text(name).to_pylist() for name in fields]
    for m, values in enumerate(zip(*texts, strict=True)):
        if sample_id(values) != shard.sample_id[m].tobytes():
            faults.append(f"sample {shard.start + m}: sample_id is not that of its fields")
            break
    return faults


def logits_faults(
    codec: Codec, vocab_size: int, columns: Mapping[str, Ragged], lengths: np.ndarray
) -> list[str]:
    """Check one part of a logits signal.

    Args:
        codec: its codec.
        vocab_size: V.
        columns: its ragged columns.
        lengths: [M] tokens of each sample in the signal's stream.
    """
    faults = [fault for name, column in columns.items() for fault in offset_faults(name, column)]
    if faults:
        return faults
    tokens = columns["tokens"]
    wrong = np.flatnonzero(tokens.lengths != lengths)
    if len(wrong):
        m = int(wrong[0])
        return [
            f"tokens: {len(wrong)} samples have another number of labels than of tokens, the "
            f"first is sample {m} of the part: {int(tokens.lengths[m])} and {int(lengths[m])}"
        ]
    keys: dict[str, np.ndarray] = {}
    if codec.has_exact:
        num_positions = int(tokens.offsets[-1])
        counts = tokens.fields.get("num_exact", np.full(num_positions, vocab_size))
        exact = columns["exact"]
        faults += _count_faults("exact", tokens, exact, counts, codec.max_exact(vocab_size))
        faults += _code_faults(codec, exact.fields["code"])
        if not faults and "id" in exact.fields:
            faults += _id_faults("exact", exact, counts, vocab_size, keys)
    if codec.has_drawn:
        counts = tokens.fields["num_drawn"]
        drawn = columns["drawn"]
        broken = _count_faults("drawn", tokens, drawn, counts, codec.max_drawn(vocab_size))
        faults += broken
        if not broken:
            faults += _id_faults("drawn", drawn, counts, vocab_size, keys)
            if codec.name == "sampled":
                faults += _draw_faults(codec.n, counts, drawn.fields["code"])
    both = list(keys.values())
    if len(both) == 2 and len(np.intersect1d(both[0], both[1], assume_unique=True)):
        faults.append("drawn: an id was kept exactly at the same position")
    for name, values in tokens.fields.items():
        bad = np.isnan(values) | (values == np.inf) if name.startswith("tail_") else np.zeros(1)
        if bad.any():
            faults.append(f"tokens.{name}: {int(bad.sum())} values are NaN or +inf")
    return faults


def _range_faults(name: str, ids: np.ndarray, vocab_size: int) -> list[str]:
    if len(ids) and int(ids.max()) >= vocab_size:
        return [f"{name}: id {int(ids.max())}, the vocabulary has {vocab_size}"]
    return []


def _count_faults(
    name: str, tokens: Ragged, column: Ragged, counts: np.ndarray, most: int
) -> list[str]:
    """Entries counted at the positions must be those the column has, sample by sample."""
    if len(counts) and int(counts.max()) > most:
        return [f"{name}: {int(counts.max())} entries at one position, at most {most} expected"]
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
    wrong = np.flatnonzero(ends[tokens.offsets] != column.offsets)
    if len(wrong):
        m = int(wrong[0]) - 1
        return [f"{name}: entries of sample {m} of the part do not add up to num_{name}"]
    return []


def _id_faults(
    name: str, column: Ragged, counts: np.ndarray, vocab_size: int, keys: dict[str, np.ndarray]
) -> list[str]:
    """Ids must be below V and ascend within a position; leaves (position, id) keys behind."""
    ids = join_ids(column.fields).astype(np.int64)
    faults = _range_faults(name, ids, vocab_size)
    position = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    key = position * (1 << 24) + ids
    if np.any(key[1:] <= key[:-1]):
        at = int(position[int(np.flatnonzero(key[1:] <= key[:-1])[0])])
        faults.append(f"{name}: ids do not ascend at position {at} of the part")
    else:
        keys[name] = key
    return faults


def _code_faults(codec: Codec, codes: np.ndarray) -> list[str]:
    if codec.values == "uint8":
        return []
    bad = np.isnan(codes) | (codes > _ABOVE_ZERO_NATS)
    if codec.name == "threshold":
        bad |= np.isinf(codes)
    if bad.any():
        return [f"exact.code: {int(bad.sum())} values are no log-probs"]
    return []


def _draw_faults(num_draws: int, counts: np.ndarray, codes: np.ndarray) -> list[str]:
    """Draws with replacement: the counts at a position must add up to all draws."""
    ends = np.zeros(len(codes) + 1, dtype=np.int64)
    np.cumsum(codes, out=ends[1:])
    stops = np.cumsum(counts, dtype=np.int64)
    wrong = np.flatnonzero(ends[stops] - ends[stops - counts] != num_draws)
    if len(wrong):
        return [f"drawn.code: draws at position {int(wrong[0])} do not add up to {num_draws}"]
    return []
