"""Losses on what a student computes on its way: hidden states, attentions, scores of classes.

Half types are computed in float32: the square of a float16 above 255 is infinite.
"""

# R rows (tokens, or samples), D features, H heads, B samples, C classes

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.train.losses.loss_plan import compute_dtype


def hidden_mse(
    student: Tensor, teacher: Tensor, row_weight: Tensor | None = None, *, fused: bool = False
) -> Tensor:
    """Mean squared difference of hidden states over rows and features.

    Args:
        student: [R, D] float, projected to the teacher's width where theirs differ.
        teacher: [R, D] float; gets no gradient.
        row_weight: [R] factor of each row instead of the mean's 1 / R; 0 ignores the row, whatever
            it holds.
        fused: the teacher's side is made by a learned layer, and gets a gradient after all.

    Returns:
        Scalar in the square of the states' unit; 0 of no rows.

    Raises:
        TrainingError: the shapes differ, or a row has no weight of its own.

    Source: Romero et al. 2015, FitNets: Hints for Thin Deep Nets.
    """
    return _squared("hidden_mse", student, teacher if fused else teacher.detach(), row_weight)


def hidden_cosine(
    student: Tensor, teacher: Tensor, row_weight: Tensor | None = None, *, fused: bool = False
) -> Tensor:
    """Mean of 1 - cosine similarity of hidden states, row by row.

    Args and Raises as `hidden_mse`.

    Returns:
        Scalar without unit, 0 to 2; 0 of no rows. A row of zeros is at 1.

    Source: Sanh et al. 2019, DistilBERT, section 2.
    """
    sides = student, teacher if fused else teacher.detach()
    student, teacher = _prepared("hidden_cosine", *sides, row_weight)
    return _weighted(1 - torch.cosine_similarity(student, teacher, dim=1), row_weight)


def attention_mse(student: Tensor, teacher: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of attentions over rows and heads.

    Args:
        student: [R, H] float, a row for each query and key, H heads (or 1 where averaged).
        teacher: [R, H] float; gets no gradient.
        row_weight: [R] factor of each row instead of the mean's 1 / R; 0 ignores the row, whatever
            it holds.

    Returns:
        Scalar without unit; 0 of no rows.

    Raises:
        TrainingError: the shapes differ, or a row has no weight of its own.

    Source: Jiao et al. 2020, TinyBERT, section 3.1.
    """
    return _squared("attention_mse", student, teacher.detach(), row_weight)


def score_mse(student: Tensor, teacher: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Mean squared difference of class logits or regression scores.

    Args:
        student: [B, C] float, C classes (1 for regression).
        teacher: [B, C] float; gets no gradient.
        row_weight: [B] factor of each sample instead of the mean's 1 / B; 0 ignores the sample,
            whatever it holds.

    Returns:
        Scalar in the square of the scores' unit: the mean over samples of the mean over classes;
        0 of no samples.

    Raises:
        TrainingError: the shapes differ, or a sample has no weight of its own.

    Source: Tang et al. 2019, Distilling Task-Specific Knowledge from BERT, section 3.2.
    """
    return _squared("score_mse", student, teacher.detach(), row_weight)


def _squared(name: str, student: Tensor, teacher: Tensor, row_weight: Tensor | None) -> Tensor:
    """The mean squared difference that three of them are."""
    student, teacher = _prepared(name, student, teacher, row_weight)
    return _weighted((student - teacher).square().mean(1), row_weight)


def _prepared(
    name: str, student: Tensor, teacher: Tensor, row_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both sides in the type of the computation, ignored rows of the student without effect."""
    if student.shape != teacher.shape or student.dim() != 2:
        raise TrainingError(
            f"{name}: the student's {list(student.shape)} and the teacher's {list(teacher.shape)} "
            "differ; expected the same two dimensions: project the student's to the teacher's width"
        )
    if row_weight is not None and row_weight.shape != student.shape[:1]:
        raise TrainingError(
            f"{name}: the row weights are {list(row_weight.shape)}; expected [{len(student)}], one "
            "per row"
        )
    student = student.to(compute_dtype(student))
    if row_weight is not None:
        # Before the loss: a gradient of 0 times one that is not finite would not be 0.
        student = student.masked_fill((row_weight == 0)[:, None], 0.0)
    return student, teacher.to(student)


def _weighted(losses: Tensor, row_weight: Tensor | None) -> Tensor:
    """Sum of [R] losses by their weights, or their mean; 0 of none."""
    if row_weight is None:
        return losses.sum() / max(1, len(losses))
    return torch.where(row_weight == 0, 0.0, losses * row_weight.to(losses)).sum()
