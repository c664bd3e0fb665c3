"""Samples that several caches have: what they say of them must fit together.

# S caches, U samples, R samples of a block
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.compile.compatible import PlannedSignal
from kdcache.compile.matching import ABSENT, first_source
from kdcache.compile.measures import BLOCK_SAMPLES
from kdcache.compile.planning import Plan
from kdcache.compile.source import Source
from kdcache.errors import IdentityError
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import LogitsRecord

#: Codes by which the log-probs of targets may differ: one is rounding's; teachers of less than
#: float32 add the noise of their arithmetic, which moves with the shape of a batch.
GOLD_TOLERANCE, GOLD_TOLERANCE_LOW = 1, 4

#: Returns [R] bool: for which samples both sides fit.
Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]


def num_overlaps(plan: Plan) -> int:
    """Samples that a cache has beside the first that has them, all caches together."""
    return int((plan.where != ABSENT).sum()) - plan.num_samples


def check_overlaps(
    sources: Sequence[Source],
    plan: Plan,
    signals: Sequence[PlannedSignal],
    bar: tqdm[Any],
) -> None:
    """Compare the tokens, and the teacher's log-probs of the targets, of the same samples.

    Args:
        sources: the caches.
        plan: which samples each has.
        signals: of the output.
        bar: advanced by the samples that are compared.

    Raises:
        IdentityError: they differ; names the first sample.
    """
    home = first_source(plan.where)
    for other in sources:
        for first in sources[: other.number]:
            both = np.flatnonzero((home == first.number) & (plan.where[other.number] != ABSENT))
            pair = _Pair(first, other, plan.where)
            for columns in _blocks(both):
                for name in first.cache.manifest.streams:
                    pair.check_stream(name, columns)
                for signal in signals:
                    if {first.number, other.number} <= set(signal.carriers):
                        pair.check_gold(signal, columns)
                bar.update(len(columns))
    for signal in signals:
        for name in signal.record.inputs:
            _check_input(sources, plan, signal, name)


def _check_input(sources: Sequence[Source], plan: Plan, signal: PlannedSignal, name: str) -> None:
    """Where a signal comes from one cache and its masks from another, the masks must be equal."""
    givers = [source.number for source in sources if name in source.cache.signals]
    of_signal = first_source(plan.where, signal.carriers)
    of_input = first_source(plan.where, givers)
    for s in signal.carriers:
        for t in givers:
            apart = (of_signal == s) & (of_input == t) & (s != t)
            for block in _blocks(np.flatnonzero(apart)):
                _Pair(sources[t], sources[s], plan.where).check_columns(name, signal.name, block)


class _Pair:
    """Two caches that have the same samples."""

    def __init__(self, first: Source, other: Source, where: np.ndarray) -> None:
        self._first, self._other, self._where = first, other, where

    def check_stream(self, name: str, columns: np.ndarray) -> None:
        """Tokens must be equal."""
        a, b = (side.take_stream(name, index) for side, index in self._sides(columns))
        self._refuse(columns, equal_samples(a, b), f"its tokens of stream {name!r}")

    def check_columns(self, name: str, made: str, columns: np.ndarray) -> None:
        """All columns of an Arrow signal must be equal."""
        a, b = (side.take_columns(name, index) for side, index in self._sides(columns))
        fits = np.all([equal_samples(a[column], b[column]) for column in a], axis=0)
        self._refuse(columns, fits, f"its {name!r}, which {made!r} was made from,")

    def check_gold(self, signal: PlannedSignal, columns: np.ndarray) -> None:
        """The teacher's log-probs of the targets must be equal up to rounding and noise."""
        record = signal.record
        # Labels of masked tokens and of hypotheses are about tokens that may differ rightly.
        if not isinstance(record, LogitsRecord) or record.inputs:
            return
        a, b = (
            side.take_columns(signal.name, index)["tokens"] for side, index in self._sides(columns)
        )
        exact = record.teacher is not None and record.teacher.dtype == "float32"
        most = GOLD_TOLERANCE if exact else GOLD_TOLERANCE_LOW
        what = f"the teacher's log-probs of its targets in {signal.name!r}"
        self._refuse(columns, close_samples(a, b, "gold", most), what)

    def _sides(self, columns: np.ndarray) -> list[tuple[Source, np.ndarray]]:
        return [
            (side, self._where[side.number, columns].astype(np.int64))
            for side in (self._first, self._other)
        ]

    def _refuse(self, columns: np.ndarray, fits: np.ndarray, what: str) -> None:
        wrong = np.flatnonzero(~fits)
        if not len(wrong):
            return
        (first, one), (other, two) = self._sides(columns[wrong[:1]])
        raise IdentityError(
            f"{other.name}: sample {other.take_ids(two)[0].tobytes().hex()} (sample {int(two[0])}; "
            f"{int(one[0])} of {first.name}): {what} differ from those of {first.name}: the caches "
            "do not fit together; dump one of them again, or leave the sample out"
        )


def equal_samples(a: Ragged, b: Ragged) -> np.ndarray:
    """[R] bool, which samples of two columns have the same records.

    Args:
        a: a column, offsets from 0.
        b: one of the same fields.
    """
    return _agree(a, b, lambda left, right: _all_equal(left, right))


def close_samples(a: Ragged, b: Ragged, field: str, most: int) -> np.ndarray:
    """[R] bool, in which samples a field of small integers differs nowhere by more than `most`."""

    def close(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> np.ndarray:
        near: np.ndarray = (
            np.abs(left[field].astype(np.int64) - right[field].astype(np.int64)) <= most
        )
        return near

    return _agree(a, b, close)


def _all_equal(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = np.all([left[name] == right[name] for name in left], axis=0)
    return found


def _agree(
    a: Ragged,
    b: Ragged,
    same: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], np.ndarray],
) -> np.ndarray:
    """[R] bool: as many records, and `same` of all of them."""
    fits = a.lengths == b.lengths
    rows = np.flatnonzero(fits)
    left, right = a.take(rows), b.take(rows)
    good = np.zeros(int(left.offsets[-1]) + 1, dtype=np.int64)
    np.cumsum(~same(left.fields, right.fields), out=good[1:])
    fits[rows] = good[left.offsets[1:]] == good[left.offsets[:-1]]
    return fits


def _blocks(columns: np.ndarray) -> list[np.ndarray]:
    return [columns[at : at + BLOCK_SAMPLES] for at in range(0, len(columns), BLOCK_SAMPLES)]
