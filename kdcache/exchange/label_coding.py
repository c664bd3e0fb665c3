"""Log-probs of a few ids to the labels of a top-k signal."""

# M samples, N positions, E entries, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.dump.codecs.coding import code_entropy, code_gold, code_values
from kdcache.errors import CorpusError
from kdcache.exchange.peer_rows import PeerLabels
from kdcache.formats.codec import WIDE_RANGE_NATS
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import count_dtype, split_ids
from kdcache.formats.signals import LogitsRecord

#: Probabilities of one token may sum to this much more than 1, for what printing or a curve adds.
_EXCESS, _CURVE_EXCESS = 0.01, 0.3
#: Less than this outside the k is none: files say log-probs to seven digits.
_NO_MASS = 1e-6


@dataclass(frozen=True)
class CleanLabels:
    """Labels of one sample, checked: [N] counts, [E] ids that ascend within a label, log-probs.

    `gold` is the log-prob of each token, [N], and `known` says of which it is no estimate.
    """

    counts: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    gold: np.ndarray
    known: np.ndarray
    rescaled: int


def clean(
    labels: PeerLabels, tokens: np.ndarray, where: str, k: int, vocab_size: int, lossy: bool
) -> CleanLabels:
    """Check the labels of a row, keep the k most probable ids, and find the tokens' log-probs.

    Args:
        labels: of the row.
        tokens: [N] int64 that the labels are of.
        where: words for a message.
        k: most entries of a label.
        vocab_size: V.
        lossy: whether log-probs are approximations: those that exceed 1 together are scaled down.

    Raises:
        CorpusError: with the label that is none.
    """
    num = len(tokens)
    rows = np.repeat(np.arange(num), labels.counts)
    keep = ~np.isneginf(labels.log_probs)
    rows, ids, values = rows[keep], labels.ids[keep], labels.log_probs[keep]
    _refuse(rows, ~np.isfinite(values), where, "a log-prob that is no number")
    _refuse(rows, (ids < 0) | (ids >= vocab_size), where, f"an id outside 0 to {vocab_size - 1}")
    order = np.lexsort((-values, rows))
    rows, ids, values = rows[order], ids[order], values[order]
    counts = np.bincount(rows, minlength=num)
    top = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts) < k
    rows, ids, values = rows[top], ids[top], values[top]
    order = np.lexsort((ids, rows))
    rows, ids, values = rows[order], ids[order], values[order]
    twice = np.zeros(len(ids), dtype=bool)
    twice[1:] = (ids[1:] == ids[:-1]) & (rows[1:] == rows[:-1])
    _refuse(rows, twice, where, "an id twice")
    counts = np.bincount(rows, minlength=num)
    if num and not counts.all():
        empty = int(np.flatnonzero(counts == 0)[0])
        raise CorpusError(f"{where}: label {empty} (from 0) has no id of any probability")
    total = np.bincount(rows, weights=np.exp(np.minimum(values, 1.0)), minlength=num)
    _refuse(
        np.arange(num),
        total > 1 + (_CURVE_EXCESS if lossy else _EXCESS),
        where,
        "probabilities that sum to more than 1: not log-probs over the vocabulary",
    )
    over = total > 1
    values = np.minimum(values - np.log(np.where(over, total, 1.0))[rows], 0.0)
    gold, known = _gold(labels.gold, tokens, rows, ids, values, counts, vocab_size)
    rescaled = int((total > 1 + _NO_MASS).sum())
    return CleanLabels(counts, ids, values, gold, known, rescaled)


def _refuse(rows: np.ndarray, wrong: np.ndarray, where: str, what: str) -> None:
    """Name the first label that is wrong."""
    found = np.flatnonzero(wrong)
    if len(found):
        raise CorpusError(f"{where}: label {int(rows[found[0]])} (from 0) has {what}")


def rest_of(
    rows: np.ndarray, values: np.ndarray, counts: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """[N] mass outside the kept ids, 0 where there is none, and [N] how many ids that is."""
    mass = 1 - np.bincount(rows, weights=np.exp(values), minlength=len(counts))
    left = vocab_size - counts
    return np.where((mass < _NO_MASS) | (left <= 0), 0.0, mass), np.maximum(left, 1)


def _gold(
    said: np.ndarray,
    tokens: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
    vocab_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """[N] log-prob of each token, and [N] bool where that is known.

    Known is what the file says of it and what a kept entry says. Of another token it is the even
    share of the mass outside, and no more than the least that was kept.
    """
    num = len(tokens)
    mass, left = rest_of(rows, values, counts, vocab_size)
    least = np.zeros(num)
    np.minimum.at(least, rows, values)
    with np.errstate(divide="ignore"):
        share = np.where(mass > 0, np.log(mass / left), -WIDE_RANGE_NATS)
    gold = np.minimum(share, least)
    known = np.isfinite(said)
    gold[known] = np.minimum(said[known], least[known])
    held = ids == tokens[rows]
    gold[rows[held]] = values[held]
    known[rows[held]] = True
    return gold, known


def encode(
    record: LogitsRecord, labels: Sequence[CleanLabels], sample_ids: np.ndarray, rows: np.ndarray
) -> dict[str, Ragged]:
    """Columns of some samples.

    Args:
        record: of the signal.
        labels: of M samples.
        sample_ids: [M, 16] uint8.
        rows: [M] int64 corpus rows.
    """
    lengths = np.array([len(one.counts) for one in labels], dtype=np.int64)
    counts, ids, values, gold = (
        np.concatenate([getattr(one, name) for one in labels])
        for name in ("counts", "ids", "log_probs", "gold")
    )
    position = np.repeat(np.arange(len(counts)), counts)  # [E]
    keys = sample_keys(record.seed, "round", record.name, sample_ids, rows)
    within = np.arange(len(counts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    hashes = torch.from_numpy(position_hash(np.repeat(keys, lengths), within).view(np.int64))
    mass, left = rest_of(position, values, counts, record.vocab_size)
    with np.errstate(divide="ignore"):
        tail = np.log(mass)  # -inf where there is none
    inside = np.bincount(position, weights=np.exp(values) * values, minlength=len(counts))
    entropy = -inside - np.where(mass > 0, mass * (np.where(mass > 0, tail, 0) - np.log(left)), 0)
    codec, vocab_size = record.codec, record.vocab_size
    ends = offsets_of(lengths)
    log_probs = torch.from_numpy(values.astype(np.float32))
    code = code_values(
        codec,
        log_probs,
        hashes[torch.from_numpy(position)],
        torch.from_numpy(ids),
        codec.range_nats,
    )
    gold_tensor = torch.from_numpy(gold.astype(np.float32))
    entropy = np.clip(entropy, 0, math.log(vocab_size)).astype(np.float32)
    tokens = {
        "num_exact": counts.astype(count_dtype(codec.max_exact(vocab_size))),
        "gold": code_gold(gold_tensor).numpy(),
        "entropy": code_entropy(torch.from_numpy(entropy), vocab_size, hashes).numpy(),
        "tail_0": tail.astype(np.float16),
    }
    exact = {**split_ids(ids, vocab_size), "code": code.numpy()}
    return {
        "tokens": Ragged(ends, tokens),
        "exact": Ragged(offsets_of(counts)[ends], exact),
    }
