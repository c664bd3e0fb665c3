"""Losses of a classifier: every one a sum over samples, each with its factor."""

# B samples, C classes

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdcache.train.losses.loss_plan import compute_dtype


def label_cross_entropy(logits: Tensor, gold: Tensor, share: float) -> Tensor:
    """Cross-entropy with gold classes, in nats.

    Args:
        logits: [B, C].
        gold: [B] int64 classes; a sample without one (-100) counts nothing.
        share: factor of every sample.
    """
    logits = logits.to(compute_dtype(logits))
    return F.cross_entropy(logits, gold, ignore_index=-100, reduction="sum") * share


def label_mse(logits: Tensor, gold: Tensor, share: float) -> Tensor:
    """Squared difference from gold numbers, in their unit squared.

    Args:
        logits: [B, 1].
        gold: [B] float; a sample without a number (NaN) counts nothing.
        share: factor of every sample.
    """
    said, has = logits[:, 0].to(compute_dtype(logits)), ~gold.isnan()
    return (said[has] - gold[has].to(said)).square().sum() * share


def score_kl(logits: Tensor, teacher: Tensor, temperature: float, share: float) -> Tensor:
    """KL(teacher || student) of softmax(logits / temperature), in nats.

    Args:
        logits: [B, C].
        teacher: [B, C] logits; gets no gradient.
        temperature: above 0.
        share: factor of every sample.

    Source: Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network.
    """
    own = (logits.to(compute_dtype(logits)) / temperature).log_softmax(1)
    other = (teacher.detach().to(own) / temperature).log_softmax(1)
    return F.kl_div(own, other, reduction="sum", log_target=True) * share
