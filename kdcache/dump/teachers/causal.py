"""Teachers that predict every token from those before it: GPT-2, Llama, Qwen and their like."""

# B batch, T positions

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.dump.teachers.model import LanguageTeacher
from kdcache.errors import ModelError


class CausalTeacher(LanguageTeacher):
    """Token t is predicted by the state that has read the tokens before t."""

    kind = "causal_lm"
    signals = ("logits", "hidden", "attention", "beams")
    places = ("positions",)
    sides = ("decoder",)

    def predicting(self, at: Tensor) -> Tensor:
        """[B, T] bool: the position before every predicted token.

        Raises:
            ModelError: a first token is to be predicted.
        """
        if at[:, 0].any():
            raise ModelError(
                f"{self.record.path}: a causal model predicts no first token; leave it out of "
                "the labelled positions"
            )
        return torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], dim=1)
