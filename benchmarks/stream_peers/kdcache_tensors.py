"""The tensors of a batch of kdcache's by the names that its peers give them."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from kdcache.train.batches.batch import Batch

SIGNAL = "logits"


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch by the names that peers give them; the sample ids are left out."""
    found = {"rows": torch.from_numpy(batch.rows)}
    for name, tokens in batch.streams.items():
        found |= {f"{name}.{part}": getattr(tokens, part) for part in ("ids", "mask")}
    labels = batch.signals[SIGNAL]
    for field in fields(labels):
        value = getattr(labels, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
    return found
