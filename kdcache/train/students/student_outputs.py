"""What a student gives for a batch: what its output projection reads, and what lies on the way."""

# B batch, S source positions, T target positions, N target tokens, R rows, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcache.models.passes import output_projection, project_first, project_only, shift_right
from kdcache.train.batches.batch import Tokens
from kdcache.train.students.student import decoder_start

Side = Literal["encoder", "decoder"]
#: A side's states ("hidden"), of which the first is what its first layer reads, or its attentions.
Layers = tuple[Side, Literal["hidden", "attention"]]


@dataclass(frozen=True)
class Projected:
    """Target positions as the output projection reads them; the logits are its product.

    Attributes:
        hidden: [N, D].
        weight: [V, D].
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def narrowed(self, num_ids: int) -> Projected:
        """The same for the first ids alone."""
        if num_ids >= len(self.weight):
            return self
        bias = None if self.bias is None else self.bias[:num_ids]
        return Projected(self.hidden, self.weight[:num_ids], bias)


@dataclass(frozen=True)
class StudentOutputs:
    """One forward pass.

    Attributes:
        projected: where the logits are linear in it; else None.
        logits: [N, V] where they are not; else None.
        layers: what was asked for: each [B, positions, D], or [B, heads, queries, keys].
        encoded: [B, S, D] last states of the encoder.
    """

    projected: Projected | None
    logits: Tensor | None
    layers: dict[Layers, tuple[Tensor, ...]]
    encoded: Tensor


def run_student(
    model: Any, source: Tokens, target: Tokens, wanted: Sequence[Layers], linear: bool
) -> StudentOutputs:
    """A forward pass over a batch; nothing is projected but target tokens, if at all.

    Args:
        model: a transformers encoder-decoder.
        source: what the encoder reads.
        target: what the decoder predicts; its tokens stand before all padding.
        wanted: layers to keep.
        linear: what `projects_linearly` says of the model.
    """
    decoder_input_ids = shift_right(target.ids, pad=0, start=decoder_start(model))
    kinds = {kind for _, kind in wanted}
    gate = project_first if linear else project_only
    with gate(model, target.mask) as kept:
        # Padding stands last and attention is causal, so the decoder needs no mask.
        out = model(
            input_ids=source.ids,
            attention_mask=source.mask.long(),
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
            output_hidden_states="hidden" in kinds,
            output_attentions="attention" in kinds,
        )
    return StudentOutputs(
        projected=projected_by(model, kept[0]) if kept is not None else None,
        logits=None if linear else out.logits,
        layers={key: out[_FIELDS[key]] for key in wanted},
        encoded=out.encoder_last_hidden_state,
    )


def projected_by(model: Any, hidden: Tensor) -> Projected:
    """What a model's output projection reads, with the projection.

    Args:
        model: whose logits are linear in it.
        hidden: [N, D].
    """
    weight = output_projection(model).weight
    assert isinstance(weight, Tensor)
    return Projected(hidden, weight, _bias(model))


_FIELDS: dict[Layers, str] = {
    ("encoder", "hidden"): "encoder_hidden_states",
    ("decoder", "hidden"): "decoder_hidden_states",
    ("encoder", "attention"): "encoder_attentions",
    ("decoder", "attention"): "decoder_attentions",
}


def projects_linearly(model: Any) -> bool:
    """Whether a model's logits are its output projection's product and nothing is done to them.

    Args:
        model: a transformers model with an output projection; small states are tried, and large
            ones, at which a cap on logits (Gemma's) is seen in a model not yet trained too.
    """
    projection = output_projection(model)
    if not isinstance(projection, nn.Linear):
        return False
    device = projection.weight.device
    writes = model.config.is_encoder_decoder
    one = torch.full((1, 1), decoder_start(model) if writes else 0, device=device)
    read = {"decoder_input_ids": one, "use_cache": False} if writes else {}
    was_training = model.training
    model.eval()
    plain = True
    for factor in (1.0, 1000.0):
        states = torch.linspace(-factor, factor, projection.in_features, device=device)
        states = states.to(projection.weight.dtype)
        replace = projection.register_forward_pre_hook(
            lambda _, inputs, states=states: (states.expand_as(inputs[0]),)
        )
        try:
            with torch.no_grad(), project_first(model, one == one) as kept:
                logits = model(input_ids=one, **read).logits
                product = F.linear(kept[0], projection.weight, _bias(model))
        finally:
            replace.remove()
        plain = plain and torch.allclose(logits, product, rtol=1e-4, atol=1e-5)
    model.train(was_training)
    return plain


def _bias(model: Any) -> Tensor | None:
    """[V] what is added to the product: the projection's own, and Marian's and BART's buffer."""
    own: Tensor | None = output_projection(model).bias  # type: ignore[assignment]
    buffer = getattr(model, "final_logits_bias", None)
    if buffer is None:
        return own
    return buffer[0] if own is None else own + buffer[0]


def attention_rows(probabilities: Tensor, mask: Tensor, averaged: bool) -> Tensor:
    """[R, heads] attention of every query to every key, sample after sample, queries outermost.

    Args:
        probabilities: [B, heads, queries, keys].
        mask: [B, positions] bool, of queries and keys alike.
        averaged: whether to take the mean over the heads.
    """
    pairs = mask[:, :, None] & mask[:, None, :]
    rows = probabilities.permute(0, 2, 3, 1)[pairs]
    return rows.mean(1, keepdim=True) if averaged else rows
