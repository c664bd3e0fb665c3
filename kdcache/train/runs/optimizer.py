"""Optimisers of a recipe."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from kdcache.recipe import OptimizerSection


def build_optimizer(section: OptimizerSection, model: nn.Module, device: torch.device) -> Optimizer:
    """Adam or AdamW over the trainable parameters, in one fused kernel where there is one.

    Weight decay acts on matrices alone, not on biases and norms.

    Source: Kingma & Ba 2015; decoupled decay: Loshchilov & Hutter 2019.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in trainable if parameter.dim() >= 2],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    kind = Adam if section.name == "adam" else AdamW
    fused = device.type in ("cpu", "cuda")
    return kind(
        groups,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=fused,
        foreach=None if fused else True,
    )
