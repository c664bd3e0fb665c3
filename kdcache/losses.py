"""Losses as plain functions over tensors, for a loop of one's own.

`decode` makes targets of a batch's soft labels. `fused_loss` and `linear_losses` take several terms
in one pass, the second without ever holding [N, V] logits.
"""

from kdcache.labels.decoding import decode
from kdcache.train.losses.divergences import (
    jensen_shannon,
    jensen_shannon_rows,
    logit_mse,
    logit_mse_rows,
    reverse_kl,
    reverse_kl_rows,
    total_variation,
    total_variation_rows,
)
from kdcache.train.losses.feature_losses import attention_mse, hidden_cosine, hidden_mse, score_mse
from kdcache.train.losses.fused_loss import (
    LossTerm,
    cross_entropy,
    forward_kl,
    fused_loss,
    hard_target,
)
from kdcache.train.losses.linear_loss import DivergenceTerm, linear_losses

__all__ = [
    "DivergenceTerm",
    "LossTerm",
    "attention_mse",
    "cross_entropy",
    "decode",
    "forward_kl",
    "fused_loss",
    "hard_target",
    "hidden_cosine",
    "hidden_mse",
    "jensen_shannon",
    "jensen_shannon_rows",
    "linear_losses",
    "logit_mse",
    "logit_mse_rows",
    "reverse_kl",
    "reverse_kl_rows",
    "score_mse",
    "total_variation",
    "total_variation_rows",
]
