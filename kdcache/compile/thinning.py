"""Thinning: fewer entries of a sparse label, chosen from those that are stored.

What leaves the exact entries goes into the tail sums, at every stored temperature. Gold and entropy
are the teacher's own and stay. Codes are carried over where the new codec reads them alike; else
they are rounded again, as a dump does it, so that no bias comes in.
"""

# N positions, E entries, D drawn entries

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kdcache.compile.redraw import fewer_draws, fixed_bits, systematic_draws
from kdcache.compile.sparse_labels import Entries, SparseLabels
from kdcache.dump.codecs.coding import code_values
from kdcache.formats.codec import Codec, NucleusCodec, SampledCodec, ThresholdCodec
from kdcache.formats.codes import drawn_log_probs, exact_log_probs
from kdcache.formats.schema import count_dtype
from kdcache.formats.signals import LogitsRecord


@dataclass(frozen=True)
class Thinning:
    """From one codec to another, with the random numbers of N positions.

    Attributes:
        record: of the labels as they are.
        new: of the labels to come.
        draw: [N] uint64 hashes that choose entries.
        rounding: [N] uint64 hashes that round codes.
    """

    record: LogitsRecord
    new: LogitsRecord
    draw: np.ndarray
    rounding: np.ndarray

    def apply(self, labels: SparseLabels) -> SparseLabels:
        """The labels to come."""
        old, codec = self.record.codec, self.new.codec
        if isinstance(codec, SampledCodec):
            assert isinstance(old, SampledCodec), "checked with the record"
            return self._fewer_draws(labels, old, codec)
        if isinstance(codec, ThresholdCodec):
            assert isinstance(old, ThresholdCodec), "checked with the record"
            return self._higher_threshold(labels, old, codec)
        return self._fewer_of_the_best(labels, codec)

    def _fewer_draws(
        self, labels: SparseLabels, old: SampledCodec, codec: SampledCodec
    ) -> SparseLabels:
        """Some of the draws of each position."""
        drawn = labels.drawn
        assert drawn is not None, "sampled draws"
        assert drawn.codes is not None, "sampled counts its draws"
        left = fewer_draws(drawn.codes, old.n, codec.n, self.draw)
        some = Entries(drawn.rows, drawn.ids, left.astype(count_dtype(codec.n)))
        return SparseLabels(labels.tokens, drawn=some.where(left > 0))

    def _fewer_of_the_best(self, labels: SparseLabels, codec: Codec) -> SparseLabels:
        """The most probable of the exact entries; of equal codes the lower id."""
        exact, log_probs = _exact_of(labels, self.record.codec)
        best = np.lexsort((exact.ids, -log_probs, exact.rows))
        first = self._first(exact.rows)
        keep = np.arange(len(best)) - first < codec.max_exact(self.new.vocab_size)
        if isinstance(codec, NucleusCodec):
            probs = np.exp(log_probs[best], dtype=np.float64)
            before = np.cumsum(probs) - probs
            keep &= before - before[first] < codec.p
        stays = np.zeros(len(best), dtype=bool)
        stays[best[keep]] = True
        return self._with_head(labels, exact, log_probs, stays, None)

    def _higher_threshold(
        self, labels: SparseLabels, old: ThresholdCodec, codec: ThresholdCodec
    ) -> SparseLabels:
        """Exact entries of weight c or more stay; the others and the drawn are drawn again."""
        exact, log_probs = _exact_of(labels, old)
        drawn = labels.drawn
        assert drawn is not None, "a threshold draws"
        vocab_size = self.new.vocab_size
        weights, drawn_weights = draw_weights(labels, self.record, codec)
        stays = weights >= 1
        if (old.c, old.temperatures) == (codec.c, codec.temperatures):
            stays[:] = True  # other values alone; a code may decode to a little less than c
        ranks = np.cumsum(stays)
        stays &= ranks - (ranks - stays)[self._first(exact.rows)] <= codec.max_exact(vocab_size)

        left = exact.where(~stays)
        rows = np.concatenate([left.rows, drawn.rows])
        ids = np.concatenate([left.ids, drawn.ids])
        order = np.argsort(rows << 24 | ids, kind="stable")
        weights = np.concatenate([weights[~stays], drawn_weights])[order]
        bits = fixed_bits(codec.c / len(codec.temperatures))
        most = codec.max_drawn(vocab_size)
        taken = order[systematic_draws(rows[order], weights, self.draw, bits, most)]
        codes = None
        if codec.has_drawn_log_probs:
            assert drawn.codes is not None, "checked with the record"
            told = drawn_log_probs(old, drawn.codes)
            kept = self._codes(drawn, told, old.drawn_range_nats, codec.drawn_range_nats)
            moved = self._codes(left, log_probs[~stays], old.range_nats, codec.drawn_range_nats)
            codes = np.concatenate([moved, kept])
        redrawn = Entries(rows, ids, codes).where(taken)
        return self._with_head(labels, exact, log_probs, stays, redrawn)

    def _with_head(
        self,
        labels: SparseLabels,
        exact: Entries,
        log_probs: np.ndarray,
        stays: np.ndarray,
        drawn: Entries | None,
    ) -> SparseLabels:
        """Labels whose exact entries are some of those they had; the others join the tails."""
        ranges = self.record.codec.range_nats, self.new.codec.range_nats
        head = exact.where(stays)
        codes = self._codes(head, log_probs[stays], *ranges)
        rows, leaving = exact.rows[~stays], log_probs[~stays].astype(np.float64)
        tail = {}
        for t in self.new.temperatures:
            with np.errstate(divide="ignore", over="ignore"):
                more = np.log(np.bincount(rows, np.exp(leaving / t), len(self.draw)))
                tail[t] = np.logaddexp(labels.tail[t].astype(np.float64), more).astype(np.float16)
        return SparseLabels(labels.tokens, tail, Entries(head.rows, head.ids, codes), drawn)

    def _codes(
        self, entries: Entries, log_probs: np.ndarray, old_range: float, new_range: float
    ) -> np.ndarray:
        """Codes of entries: theirs where they mean the same, else rounded at random."""
        assert entries.codes is not None, "what has log-probs has codes"
        old, codec = self.record.codec, self.new.codec
        if old.values == codec.values and (codec.values != "uint8" or old_range == new_range):
            return entries.codes
        told, ids = torch.from_numpy(log_probs), torch.from_numpy(entries.ids)
        hashes = torch.from_numpy(self.rounding.view(np.int64)[entries.rows])
        return code_values(codec, told, hashes, ids, new_range).numpy()

    def _first(self, rows: np.ndarray) -> np.ndarray:
        """[E] int64 first entry of each entry's position."""
        first: np.ndarray = np.searchsorted(rows, np.arange(len(self.draw)))[rows]
        return first


def draw_weights(
    labels: SparseLabels, record: LogitsRecord, codec: ThresholdCodec
) -> tuple[np.ndarray, np.ndarray]:
    """What stored entries weigh in the draws of a larger c, in units of it.

    An exact entry weighs its largest probability at the new codec's temperatures. A drawn one was
    drawn with its largest probability at the old codec's, over the old c: so it weighs the old c
    times the ratio of the two, and keeps at each temperature the mean that it had.

    Args:
        labels: of a threshold codec.
        record: of the labels.
        codec: the new one.

    Returns:
        [E] float64 of the exact and [D] of the drawn entries.
    """
    old, drawn = record.codec, labels.drawn
    assert isinstance(old, ThresholdCodec), "the labels are of a threshold"
    assert drawn is not None, "a threshold draws"
    exact, log_probs = _exact_of(labels, old)
    log_sums = {t: _log_sum(labels, exact.rows, log_probs, t) for t in old.temperatures}

    def largest(told: np.ndarray, rows: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
        every = [told / t - log_sums[t][rows] for t in temperatures]
        result: np.ndarray = np.max(every, axis=0)
        return result

    weights = (
        np.exp(largest(log_probs.astype(np.float64), exact.rows, codec.temperatures)) / codec.c
    )
    ratio = np.zeros(len(drawn.rows))  # logarithms
    if drawn.codes is not None:
        told = drawn_log_probs(old, drawn.codes).astype(np.float64)
        ratio = largest(told, drawn.rows, codec.temperatures)
        ratio -= largest(told, drawn.rows, old.temperatures)
    return weights, np.exp(ratio) * (old.c / codec.c)


def _log_sum(
    labels: SparseLabels, rows: np.ndarray, log_probs: np.ndarray, temperature: float
) -> np.ndarray:
    """[N] float64 log-sum-exp of all log-probs over a stored temperature; 0 by definition at 1."""
    num = len(labels.tokens["gold"])
    if temperature == 1:
        return np.zeros(num)
    powers = np.exp(log_probs.astype(np.float64) / temperature)
    with np.errstate(divide="ignore"):
        head = np.log(np.bincount(rows, powers, num))
    result: np.ndarray = np.logaddexp(head, labels.tail[temperature].astype(np.float64))
    return result


def _exact_of(labels: SparseLabels, codec: Codec) -> tuple[Entries, np.ndarray]:
    """Exact entries and their [E] float32 log-probs."""
    assert labels.exact is not None, "the codec has exact entries"
    assert labels.exact.codes is not None, "exact entries have codes"
    return labels.exact, exact_log_probs(codec, labels.exact.codes)
