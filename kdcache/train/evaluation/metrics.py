"""Scores of classifiers and regressors, from what they say and what is right; names of scores."""

# M samples, C classes

from __future__ import annotations

import math

import numpy as np

#: Endings of what is better the lower it is.
_LOWER = ("loss", "loss_nats", "loss_shuffled", "perplexity", "seconds", "mse", "error", "median")


def lower_is_better(metric: str) -> bool:
    """Which way a metric is good, by the end of its name.

    Args:
        metric: its name, or its dotted key.
    """
    return metric.rsplit(".", 1)[-1].endswith(_LOWER)


def accuracy(gold: np.ndarray, said: np.ndarray) -> float:
    """Share of samples whose class is the right one.

    Args:
        gold: [M] int64 classes.
        said: [M] int64 classes.
    """
    return float((gold == said).mean()) if len(gold) else math.nan


def macro_f1(gold: np.ndarray, said: np.ndarray) -> float:
    """Mean F1 over the classes that stand in gold or are said, every class alike.

    F1 of a class is 2 TP / (2 TP + FP + FN).

    Args:
        gold: [M] int64 classes.
        said: [M] int64 classes.
    """
    true, held, hits = _counts(gold, said)
    there = (true + held) > 0
    return float((2 * hits[there] / (true + held)[there]).mean()) if len(gold) else math.nan


def binary_f1(gold: np.ndarray, said: np.ndarray) -> float:
    """F1 of class 1 of two, 2 TP / (2 TP + FP + FN); 0 where it neither stands nor is said.

    Args:
        gold: [M] int64 classes.
        said: [M] int64 classes.
    """
    count = int((gold == 1).sum() + (said == 1).sum())
    return 2 * int(((gold == 1) & (said == 1)).sum()) / count if count else 0.0


def matthews(gold: np.ndarray, said: np.ndarray) -> float:
    """Matthews correlation coefficient over all classes, -1 to 1; 0 where either side is constant.

    With c samples right of M, t_k of class k in gold and p_k said it is
    (c M - sum p_k t_k) / sqrt((M^2 - sum p_k^2) (M^2 - sum t_k^2)).

    Args:
        gold: [M] int64 classes.
        said: [M] int64 classes.

    Source: Gorodkin 2004, Comparing two K-category assignments by a K-category correlation
    coefficient.
    """
    count = len(gold)
    true, held, hits = _counts(gold, said)
    above = int(hits.sum()) * count - int(true @ held)
    spread = [count**2 - int(side @ side) for side in (held, true)]
    return above / math.sqrt(spread[0] * spread[1]) if spread[0] * spread[1] else 0.0


def pearson(gold: np.ndarray, said: np.ndarray) -> float:
    """Covariance over the product of standard deviations, -1 to 1; 0 where either is constant.

    Args:
        gold: [M] float.
        said: [M] float.
    """
    if not len(gold) or not np.ptp(gold) or not np.ptp(said):
        return 0.0
    one, other = gold - gold.mean(), said - said.mean()
    spread = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / spread if spread else 0.0


def spearman(gold: np.ndarray, said: np.ndarray) -> float:
    """Pearson correlation of ranks; equal numbers share the mean of their ranks.

    Args:
        gold: [M] float.
        said: [M] float.
    """
    return pearson(_ranks(gold), _ranks(said))


def _counts(gold: np.ndarray, said: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[C] int64 each: how often a class is right, is said, and is both of one sample."""
    size = 1 + max(int(gold.max(initial=0)), int(said.max(initial=0)))
    parts = (gold, said, gold[gold == said])
    true, held, hits = (np.bincount(one, minlength=size) for one in parts)
    return true, held, hits


def _ranks(values: np.ndarray) -> np.ndarray:
    """[M] float64 ranks from 1."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = sizes.cumsum()
    ranks: np.ndarray = (last - (sizes - 1) / 2)[group]
    return ranks
