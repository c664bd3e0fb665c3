"""Structural promises of shards, checked beyond checksums: pure, one line a fault.

# M samples, N positions, E entries, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from kdcache.formats.checks.structure_entries import Entries, entry_faults, sum_fault
from kdcache.formats.codec import Codec
from kdcache.formats.identity import sample_ids
from kdcache.formats.manifest import CorpusRecord
from kdcache.formats.ragged import Ragged, offsets_of
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


def stream_faults(shard: SampleShard, streams: Iterable[str]) -> list[str]:
    """Check where the samples of a shard begin and end in its streams.

    Without such a fault the lengths of the samples can be relied on.

    Args:
        shard: the shard.
        streams: their names.
    """
    return [f for name in streams for f in offset_faults(f"stream {name}", shard.streams[name])]


def sample_faults(
    shard: SampleShard, corpus: CorpusRecord, streams: Mapping[str, int]
) -> list[str]:
    """Check one samples shard that has none of the `stream_faults`.

    Args:
        shard: the shard.
        corpus: its fields, tasks and label.
        streams: name to vocabulary size.
    """
    faults: list[str] = []
    for name, vocab_size in streams.items():
        fields = shard.streams[name].fields
        faults += range_faults(f"stream {name}", fields, vocab_size)
        if "loss" in fields and fields["loss"].max(initial=0) > 1:
            faults.append(f"stream {name}: a loss is neither 0 nor 1")
    tasks = shard.tasks()
    named = [""] if tasks is None else tasks.unique().to_pylist()
    unknown = sorted(set(named) - {*corpus.tasks, *([] if corpus.tasks else [""])})
    if unknown:
        faults.append(f"task {unknown[0]!r}, expected one of {corpus.tasks}")
    texts = [shard.text(name) for name in corpus.fields]
    label = shard.text(corpus.label) if corpus.label else None
    wrong = np.flatnonzero((sample_ids(texts, tasks, label) != shard.sample_id).any(axis=1))
    if len(wrong):
        at = shard.start + int(wrong[0])
        faults.append(f"sample {at}: sample_id is not that of its fields")
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
    entries: list[Entries] = []
    if codec.has_exact:
        exact, counts = columns["exact"], tokens.fields.get("num_exact")
        faults += _code_faults(codec, "exact", exact.fields["code"])
        if counts is None:  # all ids, which need not be listed
            all_ids = np.full(int(tokens.offsets[-1]), vocab_size)
            faults += sum_faults("exact", tokens, exact, offsets_of(all_ids), "num_exact")
        elif not (many := _many_faults("exact", counts, codec.max_exact(vocab_size))):
            faults += range_faults("exact", exact.fields, vocab_size)
            entries.append(_entries("exact", exact, counts))
        else:
            faults += many
    if codec.has_drawn:
        drawn, num_drawn = columns["drawn"], tokens.fields["num_drawn"]
        many = _many_faults("drawn", num_drawn, codec.max_drawn(vocab_size))
        faults += many + range_faults("drawn", drawn.fields, vocab_size)
        if not many:
            entries.append(_entries("drawn", drawn, num_drawn))
        if codec.has_drawn_log_probs:
            faults += _code_faults(codec, "drawn", drawn.fields["code"])
    broken = entry_faults(tokens.offsets, entries)
    if codec.name == "sampled" and not faults + broken:
        faults += _draw_faults(codec.n, offsets_of(num_drawn), drawn.fields["code"])
    faults += broken
    for name, values in tokens.fields.items():
        if name.startswith("tail_") and beyond(values, np.finfo(values.dtype).max, -np.inf):
            bad = np.count_nonzero(np.isnan(values) | (values == np.inf))
            faults.append(f"tokens.{name}: {bad} values are NaN or +inf")
    return faults


def range_faults(name: str, fields: Mapping[str, np.ndarray], vocab_size: int) -> list[str]:
    """Token ids, as they are stored, must be below V."""
    largest = _largest_id(fields)
    if largest >= vocab_size:
        return [f"{name}: id {largest}, the vocabulary has {vocab_size}"]
    return []


def _largest_id(fields: Mapping[str, np.ndarray]) -> int:
    """The largest of the ids; -1 of none."""
    low = fields["id"]
    if not len(low):
        return -1
    if "id_high" not in fields:
        return int(low.max())
    high = fields["id_high"]
    top = high.max()
    return (int(top) << 16) + int(low[high == top].max())


def beyond(values: np.ndarray, top: float, bottom: float) -> bool:
    """Whether any value is NaN, above `top` or below `bottom`.

    It compares bits, which takes a twentieth of the time that comparing float16 does.

    Args:
        values: [E] float16 or float32.
        top: at least 0.
        bottom: at most 0; minus infinity where every negative number is right.
    """
    if not len(values):
        return False
    signed, unsigned = (np.dtype(f"{kind}{values.dtype.itemsize}") for kind in "iu")
    limits = np.array([top, bottom], dtype=values.dtype)
    # As integers, floats above 0 ascend and those below 0 lie behind them and descend; NaN of
    # either sign is beyond infinity.
    above = values.view(signed).max() > limits.view(signed)[0]
    return bool(above) or bool(values.view(unsigned).max() > limits.view(unsigned)[1])


def _many_faults(name: str, counts: np.ndarray, most: int) -> list[str]:
    """No position has more entries than its codec can give."""
    largest = int(counts.max(initial=0))
    if largest > most:
        return [f"{name}: {largest} entries at one position, at most {most} expected"]
    return []


def _entries(name: str, column: Ragged, counts: np.ndarray) -> Entries:
    """The ids of a column alone."""
    ids = {key: values for key, values in column.fields.items() if key in ("id", "id_high")}
    return Entries(name, Ragged(column.offsets, ids), counts)


def sum_faults(name: str, outer: Ragged, column: Ragged, ends: np.ndarray, field: str) -> list[str]:
    """What the records of one column count must be the records of another, sample by sample.

    Args:
        name: of the counted column.
        outer: the column that counts.
        column: the counted column.
        ends: [R + 1] int64 where what each record of `outer` counts begins and ends.
        field: what holds the counts, for messages.
    """
    wrong = np.flatnonzero(ends[outer.offsets] != column.offsets)
    if len(wrong):
        m = int(wrong[0]) - 1
        return [sum_fault(name, m, field)]
    return []


def _code_faults(codec: Codec, name: str, codes: np.ndarray) -> list[str]:
    """Log-probs that are stored as they are must be some."""
    if codec.values == "uint8":
        return []
    lowest = np.finfo(codes.dtype).min if codec.name == "threshold" else -np.inf
    if not beyond(codes, _ABOVE_ZERO_NATS, lowest):
        return []
    bad = np.isnan(codes) | (codes > _ABOVE_ZERO_NATS) | (codes < lowest)
    return [f"{name}.code: {np.count_nonzero(bad)} values are no log-probs"]


def _draw_faults(num_draws: int, ends: np.ndarray, codes: np.ndarray) -> list[str]:
    """Draws with replacement: the counts at a position must add up to all draws."""
    sums = offsets_of(codes)[ends]
    wrong = np.flatnonzero(sums[1:] - sums[:-1] != num_draws)
    if len(wrong):
        return [f"drawn.code: draws at position {int(wrong[0])} do not add up to {num_draws}"]
    return []
