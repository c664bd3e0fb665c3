"""The canary: do labels and targets belong together, position by position?

A cache stores, beside its entries, the teacher's own log-prob of every target. Labels that
slid by one token, lie in another order or speak of another tokenizer's ids disagree with it.
"""

# N positions, E exact entries, V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.errors import TrainingError
from kdcache.formats.codec import WIDE_RANGE_NATS, Codec, SampledCodec, ThresholdCodec
from kdcache.formats.codes import exact_log_probs, gold_log_probs
from kdcache.labels.coded_labels import CodedLabels
from kdcache.train.batches.batch import Batch, Masked

#: Share of the positions that may disagree: none should, beyond the rounding of codes.
MAX_DISAGREEING = 0.05
#: Standard deviations at which a count is no chance.
SIGMAS = 5.0
#: Agreeing positions after which a head that fits neighbours better is the teacher's own way.
PROOF = 20


@dataclass(frozen=True)
class Alignment:
    """What the canary saw.

    Attributes:
        num_positions: N.
        hits: positions whose stored entries hold the target, by shift of the targets (-1, 0, 1).
        checked: positions where the stored entries say something about the gold log-prob.
        disagreeing: those of them where both differ by more than rounding.
        imported: whether values agree in any case, so that the hits alone tell.
    """

    num_positions: int
    hits: dict[int, int]
    checked: int
    disagreeing: int
    imported: bool = False

    @property
    def aligned(self) -> bool:
        """Whether nothing speaks against it."""
        if self.disagreeing > MAX_DISAGREEING * self.checked:
            return False
        # An untrained teacher may repeat its input, so values that agree outweigh the hits.
        if self.checked >= PROOF and not self.imported:
            return True
        shifted = max(self.hits[-1], self.hits[1])
        return shifted - self.hits[0] <= SIGMAS * math.sqrt(shifted + self.hits[0] + 1)


def check_batch(batch: Batch, target: str, signals: Sequence[str]) -> None:
    """Check the labels of a batch that is still on the host.

    Args:
        batch: what to check.
        target: the stream whose tokens are predicted.
        signals: of soft labels at its tokens.

    Raises:
        TrainingError: labels do not belong to the targets, with what was counted.
    """
    tokens = batch.streams[target]
    lengths = tokens.mask.sum(dim=1).numpy()
    for name in signals:
        coded = batch.signals[name]
        assert isinstance(coded, CodedLabels)
        check_labels(name, coded, tokens.flat.numpy(), lengths)


def check_labels(name: str, coded: CodedLabels, targets: np.ndarray, lengths: np.ndarray) -> None:
    """Check the labels of one signal.

    Args:
        name: of the signal.
        coded: its labels of N positions, on the host.
        targets: [N] int64 target ids.
        lengths: [samples] int64 positions of each sample, N in all.

    Raises:
        TrainingError: they do not belong to the targets, with what was counted.
    """
    found = alignment(coded, targets, lengths)
    if not found.aligned:
        raise TrainingError(
            f"signal {name!r}: labels are shifted against their targets, or in another order: "
            f"the stored entries hold the target at {found.hits[0]} of {found.num_positions} "
            f"positions (at shift -1: {found.hits[-1]}, at +1: {found.hits[1]}), and "
            f"{found.disagreeing} of {found.checked} values differ from the stored log-prob "
            "of the target; run `kdcache verify`, then dump the signal again"
        )


def alignment(coded: CodedLabels, targets: np.ndarray, lengths: np.ndarray) -> Alignment:
    """Compare labels with the targets they should belong to.

    Args:
        coded: labels of N positions, on the host.
        targets: [N] int64 target ids.
        lengths: [samples] int64 positions of each sample, N in all.
    """
    codec, num = coded.spec.codec, len(targets)
    sample = np.repeat(np.arange(len(lengths)), lengths)  # [N]
    rows, ids = _entries(coded, num)
    hits = {}
    for shift in (-1, 0, 1):
        shifted = np.full(num, -1, dtype=np.int64)
        here = np.arange(num)
        there = here + shift
        inside = (there >= 0) & (there < num)
        inside[inside] = sample[there[inside]] == sample[inside]
        shifted[inside] = targets[there[inside]]
        hits[shift] = len(np.unique(rows[ids == shifted[rows]]))
    if isinstance(codec, SampledCodec):
        checked, disagreeing = _drawn_against_gold(coded, targets, rows, ids)
    else:
        checked, disagreeing = _exact_against_gold(coded, targets, rows, ids)
    return Alignment(num, hits, checked, disagreeing, coded.spec.imported)


def check_masked(batch: Batch, source: str, signals: Mapping[str, str]) -> None:
    """Check labels at masked tokens of a batch that is still on the host.

    Args:
        batch: what to check.
        source: the stream that is masked.
        signals: of such labels, each with the masks signal that it was made from.

    Raises:
        TrainingError: labels do not belong to the tokens that were masked.
    """
    for name, masks in signals.items():
        coded, masked = batch.signals[name], batch.signals[masks]
        assert isinstance(coded, CodedLabels)
        assert isinstance(masked, Masked)
        samples = np.repeat(np.arange(len(batch)), masked.counts.sum(1).numpy())  # [K]
        targets = batch.streams[source].ids.numpy()[samples, masked.positions.numpy()]
        check_labels(name, coded, targets, masked.counts.flatten().numpy())


def _entries(coded: CodedLabels, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Position [E] and id [E] of what stands for a position: exact entries, else drawn ones."""
    codec, vocab_size = coded.spec.codec, coded.spec.vocab_size
    counts, ids = coded.num_exact, coded.exact_id
    if not codec.has_exact:
        counts, ids = coded.num_drawn, coded.drawn_id
    if counts is None or ids is None:  # full: every id, so the most probable one stands for it
        assert coded.exact_code is not None
        values = exact_log_probs(codec, coded.exact_code.numpy()).reshape(num, vocab_size)
        return np.arange(num), values.argmax(axis=1)
    return np.repeat(np.arange(num), counts.numpy()), ids.numpy()


def _exact_against_gold(
    coded: CodedLabels, targets: np.ndarray, rows: np.ndarray, ids: np.ndarray
) -> tuple[int, int]:
    """Positions where exact entries bound the gold log-prob, and those where both disagree."""
    codec, num = coded.spec.codec, len(targets)
    assert coded.exact_code is not None
    # Codes are even steps in sqrt(-log_prob), so that is where differences are judged.
    gold = np.sqrt(-gold_log_probs(coded.gold.numpy()))  # [N]
    entry = np.sqrt(np.clip(-exact_log_probs(codec, coded.exact_code.numpy()), 0, WIDE_RANGE_NATS))
    tolerance = _tolerance(codec)
    if codec.name == "full":
        at = np.arange(num) * coded.spec.vocab_size + targets
        return num, int((np.abs(entry[at] - gold) > tolerance).sum())
    match = ids == targets[rows]
    difference = np.abs(entry[match] - gold[rows[match]])
    held = np.zeros(num, dtype=bool)
    held[rows[match]] = True
    # What is more probable than the least of the kept entries must be among them.
    least = np.full(num, -np.inf)
    np.maximum.at(least, rows, entry)
    if isinstance(codec, ThresholdCodec) and 1.0 in codec.temperatures:
        least[:] = math.sqrt(-math.log(codec.c))
    missing = ~held & (gold < least - tolerance)
    return int(held.sum() + missing.sum()), int((difference > tolerance).sum() + missing.sum())


def _drawn_against_gold(
    coded: CodedLabels, targets: np.ndarray, rows: np.ndarray, ids: np.ndarray
) -> tuple[int, int]:
    """All positions if the draws on targets are as many as the gold log-probs promise."""
    assert isinstance(coded.spec.codec, SampledCodec)
    assert coded.drawn_code is not None
    draws, num = coded.spec.codec.n, len(targets)
    gold = np.exp(gold_log_probs(coded.gold.numpy()).astype(np.float64))  # [N]
    found = float(coded.drawn_code.numpy()[ids == targets[rows]].sum())
    expected = draws * float(gold.sum())
    deviation = math.sqrt(draws * float((gold * (1 - gold)).sum()) + 1)
    # The stored log-prob is rounded; its error in expectation stays below a hundredth.
    off = abs(found - expected) > SIGMAS * deviation + 0.01 * expected
    return num, num if off else 0


def _tolerance(codec: Codec) -> float:
    """Largest honest difference in sqrt(nats): half a step of gold, one of a uint8 code."""
    wide = math.sqrt(WIDE_RANGE_NATS) / 255
    narrow = math.sqrt(codec.range_nats) / 255 if codec.values == "uint8" else 0.0
    return 0.5 * wide + narrow + 0.02
