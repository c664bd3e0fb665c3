"""Losses of gold labels by kind of task: every one a sum over samples, each with its factor."""

# B samples, C classes, P positives

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.models.tasks import Task
from kdcache.train.losses.class_losses import label_cross_entropy, label_mse
from kdcache.train.losses.loss_plan import compute_dtype


def task_loss(task: Task, scores: Tensor, gold: Tensor, unit: Tensor, share: float) -> Tensor:
    """The loss of a task's gold labels.

    Args:
        task: whose head spoke.
        scores: [B, C].
        gold: [B] numbers of classes, or numbers; NaN for none.
        unit: [B] int64, of a ranking the query of each.
        share: factor of every sample.
    """
    if task.kind == "similarity":
        return label_mse(scores, gold, share)
    if task.kind == "ranking":
        return ranking_loss(scores[:, 0], gold, unit, share)
    return label_cross_entropy(scores, gold.nan_to_num(-100).long(), share)


def ranking_loss(scores: Tensor, gold: Tensor, unit: Tensor, share: float) -> Tensor:
    """Negative log-likelihood of what is relevant among the candidates of its query, in nats.

    The candidates of a query are its samples that have a label, and one that is none of them, of
    score 0: "nothing here is relevant". With s the scores, a positive p has the probability

        exp(s_p) / (1 + exp(s_p) + sum over the negatives n of exp(s_n)),

    positives do not compete with each other. A query's loss is the mean of -log of it over its
    positives; without any, -log of 1 / (1 + sum of exp(s_n)). It counts as often as it has
    candidates; with one candidate a query that is the logistic loss.

    Args:
        scores: [B], the higher the more relevant.
        gold: [B] 1 where relevant, 0 where not, NaN for no label: no candidate.
        unit: [B] int64, equal for the candidates of a query.
        share: factor of every candidate.

    Source: Liu et al. 2019, MT-DNN, equation 5, as MKD (section 3.1) has it; the candidate of
    score 0 is this project's, for corpora with one candidate a query.
    """
    has = ~gold.isnan()
    own = scores[has].to(compute_dtype(scores))
    return candidate_losses(own, gold[has] > 0.5, unit[has]).sum() * share


def candidate_losses(scores: Tensor, relevant: Tensor, unit: Tensor) -> Tensor:
    """[B] parts of candidates in the loss of their queries, see `ranking_loss`.

    Over a query they sum to its loss times the number of its candidates.

    Args:
        scores: [B], the higher the more relevant.
        relevant: [B] bool.
        unit: [B] int64, equal for the candidates of a query.
    """
    _, query = torch.unique(unit, return_inverse=True)
    count = int(query.max()) + 1 if len(query) else 0
    # log(1 + sum of exp) over the negatives of each query, by a shift that no exp overflows.
    shift = scores.detach().clamp(min=0).new_zeros(count)
    shift = shift.scatter_reduce(0, query, scores.detach().clamp(min=0), "amax")
    negatives = torch.where(relevant, 0.0, (scores - shift[query]).exp())
    rest = shift + ((-shift).exp() + scores.new_zeros(count).index_add(0, query, negatives)).log()
    sizes = scores.new_zeros(count).index_add(0, query, torch.ones_like(scores))
    positives = scores.new_zeros(count).index_add(0, query, relevant.to(scores))
    each = torch.logaddexp(scores, rest[query]) - scores  # -log P of a positive
    factor = torch.where(relevant, sizes[query] / positives[query].clamp(min=1), 0.0)
    return torch.where(positives[query] == 0, rest[query], each * factor)
