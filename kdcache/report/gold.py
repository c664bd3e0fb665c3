"""What a classifier or regressor says against the gold labels of its corpus.

# M samples of a shard, A described inputs, C labels
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.formats.cache import Cache
from kdcache.formats.signals import ClassesRecord


def gold_labels(cache: Cache, shard: int, samples: slice) -> list[str] | None:
    """Gold labels of some samples of a shard, counted within it; None where there are none."""
    field = cache.manifest.corpus.label
    if field is None:
        return None
    labels: list[str] = cache.samples(shard).text(field)[samples].to_pylist()
    return labels


class Gold:
    """How often a classifier is right, or how a regressor correlates, as far as labels tell.

    A gold label is the name of a label, or its number; for a regressor a number. Where one is
    neither, nothing is compared.
    """

    def __init__(self, record: ClassesRecord) -> None:
        """Name the signal.

        Args:
            record: its record.
        """
        self.record = record
        self._known = record.problem != "multi_label" and (
            record.problem == "classification" or len(record.labels) == 1
        )
        self._gold: list[float] = []
        self._said: list[float] = []

    def add(self, labels: Sequence[str] | None, counts: np.ndarray, scores: np.ndarray) -> None:
        """Take in the next samples.

        Args:
            labels: M gold labels.
            counts: [M] described inputs of each sample.
            scores: [A, C].
        """
        if not self._known or labels is None:
            self._known = False
            return
        numbers = [self._number(label) for label, n in zip(labels, counts, strict=True) if n]
        if any(number is None for number in numbers):
            self._known = False
            return
        regression = self.record.problem == "regression"
        self._gold += np.repeat(np.array(numbers, dtype=float), counts[counts > 0]).tolist()
        self._said += (scores[:, 0] if regression else scores.argmax(axis=1)).tolist()

    def _number(self, label: str) -> float | None:
        """A gold label as the number of a label, or as a score."""
        if self.record.problem == "regression":
            try:
                number = float(label)
            except ValueError:
                return None
            return number if math.isfinite(number) else None
        if label in self.record.labels:
            return self.record.labels.index(label)
        if label.isdecimal() and int(label) < len(self.record.labels):
            return int(label)
        return None

    def summary(self) -> dict[str, Any]:
        """`gold_accuracy` of a classifier, `gold_pearson` of a regressor; None if unknown."""
        known = self._known and len(self._gold) > 0
        gold, said = np.array(self._gold), np.array(self._said)
        if self.record.problem != "regression":
            return {"gold_accuracy": float((gold == said).mean()) if known else None}
        spread = known and gold.std() > 0 and said.std() > 0
        return {"gold_pearson": float(np.corrcoef(gold, said)[0, 1]) if spread else None}
