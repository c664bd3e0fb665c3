"""Structural promises of shards, checked beyond checksums: pure, one line a fault.

# M samples, N positions, E entries, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.formats.codec import Codec
from kdcache.formats.identity import sample_id
from kdcache.formats.manifest import CorpusRecord
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
    shard: SampleShard, corpus: CorpusRecord, streams: Mapping[str, int]
) -> list[str]:
    """Check one samples shard.

    Args:
        shard: the shard.
        corpus: its fields, tasks and label.
        streams: name to vocabulary size.
    """
    faults: list[str] = []
    for name, vocab_size in streams.items():
        column = shard.streams[name]
        broken = offset_faults(f"stream {name}", column)
        faults += broken
        if not broken:
            faults += range_faults(f"stream {name}", join_ids(column.fields), vocab_size)
            if "loss" in column.fields and column.fields["loss"].max(initial=0) > 1:
                faults.append(f"stream {name}: a loss is neither 0 nor 1")
    tasks = shard.tasks()
    named = [""] * len(shard.row) if tasks is None else tasks.to_pylist()
    unknown = sorted(set(named) - {*corpus.tasks, *([] if corpus.tasks else [""])})
    if unknown:
        faults.append(f"task {unknown[0]!r}, expected one of {corpus.tasks}")
    texts = [shard.text(name).to_pylist() for name in corpus.fields]
    golds = texts[corpus.fields.index(corpus.label)] if corpus.label else [""] * len(named)
    rows = zip(named, golds, *texts, strict=True)
    for m, (task, gold, *values) in enumerate(rows):
        if sample_id(values, task, gold) != shard.sample_id[m].tobytes():
            faults.append(f"sample {shard.start + m}: sample_id is not that of its fields")
            break
    return faults


def label_faults(name: str, column: Ragged, expected: np.ndarray | None) -> list[str]:
    """A main column must have the records that its samples demand.

    Args:
        name: of the column.
        column: the main column.
        expected: [M] from `units.label_counts`; None where nothing is demanded.
    """
    if expected is None:
        return []
    wrong = np.flatnonzero(column.lengths != expected)
    if not len(wrong):
        return []
    m = int(wrong[0])
    return [
        f"{name}: {len(wrong)} samples have another number of records than they must have, the "
        f"first is sample {m} of the part: {int(column.lengths[m])}, expected {int(expected[m])}"
    ]


def logits_faults(
    codec: Codec, vocab_size: int, columns: Mapping[str, Ragged], lengths: np.ndarray
) -> list[str]:
    """Check one part of a logits signal.

    Args:
        codec: its codec.
        vocab_size: V.
        columns: its ragged columns.
        lengths: [M] labels that each sample must have.
    """
    faults = [fault for name, column in columns.items() for fault in offset_faults(name, column)]
    faults = faults or label_faults("tokens", columns["tokens"], lengths)
    if faults:
        return faults
    tokens = columns["tokens"]
    keys: dict[str, np.ndarray] = {}
    if codec.has_exact:
        num_positions = int(tokens.offsets[-1])
        counts = tokens.fields.get("num_exact", np.full(num_positions, vocab_size))
        exact = columns["exact"]
        faults += _count_faults("exact", tokens, exact, counts, codec.max_exact(vocab_size))
        faults += _code_faults(codec, "exact", exact.fields["code"])
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
            elif codec.has_drawn_log_probs:
                faults += _code_faults(codec, "drawn", drawn.fields["code"])
    both = list(keys.values())
    if len(both) == 2 and len(np.intersect1d(both[0], both[1], assume_unique=True)):
        faults.append("drawn: an id was kept exactly at the same position")
    for name, values in tokens.fields.items():
        bad = np.isnan(values) | (values == np.inf) if name.startswith("tail_") else np.zeros(1)
        if bad.any():
            faults.append(f"tokens.{name}: {int(bad.sum())} values are NaN or +inf")
    return faults


def range_faults(name: str, ids: np.ndarray, vocab_size: int) -> list[str]:
    """Token ids must be below V."""
    if len(ids) and int(ids.max()) >= vocab_size:
        return [f"{name}: id {int(ids.max())}, the vocabulary has {vocab_size}"]
    return []


def _count_faults(
    name: str, tokens: Ragged, column: Ragged, counts: np.ndarray, most: int
) -> list[str]:
    """Entries counted at the positions must be those the column has, sample by sample."""
    if len(counts) and int(counts.max()) > most:
        return [f"{name}: {int(counts.max())} entries at one position, at most {most} expected"]
    return sum_faults(name, tokens, column, counts, f"num_{name}")


def sum_faults(
    name: str, outer: Ragged, column: Ragged, counts: np.ndarray, field: str
) -> list[str]:
    """What the records of one column count must be the records of another, sample by sample.

    Args:
        name: of the counted column.
        outer: the column that counts.
        column: the counted column.
        counts: one for every record of `outer`.
        field: what holds them, for messages.
    """
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
    wrong = np.flatnonzero(ends[outer.offsets] != column.offsets)
    if len(wrong):
        m = int(wrong[0]) - 1
        return [f"{name}: entries of sample {m} of the part do not add up to {field}"]
    return []


def _id_faults(
    name: str, column: Ragged, counts: np.ndarray, vocab_size: int, keys: dict[str, np.ndarray]
) -> list[str]:
    """Ids must be below V and ascend within a position; leaves (position, id) keys behind."""
    ids = join_ids(column.fields).astype(np.int64)
    faults = range_faults(name, ids, vocab_size)
    position = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    key = position * (1 << 24) + ids
    if np.any(key[1:] <= key[:-1]):
        at = int(position[int(np.flatnonzero(key[1:] <= key[:-1])[0])])
        faults.append(f"{name}: ids do not ascend at position {at} of the part")
    else:
        keys[name] = key
    return faults


def _code_faults(codec: Codec, name: str, codes: np.ndarray) -> list[str]:
    if codec.values == "uint8":
        return []
    bad = np.isnan(codes) | (codes > _ABOVE_ZERO_NATS)
    if codec.name == "threshold":
        bad |= np.isinf(codes)
    if bad.any():
        return [f"{name}.code: {int(bad.sum())} values are no log-probs"]
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
