"""What a pass of a model is made to do: shifted inputs, fewer projected rows, a pass replayed."""

# B batch, T target positions, D hidden, N valid positions, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError


def shift_right(labels: Tensor, pad: int, start: int) -> Tensor:
    """Decoder inputs of some labels: the start id, then all labels but the last.

    Args:
        labels: [B, T] int64; -100 and pad mark positions that are not labels.
        pad: id that stands where labels has -100.
        start: the model's decoder_start_token_id.

    Returns:
        [B, T] int64.
    """
    shifted = labels.new_empty(labels.shape)
    shifted[:, 0] = start
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill_(shifted == -100, pad)


def shift_in_place(ids: Tensor, seen: Tensor, pad: int, start: int) -> Tensor:
    """Decoder inputs of a part of each text, every token at its position in the whole.

    Args:
        ids: [B, T] int64 tokens of the whole.
        seen: [B, T] bool, the part, N tokens of it.
        pad: id that stands outside the part.
        start: the model's decoder_start_token_id.

    Returns:
        [B, T] int64: in the part the start id, then all its tokens but the last.
    """
    row = seen.nonzero()[:, 0]  # [N]
    before = ids[seen].roll(1)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    shifted = torch.full_like(ids, pad)
    shifted[seen] = before.masked_fill(first, start)
    return shifted


@contextmanager
def project_only(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within it, the model's logits are [N, V]: those of the positions in `mask` alone.

    Padding is dropped before the output projection, usually the dearest layer, so no
    [B, T, V] tensor is made. The model's own scaling and bias still apply.

    Args:
        model: a transformers model with output embeddings.
        mask: [B, T] bool, N of them true, on the model's device.

    Raises:
        ModelError: the model has no output embeddings to hook.
    """

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0][mask.to(inputs[0].device)], *inputs[1:])  # [B, T, D] -> [N, D]

    handle = output_projection(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def project_first(model: nn.Module, mask: Tensor) -> Iterator[list[Tensor]]:
    """Within it, the model's logits are [1, V]: those of the first position in `mask` alone.

    The list receives what the model would have projected at all positions, [N, D], so that the
    caller can project it piece by piece.

    Args:
        model: a transformers model with output embeddings.
        mask: [B, T] bool, N of them true, on the model's device.

    Raises:
        ModelError: the model has no output embeddings to hook.
    """
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(inputs[0][mask.to(inputs[0].device)])  # [B, T, D] -> [N, D]
        return (kept[-1][:1], *inputs[1:])

    handle = output_projection(model).register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@contextmanager
def recorded(body: nn.Module) -> Iterator[list[Any]]:
    """Within it, the list receives what a module returns."""
    outputs: list[Any] = []
    handle = body.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def replayed(body: nn.Module, output: Any) -> Iterator[None]:
    """Within it, a module returns a recorded output and computes nothing."""
    own = body.__dict__.get("forward")  # an instance may have one, as accelerate's hooks do
    body.forward = lambda *args, **keys: output
    try:
        yield
    finally:
        del body.forward
        if own is not None:
            body.forward = own


def output_projection(model: nn.Module) -> nn.Module:
    """The layer that makes logits of hidden states.

    Raises:
        ModelError: the model has none.
    """
    projection = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(projection, nn.Module):
        raise ModelError(f"{type(model).__name__} has no output projection; expected logits")
    return projection
