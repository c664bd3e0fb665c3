"""Cross-entropy and divergences against sparse soft labels, mixed in one pass over the logits.

    # N positions (rows), V vocabulary, E listed entries of a target, R rows of one block

A target is a density s over the V ids of each position, kept as a short list of entries on a
uniform floor. At temperature T its loss is a constant plus W log-sum-exp(z / T) - sum s_i z_i / T,
where W = sum s, and the gradient is (W p - s) / T, where p is the student's softmax. So terms of
one temperature share a softmax, and the softmax can become the gradient where it lies: the logits
are walked once, in blocks of rows that stay in the cache, and the [N, V] targets never exist.
The gradient is made in the forward pass; the backward pass only scales it when it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.errors import TrainingError
from kdcache.labels.sparse_target import SparseTarget
from kdcache.train.losses.loss_plan import LossPlan, LossTerm, TermPlan, compute_dtype, plan_terms

__all__ = ["LossTerm", "cross_entropy", "forward_kl", "fused_loss", "hard_target"]

_SPENT = "_kdcache_spent"  # marks a tensor whose logits an inplace loss has overwritten


def hard_target(labels: Tensor, vocab_size: int, label_smoothing: float = 0.0) -> SparseTarget:
    """The target of plain cross-entropy: all mass on the label, or nearly all.

    Args:
        labels: [N] int64 ids. A label below 0 gives its position no mass, so no loss.
        vocab_size: V.
        label_smoothing: share of the mass spread evenly over all V ids; 0 for none.

    Returns:
        A target with one entry per position and constant 0.

    Source: Szegedy et al. 2016, Rethinking the Inception Architecture, section 7 (smoothing).
    """
    valid = (labels >= 0).to(torch.float32)  # [N]
    return SparseTarget(
        rows=torch.arange(len(labels), device=labels.device),
        ids=labels.clamp(min=0),
        values=valid * (1.0 - label_smoothing),
        uniform=valid * (label_smoothing / vocab_size) if label_smoothing else None,
        bucket=None,
        constant=torch.zeros_like(valid),
    )


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, inplace: bool = False
) -> Tensor:
    """Mean cross-entropy over the positions whose label is not below 0.

    Args:
        logits: [N, V] float.
        labels: [N] int64; below 0 (such as -100) ignores the position.
        label_smoothing: share of the mass spread evenly over all ids.
        inplace: whether the gradient may overwrite the logits, see `fused_loss`.

    Returns:
        Scalar in nats; 0 where every position is ignored.
    """
    target = hard_target(labels, logits.shape[-1], label_smoothing)
    term = LossTerm(target, row_weight=_mean_weight(labels >= 0, logits))
    return fused_loss(logits, [term], inplace=inplace)[0]


def forward_kl(
    logits: Tensor,
    target: SparseTarget,
    temperature: float = 1.0,
    *,
    temperature_squared: bool = True,
    mask: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Mean forward Kullback-Leibler divergence from teacher to student.

    Args:
        logits: [N, V] float, the student's.
        target: the teacher's density at `temperature`, with the constant of a divergence.
        temperature: what the student's logits are divided by.
        temperature_squared: whether the result is multiplied by T^2, so that its gradient keeps
            its size from one temperature to another.
        mask: [N] bool, positions that count; None for all.
        inplace: whether the gradient may overwrite the logits, see `fused_loss`.

    Returns:
        Scalar in nats (times T^2); 0 where no position counts.

    Source: Hinton, Vinyals & Dean 2015, Distilling the Knowledge in a Neural Network, section 2.
    """
    row_weight = None if mask is None else _mean_weight(mask, logits)
    weight = temperature * temperature if temperature_squared else 1.0
    term = LossTerm(target, temperature, weight, row_weight)
    return fused_loss(logits, [term], inplace=inplace)[0]


def fused_loss(
    logits: Tensor,
    terms: Sequence[LossTerm],
    *,
    inplace: bool = False,
    block_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A weighted mix of losses in one walk over the logits, one softmax per temperature.

    `inplace` lets the gradient take the place of the logits: afterwards they hold no logits any
    more, so nothing may read them. What autograd can see of a breach is an error in the backward
    pass: an earlier use that saved them (torch's own check), and any other use with a gradient; a
    second fused loss is one at once. A later read by others without a gradient (an argmax, say)
    cannot be seen: it belongs before this call.
    After an inplace backward pass with an upstream gradient other than 1 the graph is spent.
    Where no gradient is wanted, and where the logits are a part of a larger tensor or not
    contiguous, they stay as they are.

    Args:
        logits: [N, V] float16, bfloat16, float32 or float64. The half types are computed in
            float32, block by block, and get a gradient of their own type.
        terms: the losses, at least one.
        inplace: whether the gradient may overwrite the logits.
        block_rows: rows per block; None chooses by V so that a block stays in the cache.

    Returns:
        The total, a scalar: sum over terms j of weight_j * sum_n row_weight_j[n] * loss_j[n]; and
        [len(terms)] values without gradient, in nats: sum_n row_weight_j[n] * loss_j[n].

    Raises:
        TrainingError: on a shape, id or temperature that does not fit, or on inplace logits that
            are a leaf (a parameter or input, which would be lost).
    """
    # Writing makes torch rebuild the graph of a view, so only its base sees every use.
    base = logits._base
    whole = base if base is not None and base.requires_grad else logits
    if hasattr(whole, _SPENT):
        raise _used_again()
    plan = plan_terms(logits, terms, block_rows)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        with torch.no_grad():
            return _walk(logits, plan, None)
    if inplace and whole.is_leaf:
        raise TrainingError(
            "fused loss: inplace would overwrite logits that are a leaf tensor; expected a "
            "model's output: pass inplace=False"
        )
    inplace = inplace and logits.is_contiguous() and whole.numel() == logits.numel()
    if inplace:
        whole.register_hook(_sole_use(logits.data_ptr()))  # type: ignore[no-untyped-call]
        setattr(whole, _SPENT, True)
    total, values = _FusedLoss.apply(logits, plan, inplace)  # type: ignore[no-untyped-call]
    return total, values


def fused_walk(
    logits: Tensor, terms: Sequence[LossTerm], gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Total and values of `fused_loss` without a graph, and the gradient of the total.

    Args:
        logits: [N, V] float.
        terms: the losses, at least one.
        gradient: [N, V], to be filled, which may be the logits; None where it is not wanted.

    Raises:
        TrainingError: as `fused_loss`.
    """
    with torch.no_grad():
        plan = plan_terms(logits, terms, None)
        found = _walk(logits, plan, gradient)
        if gradient is not None and plan.unit is not None:
            gradient.mul_(plan.unit)
        return found


def _mean_weight(mask: Tensor, logits: Tensor) -> Tensor:
    """[N] weights that take the mean over a mask; zeros where it is empty."""
    kept = mask.to(compute_dtype(logits))
    return kept / kept.sum().clamp(min=1)


def _sole_use(address: int) -> Callable[[Tensor], None]:
    """A hook that sees whether a gradient other than the fused one reached overwritten logits."""

    def check(gradient: Tensor) -> None:
        if gradient.data_ptr() != address:
            raise _used_again()

    return check


def _used_again() -> TrainingError:
    return TrainingError(
        "fused loss: logits that an inplace loss has overwritten were used by another operation "
        "too; expected no other use: give all terms to one call, or pass inplace=False"
    )


class _FusedLoss(torch.autograd.Function):
    """The walk as one node of the graph: its forward pass makes the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plan: LossPlan, inplace: bool) -> tuple[Tensor, Tensor]:
        # Detached, it shares the version counter: torch refuses a backward pass through
        # anything that saved the logits before, or through this if they are written again.
        room = torch.contiguous_format
        gradient = logits.detach() if inplace else torch.empty_like(logits, memory_format=room)
        total, values = _walk(logits, plan, gradient)
        ctx.save_for_backward(gradient)
        ctx.unit = plan.unit
        ctx.inplace = inplace
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = upstream if ctx.unit is None else upstream * ctx.unit
        if float(factor) != 1.0:
            gradient = gradient.mul_(factor) if ctx.inplace else gradient * factor
        return gradient, None, None


@dataclass(frozen=True)
class _RowSums:
    """What the walk finds out about each position; every value of the loss follows from it."""

    peak: Tensor  # [N] largest logit
    logit_sum: Tensor  # [N] sum of z, filled where a target has a uniform part
    largest: Tensor  # [temperatures, N] largest probability: 1 / sum exp((z - peak) / T)
    rest_peak: Tensor  # [terms, N] largest z / T of an id not listed, filled for a bucket
    rest_largest: Tensor  # [terms, N] its probability among those not listed, likewise

    def blocks(self, rows: int) -> list[_RowSums]:
        """The same, cut into views of each block."""
        cuts = [
            torch.split(tensor, rows, dim=-1)
            for tensor in (
                self.peak,
                self.logit_sum,
                self.largest,
                self.rest_peak,
                self.rest_largest,
            )
        ]
        return [_RowSums(*block) for block in zip(*cuts, strict=True)]


@dataclass(frozen=True)
class _Work:
    """Room for one block, used again for the next: fresh memory costs more than the arithmetic."""

    probs: Tensor  # [R, V]
    scaled: Tensor | None  # [R, V] z / T, where T is not 1 or some ids are masked
    upcast: Tensor | None  # [R, V] z of a half type
    gradient: Tensor | None  # [R, V] where it cannot grow in its own place


def _walk(logits: Tensor, plan: LossPlan, gradient: Tensor | None) -> tuple[Tensor, Tensor]:
    """Total and values; fills the [N, V] gradient if one is given, which may be the logits."""
    dtype = compute_dtype(logits)
    num_rows = len(logits)
    # Gathered first: in place, the walk leaves no logits behind.
    listed = [logits[one.rows, one.ids].to(dtype) for one in plan.terms]
    sums = _RowSums(
        peak=logits.new_zeros(num_rows, dtype=dtype),
        logit_sum=logits.new_zeros(num_rows, dtype=dtype),
        largest=logits.new_zeros(len(plan.temperatures), num_rows, dtype=dtype),
        rest_peak=logits.new_zeros(len(plan.terms), num_rows, dtype=dtype),
        rest_largest=logits.new_zeros(len(plan.terms), num_rows, dtype=dtype),
    )
    # Cut once, not in the loop: over a small vocabulary its overhead is what a block costs.
    blocks = torch.split(logits, plan.block_rows)
    block_sums = sums.blocks(plan.block_rows)
    grown = [None] * len(blocks) if gradient is None else torch.split(gradient, plan.block_rows)
    work = _work(logits, plan, plan.block_rows, gradient is not None)
    for number in range(len(blocks) if num_rows else 0):
        if len(blocks[number]) < len(work.probs):
            work = _work(logits, plan, len(blocks[number]), gradient is not None)
        _walk_block(blocks[number], plan, number, block_sums[number], work, grown[number])
    if gradient is not None and plan.ignored is not None:
        gradient.index_fill_(0, plan.ignored, 0.0)
    values = torch.stack(
        [_value(one, sums, number, listed[number]) for number, one in enumerate(plan.terms)]
    )
    weights = values.new_tensor([one.term.weight for one in plan.terms])
    return (values * weights).sum(), values


def _work(logits: Tensor, plan: LossPlan, rows: int, has_gradient: bool) -> _Work:
    """The room that this plan needs for blocks of so many rows."""
    dtype = compute_dtype(logits)
    shape = (min(rows, len(logits)), logits.shape[1])

    def room(needed: bool) -> Tensor | None:
        return logits.new_empty(shape, dtype=dtype) if needed else None

    half = logits.dtype != dtype
    once = len(plan.temperatures) == 1 and not plan.has_bucket
    return _Work(
        probs=logits.new_empty(shape, dtype=dtype),
        scaled=room(plan.has_bucket or plan.temperatures != [1.0]),
        upcast=room(half),
        gradient=room(has_gradient and (half or not once)),
    )


def _walk_block(
    logits: Tensor,
    plan: LossPlan,
    block: int,
    sums: _RowSums,
    work: _Work,
    gradient: Tensor | None,
) -> None:
    """Sums and gradient of one block of rows [R, V], all of it while the block is in the cache."""
    z = logits if work.upcast is None else work.upcast.copy_(logits)
    grown = gradient if work.gradient is None else work.gradient
    torch.amax(z, 1, out=sums.peak)
    if plan.floor is not None:
        torch.sum(z, 1, out=sums.logit_sum)
    for number, temperature in enumerate(plan.temperatures):
        scaled = z
        if temperature != 1.0:
            assert work.scaled is not None
            scaled = torch.mul(z, 1.0 / temperature, out=work.scaled)
        torch.softmax(scaled, 1, out=work.probs)
        torch.amax(work.probs, 1, out=sums.largest[number])
        if grown is not None and number == 0:
            torch.mul(work.probs, plan.mass[number][block], out=grown)
        elif grown is not None:
            grown.addcmul_(work.probs, plan.mass[number][block])
    for number, one in enumerate(plan.terms):
        if one.bucket_entries is None or one.bucket_slopes is None:
            continue
        # A sum of its own, never log(1 - sum): of a confident student only noise would be left.
        assert work.scaled is not None
        rest = torch.mul(z, 1.0 / one.term.temperature, out=work.scaled)
        rest.view(-1).index_fill_(0, one.bucket_entries[block], -torch.inf)
        torch.softmax(rest, 1, out=work.probs)
        torch.amax(rest, 1, out=sums.rest_peak[number])
        torch.amax(work.probs, 1, out=sums.rest_largest[number])
        if grown is not None:
            grown.addcmul_(work.probs, one.bucket_slopes[block])
    if gradient is None or grown is None:
        return
    if plan.floor is not None:
        grown.sub_(plan.floor[block])
    flat = grown.view(-1)
    for one in plan.terms:
        flat.index_add_(0, one.entries[block], one.slopes[block])
    if work.gradient is not None:
        gradient.copy_(grown)


def _value(one: TermPlan, sums: _RowSums, number: int, listed: Tensor) -> Tensor:
    """Weighted sum of one term's losses; logits count from each row's peak, for accuracy."""
    step = 1.0 / one.term.temperature
    loss = one.term.target.constant.to(one.mass) - one.mass * sums.largest[one.softmax].log()  # [N]
    loss.index_add_(0, one.rows, one.values * (listed - sums.peak[one.rows]), alpha=-step)
    if one.uniform is not None:
        loss -= one.uniform * (sums.logit_sum - sums.peak * one.vocab_size) * step
    if one.bucket is not None:
        rest = sums.rest_peak[number] - sums.rest_largest[number].log()
        loss -= one.bucket * (rest - sums.peak * step)
    # An ignored position may hold anything, also logits that are not finite.
    return torch.where(one.row_weight == 0, 0.0, one.row_weight * loss).sum()
