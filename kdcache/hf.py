"""transformers' Trainer on batches of a cache: `DistillationMixin` stands before it.

Training with it needs accelerate, as transformers' Trainer does: `pip install accelerate`.
"""

from kdcache.train.runs.trainer_mixin import DistillationCollator, DistillationMixin, OrderCallback

__all__ = ["DistillationCollator", "DistillationMixin", "OrderCallback"]
