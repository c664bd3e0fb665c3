"""Teachers without a head: hidden states and attentions alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.dump.batches import Batch
from kdcache.dump.teachers.model import ModelTeacher
from kdcache.formats.signals import Side, TeacherRecord


class EncoderTeacher(ModelTeacher):
    """A bare stack; of an encoder-decoder, its encoder."""

    kind = "encoder"

    def __init__(
        self, model: Any, record: TeacherRecord, device: torch.device, has_attention: bool = True
    ) -> None:
        super().__init__(model, record, device, has_attention)
        self.sides = (stack_side(model.config),)

    def _describe(
        self, batch: Batch, side: Side, options: dict[str, bool], wanted: str
    ) -> Sequence[Tensor] | None:
        body = text_stack(self.model)
        return getattr(body(**self.inputs(body, batch), **options), wanted, None)


def stack_side(config: Any) -> Side:
    """What the recipe calls the one stack of a model: decoder where it sees no later token."""
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_decoder", False):
        return "decoder"
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    both_ways = (
        config.is_encoder_decoder
        or config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return "decoder" if causal and not both_ways else "encoder"


def text_stack(model: Any) -> Any:
    """The stack that is described: the encoder of an encoder-decoder, else the body."""
    body = model.base_model
    return body.get_encoder() if model.config.is_encoder_decoder else body
