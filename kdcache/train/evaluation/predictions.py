"""What a model says of every sample of a test set, beside what is right: scores, and lines."""

# M samples, C classes

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.models.tasks import Task
from kdcache.train.evaluation.metrics import (
    accuracy,
    binary_f1,
    macro_f1,
    matthews,
    pearson,
    spearman,
)
from kdcache.train.losses.task_losses import candidate_losses


@dataclass(frozen=True)
class Predictions:
    """What a model says of the samples of one task.

    Attributes:
        task: what its labels are.
        rows: [M] int64, where they stand in the task's own files, from 0.
        unit: [M] int64, equal for samples that are drawn together: the candidates of a query of a
            ranking, else every sample by itself.
        gold: [M] int64 classes, or float64 numbers.
        said: [M] int64 classes, or float64 numbers.
        loss: [M] float64, whose mean is the loss: nats, of numbers the squared error.
        score: [M] float64, of a ranking what its classes are made of; None else.
    """

    task: Task
    rows: np.ndarray
    unit: np.ndarray
    gold: np.ndarray
    said: np.ndarray
    loss: np.ndarray
    score: np.ndarray | None = None

    @classmethod
    def of(
        cls, task: Task, scores: np.ndarray, gold: np.ndarray, query: np.ndarray, rows: np.ndarray
    ) -> Predictions:
        """The predictions of a model's scores.

        Args:
            task: whose they are.
            scores: [M, C] float64.
            gold: [M] int64 classes, or float64 numbers.
            query: [M] int64, equal for the candidates of a query.
            rows: [M] int64.
        """
        loss = sample_losses(task, scores, gold, query)
        if task.kind == "ranking":
            own = scores[:, 0]
            return cls(task, rows, query, gold, (own > 0).astype(np.int64), loss, own)
        said = scores[:, 0] if task.kind == "similarity" else scores.argmax(1)
        return cls(task, rows, np.arange(len(rows)), gold, said, loss)

    def metrics(self, chosen: np.ndarray | None = None) -> dict[str, float]:
        """`loss`, and what `class_metrics` or `number_metrics` says.

        Args:
            chosen: [N] int64, those of the samples that count, some perhaps several times; None:
                all, once.
        """
        gold, said, loss = self.gold, self.said, self.loss
        if chosen is not None:
            gold, said, loss = gold[chosen], said[chosen], loss[chosen]
        found = {"loss": float(loss.mean())}
        if self.task.kind == "similarity":
            return found | number_metrics(gold, said)
        return found | class_metrics(gold, said, len(self.task.labels))

    def lines(self, name: str) -> Iterable[str]:
        """A JSON object for each sample.

        Args:
            name: of the task; empty: that of a student that has no other.
        """
        ranked = self.score is not None
        for number, row in enumerate(self.rows.tolist()):
            line = {"row": row} | ({"task": name} if name else {})
            line |= {"query": int(self.unit[number])} if ranked else {}
            line |= {"gold": self._named(self.gold[number])}
            line |= {"prediction": self._named(self.said[number])}
            line |= {"score": float(self.score[number])} if self.score is not None else {}
            yield json.dumps(line | {"loss": float(self.loss[number])}, ensure_ascii=False)

    def _named(self, value: Any) -> str | float:
        """A class by its name, a number as it is."""
        return float(value) if self.task.kind == "similarity" else self.task.labels[int(value)]


def parse_predictions(task: Task, lines: Iterable[Mapping[str, Any]]) -> Predictions:
    """The predictions that `Predictions.lines` wrote.

    Args:
        task: what its labels are.
        lines: of the task alone, as values.

    Raises:
        ValueError: a line is not as it should be.
    """
    index: dict[Any, int] = {name: number for number, name in enumerate(task.labels)}
    held = list(lines)

    def column(key: str) -> np.ndarray:
        if task.kind == "similarity":
            return np.array([float(line[key]) for line in held], np.float64)
        return np.array([index[line[key]] for line in held], np.int64)

    try:
        rows = np.array([int(line["row"]) for line in held], np.int64)
        unit, score = np.arange(len(held)), None
        if task.kind == "ranking":
            unit = np.array([int(line["query"]) for line in held], np.int64)
            score = np.array([float(line["score"]) for line in held], np.float64)
        loss = np.array([float(line["loss"]) for line in held], np.float64)
        return Predictions(task, rows, unit, column("gold"), column("prediction"), loss, score)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line lacks, or does not know, {error}") from None


def sample_losses(
    task: Task, scores: np.ndarray, gold: np.ndarray, query: np.ndarray
) -> np.ndarray:
    """[M] float64, each sample's part of the loss of gold labels, whose mean `task_loss` is.

    Args:
        task: whose head spoke.
        scores: [M, C] float64.
        gold: [M] int64 classes, or float64 numbers.
        query: [M] int64, equal for the candidates of a query.
    """
    found: np.ndarray
    if task.kind == "similarity":
        found = (scores[:, 0] - gold) ** 2
    elif task.kind == "ranking":
        relevant, unit = torch.from_numpy(gold == 1), torch.from_numpy(query)
        found = candidate_losses(torch.from_numpy(scores[:, 0].copy()), relevant, unit).numpy()
    else:
        log_probs = torch.from_numpy(scores).log_softmax(1).numpy()
        found = -log_probs[np.arange(len(gold)), gold]
    return found


def number_metrics(gold: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Both correlations: pearson and spearman, see `metrics`.

    Args:
        gold: [M] float64.
        said: [M] float64.
    """
    return {"pearson": pearson(gold, said), "spearman": spearman(gold, said)}


def class_metrics(gold: np.ndarray, said: np.ndarray, num_classes: int) -> dict[str, float]:
    """accuracy, macro_f1, mcc, and of two classes f1 (that of the last), see `metrics`.

    Args:
        gold: [M] int64 classes.
        said: [M] int64 classes.
        num_classes: C.
    """
    binary = {"f1": binary_f1(gold, said)} if num_classes == 2 else {}
    return {
        "accuracy": accuracy(gold, said),
        **binary,
        "macro_f1": macro_f1(gold, said),
        "mcc": matthews(gold, said),
    }
