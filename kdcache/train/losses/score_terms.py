"""Terms over a teacher's class scores, as classifiers and students of several tasks have them."""

# B samples, R of them with scores of the teacher, C classes

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.recipe import ScoreKLTerm, ScoreMSETerm, Term
from kdcache.train.batches.batch import Scores
from kdcache.train.losses.class_losses import score_kl
from kdcache.train.losses.feature_losses import score_mse
from kdcache.train.losses.objective import Moment


def tempered(moments: Iterable[Moment], terms: Sequence[Term]) -> Iterator[Moment]:
    """Terms at a step, score_kl with its temperature and a weight that makes up for it.

    Args:
        moments: from `Objective.at`.
        terms: of the objective.
    """
    for one in moments:
        term = terms[one.number]
        if isinstance(term, ScoreKLTerm):
            factor = term.temperature**2 if term.temperature_squared else 1.0
            yield replace(one, weight=one.weight * factor, temperature=term.temperature)
        else:
            yield one


def scores_loss(
    term: ScoreMSETerm | ScoreKLTerm,
    logits: Tensor,
    scores: Scores,
    temperature: float,
    share: float,
) -> Tensor:
    """A term before its weight; samples without scores have no part in it.

    Args:
        term: which loss.
        logits: [B, C] float of the student.
        scores: of the teacher, [R, C].
        temperature: of score_kl.
        share: factor of every sample.

    Returns:
        Scalar, nats or the square of the scores' unit.
    """
    own, teacher = logits[scores.counts > 0], scores.values.view(-1, len(scores.labels))
    if isinstance(term, ScoreKLTerm):
        return score_kl(own, teacher, temperature, share)
    each = share * (len(scores.labels) if term.over_classes == "sum" else 1)
    return score_mse(own, teacher, own.new_full((len(own),), each, dtype=torch.float32))
