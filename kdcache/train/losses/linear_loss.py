"""Losses fused with the output projection: the [N, V] logits never exist, only chunks of them.

A chunk of rows is projected, its losses are taken, their gradient goes back through the projection,
and the chunk's memory serves the next one. So memory is [chunk, V] beside the inputs and their
gradients, and each row is projected once. The gradients are made in the forward pass; the backward
pass only scales them.

Source: the idea of chunked linear losses is that of Liger-Kernel (Hsu et al. 2024) and of Wijmans
et al. 2024, Cut Your Losses in Large-Vocabulary Language Models.
"""

# N positions, D hidden, V vocabulary, R rows of a chunk

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.errors import TrainingError
from kdcache.labels.sparse_target import SparseTarget
from kdcache.train.losses.divergences import RowLosses
from kdcache.train.losses.fused_loss import fused_walk
from kdcache.train.losses.loss_plan import LossTerm, check_term, compute_dtype

#: Floats of a chunk's logits: enough rows for a matrix product to run at its full speed.
CHUNK_ENTRIES = 1 << 24
#: Fewest rows of a chunk: each one reads and writes the gradient of the whole projection.
CHUNK_ROWS = 256
#: Floats of the logits that autograd walks at once for a divergence.
BLOCK_ENTRIES = 1 << 20


@dataclass(frozen=True)
class DivergenceTerm:
    """One weighted divergence of a mix that is no sum over entries.

    Attributes:
        rows: makes [R] losses of logits and their target, such as `jensen_shannon_rows`.
        term: its target, temperature and weights.
    """

    rows: RowLosses
    term: LossTerm


def linear_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Sequence[LossTerm],
    divergences: Sequence[DivergenceTerm] = (),
    *,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted mix of losses over logits hidden @ weight.T + bias.

    Args:
        hidden: [N, D] float, what the output projection reads. The logits are of its type, or of
            autocast's where that is on.
        weight: [V, D] float.
        bias: [V] float, or None.
        terms: cross-entropies and forward KLs, as `fused_loss` takes them.
        divergences: others; at least one of both together.
        chunk_rows: rows projected at once; None chooses by V.

    Returns:
        The total, a scalar, and the values of terms and divergences, as `fused_loss` gives them.

    Raises:
        TrainingError: on a shape, id or temperature that does not fit.
    """
    _check(hidden, weight, bias, terms, divergences, chunk_rows)
    dtype = _logits_dtype(hidden)
    mix = [*terms, *(one.term for one in divergences)]
    weights = [_row_weight(hidden, term) for term in mix]
    unit = None
    if dtype == torch.float16 and len(hidden):
        # As in `fused_loss`: a mean over many rows would underflow in a float16 gradient.
        reach = [
            (row_weight * (term.weight / term.temperature)).abs().amax()
            for row_weight, term in zip(weights, mix, strict=True)
        ]
        unit = torch.stack(reach).amax().clamp(min=torch.finfo(torch.float32).tiny)
        weights = [row_weight / unit for row_weight in weights]
    rows = chunk_rows or max(CHUNK_ROWS, CHUNK_ENTRIES // max(1, len(weight)))
    starts = range(0, max(1, len(hidden)), rows)  # of no rows one empty chunk
    cuts = [
        _cut(replace(term, row_weight=row_weight), starts, rows)
        for term, row_weight in zip(mix, weights, strict=True)
    ]
    plan = _Plan(
        [
            _Chunk(
                start=start,
                terms=[cut[number] for cut in cuts[: len(terms)]],
                divergences=[
                    replace(one, term=cut[number])
                    for one, cut in zip(divergences, cuts[len(terms) :], strict=True)
                ],
            )
            for number, start in enumerate(starts)
        ],
        rows,
        dtype,
        unit,
        torch.is_grad_enabled(),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        total, values = _LinearLosses.apply(hidden, weight, bias, plan)  # type: ignore[no-untyped-call]
    return total, values


@dataclass(frozen=True)
class _Chunk:
    """What is asked of the rows that begin at one."""

    start: int
    terms: list[LossTerm]
    divergences: list[DivergenceTerm]


@dataclass(frozen=True)
class _Plan:
    """All that is known before the first chunk is projected."""

    chunks: list[_Chunk]
    rows: int
    dtype: torch.dtype  # of the logits
    unit: Tensor | None  # what the row weights were divided by
    grad_enabled: bool  # which a Function cannot see from within


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Sequence[LossTerm],
    divergences: Sequence[DivergenceTerm],
    chunk_rows: int | None,
) -> None:
    """Refuses what does not fit, before targets are cut and would fit by accident."""
    shapes = [list(tensor.shape) for tensor in (hidden, weight, bias) if tensor is not None]
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise TrainingError(
            f"linear losses: hidden, weight, bias are {shapes}; expected [N, D], [V, D], [V]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise TrainingError(
            f"linear losses: hidden, weight, bias are {shapes}; expected [N, D], [V, D], [V]"
        )
    if not terms and not divergences:
        raise TrainingError("linear losses: got no terms; expected at least one")
    if chunk_rows is not None and chunk_rows < 1:
        raise TrainingError(f"linear losses: chunk_rows is {chunk_rows}; expected 1 or more")
    for term in (*terms, *(one.term for one in divergences)):
        check_term((len(hidden), len(weight)), term)


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    """What a projection of these gives: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _row_weight(hidden: Tensor, term: LossTerm) -> Tensor:
    """[N] weights of a term's positions; those of the mean where none are given."""
    dtype = compute_dtype(hidden)
    if term.row_weight is not None:
        return term.row_weight.detach().to(hidden.device, dtype)
    return hidden.new_full((len(hidden),), 1 / max(1, len(hidden)), dtype=dtype)


def _cut(term: LossTerm, starts: range, rows: int) -> list[LossTerm]:
    """A term over each chunk's rows."""
    target, row_weight = term.target, term.row_weight
    assert row_weight is not None
    bounds = torch.tensor([*starts, starts[-1] + rows], device=target.rows.device)
    places = torch.searchsorted(target.rows, bounds).tolist()
    parts = []
    for number, start in enumerate(starts):
        here, listed = slice(start, start + rows), slice(places[number], places[number + 1])
        part = SparseTarget(
            rows=target.rows[listed] - start,
            ids=target.ids[listed],
            values=target.values[listed],
            uniform=None if target.uniform is None else target.uniform[here],
            bucket=None if target.bucket is None else target.bucket[here],
            constant=target.constant[here],
        )
        parts.append(replace(term, row_weight=row_weight[here], target=part))
    return parts


class _LinearLosses(torch.autograd.Function):
    """All chunks as one node of the graph: its forward pass makes the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias)
        wanted = [plan.grad_enabled and need for need in ctx.needs_input_grad[:3]]
        narrow, matrix = hidden.to(plan.dtype), weight.to(plan.dtype)
        offset = None if bias is None else bias.to(plan.dtype)
        dtype = compute_dtype(hidden)
        grads = [
            torch.zeros_like(tensor, dtype=dtype) if want and tensor is not None else None
            for tensor, want in zip(inputs, wanted, strict=True)
        ]
        total, values = hidden.new_zeros((), dtype=dtype), None
        # One room for all chunks: fresh memory of this size costs a third of the product.
        room = narrow.new_empty(min(plan.rows, len(hidden)), len(weight))
        for chunk in plan.chunks:
            rows = slice(chunk.start, chunk.start + plan.rows)
            logits = _project(narrow[rows], matrix, offset, room)
            found, gradient = _chunk_losses(logits, chunk, any(wanted))
            total = total + found[0]
            values = found[1] if values is None else values + found[1]
            if gradient is not None:
                _add_gradients(grads, rows, gradient, narrow[rows], matrix)
        assert values is not None
        if plan.unit is not None:
            total, values = total * plan.unit, values * plan.unit
        # In float16 they stay wide, since the upstream factor may bring back what would underflow.
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(
            *(
                grad if grad is None or plan.unit is not None else grad.to(kept)
                for grad, kept in zip(grads, ctx.dtypes, strict=True)
            )
        )
        ctx.unit = plan.unit
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream if ctx.unit is None else upstream * ctx.unit
        grads = ctx.saved_tensors
        if float(factor) != 1.0:
            grads = [None if grad is None else grad * factor for grad in grads]
        cast = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(grads, ctx.dtypes, strict=True)
        ]
        return (*cast, None)


def _project(some: Tensor, matrix: Tensor, offset: Tensor | None, room: Tensor) -> Tensor:
    """[R, V] logits of a chunk's rows, in the first rows of some room."""
    out = room[: len(some)]
    if offset is None:
        return torch.mm(some, matrix.T, out=out)
    return torch.addmm(offset, some, matrix.T, out=out)


def _add_gradients(
    grads: list[Tensor | None], rows: slice, gradient: Tensor, some: Tensor, matrix: Tensor
) -> None:
    """Takes a chunk's [R, V] gradient of the logits through the projection."""
    hidden, weight, bias = grads
    if hidden is not None and hidden.dtype == gradient.dtype:
        torch.mm(gradient, matrix, out=hidden[rows])
    elif hidden is not None:
        hidden[rows] = gradient @ matrix
    if weight is not None and weight.dtype == gradient.dtype:
        weight.addmm_(gradient.T, some)  # without a [V, D] product of its own
    elif weight is not None:
        weight += gradient.T @ some
    if bias is not None:
        bias += gradient.sum(0, dtype=bias.dtype)


def _chunk_losses(
    logits: Tensor, chunk: _Chunk, wanted: bool
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Total and values of a chunk, and [R, V] their gradient, which may take the logits' place."""
    total, values = logits.new_zeros((), dtype=compute_dtype(logits)), []
    others: Tensor | None = None
    # These first: the walk over the terms leaves no logits behind.
    for one in chunk.divergences:
        value, grad = _divergence(logits, one, wanted)
        values.append(value)
        total = total + value * one.term.weight
        if grad is not None:
            others = grad if others is None else others.add_(grad)
    gradient: Tensor | None = None
    if chunk.terms:
        gradient = logits if wanted else None
        found = fused_walk(logits, chunk.terms, gradient)
        total = total + found[0]
        values = [*found[1], *values]
    if others is not None:
        gradient = others if gradient is None else gradient.add_(others)
    return (total, torch.stack(values)), gradient


def _divergence(logits: Tensor, one: DivergenceTerm, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Value of one divergence, and [R, V] the gradient of its part of the total.

    Autograd keeps a dozen tensors of its rows, so these are taken in blocks.
    """
    value = logits.new_zeros((), dtype=compute_dtype(logits))
    gradient = torch.empty_like(logits) if wanted else None
    rows = max(1, BLOCK_ENTRIES // max(1, logits.shape[1]))
    starts = range(0, len(logits), rows)
    for start, term in zip(starts, _cut(one.term, starts, rows) if starts else [], strict=True):
        row_weight = term.row_weight
        assert row_weight is not None
        ignored = row_weight == 0
        with torch.set_grad_enabled(wanted):
            own = logits[start : start + rows].detach().requires_grad_(wanted)
            losses = one.rows(own, term.target, term.temperature)
            found = torch.where(ignored, 0.0, losses * row_weight.to(losses)).sum()
            value += found.detach()
            if gradient is None:
                continue
            (grad,) = torch.autograd.grad(found * term.weight, own)
        # An ignored position may hold anything, also logits that are not finite.
        gradient[start : start + rows] = grad.masked_fill_(ignored[:, None], 0.0)
    return value, gradient
