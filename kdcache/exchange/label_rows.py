"""Soft labels of samples as numbers: for each label its position, its ids and their log-probs."""

# N labels of a part, E exact entries, D drawn entries

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kdcache.formats.cache import Cache
from kdcache.formats.codec import SampledCodec
from kdcache.formats.codes import drawn_log_probs, entropy_nats, exact_log_probs, gold_log_probs
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import join_ids
from kdcache.formats.signals import LogitsRecord

#: Exact entries of a label of codec `full` that are kept where no number is asked for.
FULL_TOP_K = 64
#: Log-probs that are sorted at once.
_BLOCK_ENTRIES = 1 << 22


@dataclass(frozen=True)
class LabelRows:
    """Labels of some samples of a shard.

    Attributes:
        start: first sample, counted over the corpus.
        offsets: [M + 1] int64, labels of sample m are [offsets[m], offsets[m + 1]).
        position: [N] int32 which token of its stream each is of.
        gold: [N] float32 nats of that token.
        entropy: [N] float32 nats.
        ends: [N + 1] int64, exact entries of label n are [ends[n], ends[n + 1]).
        ids: [E] int32 exact entries, the most probable first.
        log_probs: [E] float32 nats.
        drawn_ends: [N + 1] int64; None where nothing is drawn.
        drawn_ids: [D] int32.
        drawn_weights: [D] float32, what each stands for at temperature 1.
    """

    start: int
    offsets: np.ndarray
    position: np.ndarray
    gold: np.ndarray
    entropy: np.ndarray
    ends: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    drawn_ends: np.ndarray | None
    drawn_ids: np.ndarray | None
    drawn_weights: np.ndarray | None


def label_rows(
    cache: Cache, record: LogitsRecord, shard: int, top_k: int | None
) -> Iterator[LabelRows]:
    """Labels of one shard, part by part.

    Args:
        cache: that has the signal.
        record: of the signal, made at the tokens of its stream.
        shard: shard number.
        top_k: most exact entries of a label; None: all.
    """
    samples = cache.samples(shard)
    stream = samples.streams[record.stream]
    for start, stop, columns in cache.signal_shard(record.name, shard).parts:
        tokens = columns["tokens"]
        own = stream.part(start - samples.start, stop - samples.start)
        position = segment_indices(np.zeros(len(own), np.int64), own.lengths)
        if record.at == "positions":
            keep = position > 0
            if "loss" in own.fields:
                keep &= own.fields["loss"].astype(bool)
            position = position[keep]
        num = len(tokens.fields["gold"])
        assert len(position) == num, "labels are counted when they are written"
        ends, ids, log_probs = _exact(record, columns, num, top_k)
        drawn = _drawn(record, columns)
        yield LabelRows(
            start,
            tokens.offsets.astype(np.int64),
            position.astype(np.int32),
            gold_log_probs(tokens.fields["gold"]),
            entropy_nats(tokens.fields["entropy"], record.vocab_size),
            ends,
            ids,
            log_probs,
            *drawn,
        )


def _exact(
    record: LogitsRecord, columns: Mapping[str, Ragged], num: int, top_k: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact entries by probability: where each label's end, their ids and log-probs."""
    codec = record.codec
    if not codec.has_exact:
        return np.zeros(num + 1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    fields = columns["exact"].fields
    values = exact_log_probs(codec, fields["code"])
    if codec.name == "full":
        return _most_probable(values.reshape(num, -1), top_k or FULL_TOP_K)
    counts = columns["tokens"].fields["num_exact"].astype(np.int64)
    ids = join_ids(fields)
    rows = np.repeat(np.arange(num), counts)
    order = np.lexsort((-values, rows))
    if top_k is not None:
        kept = segment_indices(np.zeros(num, np.int64), counts) < top_k
        order, counts = order[kept], np.minimum(counts, top_k)
    return offsets_of(counts), ids[order], values[order]


def _most_probable(values: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of [N, V] log-probs the k largest of each label, as `_exact` gives them."""
    num, vocab_size = values.shape
    k = min(top_k, vocab_size)
    ids = np.empty((num, k), dtype=np.int32)
    step = max(1, _BLOCK_ENTRIES // vocab_size)
    for at in range(0, num, step):
        ids[at : at + step] = np.argsort(-values[at : at + step], axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(values, ids.astype(np.int64), axis=1)
    return np.arange(num + 1, dtype=np.int64) * k, ids.ravel(), kept.ravel()


def _drawn(
    record: LogitsRecord, columns: Mapping[str, Ragged]
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Drawn entries: where each label's end, their ids and weights at temperature 1."""
    codec = record.codec
    if not codec.has_drawn:
        return None, None, None
    fields = columns["drawn"].fields
    counts = columns["tokens"].fields["num_drawn"].astype(np.int64)
    ids = join_ids(fields)
    weights = np.full(len(ids), codec.drawn_weight, dtype=np.float32)
    if isinstance(codec, SampledCodec):
        weights *= fields["code"]
    elif codec.has_drawn_log_probs:
        weights = np.exp(drawn_log_probs(codec, fields["code"]))
    return offsets_of(counts), ids, weights
