"""Sparse targets and weighted terms, and the plan by which a fused loss walks the logits.

# N positions (rows), V vocabulary, E listed entries of a target, K blocks of rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.labels.sparse_target import SparseTarget

# Floats of a block, per thread: it and its softmax, 2 MiB each, stay about in a core's caches.
# Blocks of a quarter pay in calls, blocks of four times the size in memory traffic.
_CPU_BLOCK = 2**19
# Large enough to hide the kernel launches, small enough for a data centre card's cache.
_CUDA_BLOCK = 2**22


@dataclass(frozen=True)
class LossTerm:
    """One weighted loss of a mix.

    Attributes:
        target: the density to match.
        temperature: what the logits are divided by, above 0. The target is for this temperature.
        weight: factor of the term in the total. Hinton's T^2, if wanted, is part of it.
        row_weight: [N] float, factor of each position; 0 ignores the position, whatever its
            logits hold. None takes the mean: 1 / N.
    """

    target: SparseTarget
    temperature: float = 1.0
    weight: float = 1.0
    row_weight: Tensor | None = None


Blocks = Sequence[Tensor]  # one tensor per block of rows


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Half types are too coarse for a sum over the vocabulary."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class TermPlan:
    """A checked term, on the logits' device and in the type of the computation."""

    term: LossTerm
    softmax: int  # which of the plan's temperatures
    vocab_size: int
    row_weight: Tensor  # [N]
    mass: Tensor  # [N] W, with the uniform part and the bucket
    rows: Tensor  # [E]
    ids: Tensor  # [E]
    values: Tensor  # [E]
    uniform: Tensor | None  # [N]
    bucket: Tensor | None  # [N]
    entries: Blocks  # [e] each: places of the entries among the block's R * V
    slopes: Blocks  # [e] each: what each entry adds to the gradient
    bucket_entries: Blocks | None  # [e] each: places that the bucket does not stand for
    bucket_slopes: Blocks | None  # [R, 1] each: factor of the bucket's softmax in the gradient


@dataclass(frozen=True)
class LossPlan:
    """All that is known before the logits are walked."""

    terms: list[TermPlan]
    temperatures: list[float]
    mass: list[Blocks]  # per temperature, [R, 1] each: factor of its softmax in the gradient
    floor: Blocks | None  # [R, 1] each: what the uniform parts take off the gradient everywhere
    ignored: Tensor | None  # rows without weight in any term
    unit: Tensor | None  # what a float16 gradient is divided by, lest it underflow
    block_rows: int

    @property
    def has_bucket(self) -> bool:
        """Whether some term needs a softmax over the ids it does not list."""
        return any(one.bucket is not None for one in self.terms)


def plan_terms(logits: Tensor, terms: Sequence[LossTerm], block_rows: int | None) -> LossPlan:
    """Checks the terms and merges what those of one temperature share.

    Args:
        logits: [N, V] float; only shape, type and device are looked at.
        terms: the losses.
        block_rows: rows per block; None chooses by V.

    Raises:
        TrainingError: on a shape, id or temperature that does not fit.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or not terms:
        raise TrainingError(
            f"fused loss: got {len(terms)} terms over {logits.dtype} logits of shape "
            f"{list(logits.shape)}; expected at least one term and floating logits [N, V]"
        )
    for term in terms:
        check_term(logits.shape, term)
    rows = _block_rows(logits) if block_rows is None else max(1, block_rows)
    row_weights = [_row_weight(logits, term) for term in terms]
    scales = torch.stack(  # [terms, N] gradient of the total by each loss at temperature 1
        [
            weight * (term.weight / term.temperature)
            for weight, term in zip(row_weights, terms, strict=True)
        ]
    )
    reach = scales.abs().amax(0)  # [N]
    unit = None
    if logits.dtype == torch.float16 and len(logits):
        unit = reach.amax().clamp(min=torch.finfo(reach.dtype).tiny)
        scales = scales / unit
    temperatures = list(dict.fromkeys(term.temperature for term in terms))
    planned = [
        _plan_term(logits, term, temperatures.index(term.temperature), weight, scale, rows)
        for term, weight, scale in zip(terms, row_weights, scales, strict=True)
    ]
    mass = [torch.zeros_like(reach) for _ in temperatures]
    floor = None
    for one, scale in zip(planned, scales, strict=True):
        mass[one.softmax] += one.mass * scale
        if one.uniform is not None:
            floor = one.uniform * scale + (0.0 if floor is None else floor)
    weighted = any(term.row_weight is not None for term in terms)
    return LossPlan(
        terms=planned,
        temperatures=temperatures,
        mass=[torch.split(one.unsqueeze(1), rows) for one in mass],
        floor=None if floor is None else torch.split(floor.unsqueeze(1), rows),
        ignored=(reach == 0).nonzero().flatten() if weighted else None,
        unit=unit,
        block_rows=rows,
    )


def _block_rows(logits: Tensor) -> int:
    """Rows whose block stays in the cache, at least one per thread."""
    vocab_size = max(1, logits.shape[1])
    if logits.device.type != "cpu":
        return max(1, _CUDA_BLOCK // vocab_size)
    return torch.get_num_threads() * max(1, _CPU_BLOCK // vocab_size)


def _row_weight(logits: Tensor, term: LossTerm) -> Tensor:
    """[N] weights of a term's positions; those of the mean where none are given."""
    if term.row_weight is not None:
        return term.row_weight.detach().to(logits.device, compute_dtype(logits))
    mean = 1.0 / max(1, len(logits))
    return logits.new_full((len(logits),), mean, dtype=compute_dtype(logits))


def _plan_term(
    logits: Tensor,
    term: LossTerm,
    softmax: int,
    row_weight: Tensor,
    scale: Tensor,
    block_rows: int,
) -> TermPlan:
    """Moves one term to the logits' device and type and finds its entries of every block."""
    num_rows, vocab_size = logits.shape
    target = term.target

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(row_weight)

    rows = target.rows.to(logits.device)
    values = moved(target.values)
    uniform = None if target.uniform is None else moved(target.uniform)
    bucket = None if target.bucket is None else moved(target.bucket)
    mass = torch.zeros_like(row_weight).index_add_(0, rows, values)
    if uniform is not None:
        mass += uniform * vocab_size
    if bucket is not None:
        mass += bucket
    ids = target.ids.to(logits.device)
    starts = torch.arange(0, num_rows + block_rows, block_rows, device=logits.device)
    flat = rows % block_rows * vocab_size + ids
    sizes = torch.searchsorted(rows, starts).diff().tolist()
    bucket_entries = bucket_slopes = None
    if bucket is not None:
        # Where the bucket is empty nothing is left out: all ids may be listed, none would remain.
        left_out = bucket[rows] > 0
        bucket_sizes = torch.searchsorted(rows[left_out], starts).diff().tolist()
        bucket_entries = torch.split(flat[left_out], bucket_sizes)
        bucket_slopes = torch.split((bucket * -scale).unsqueeze(1), block_rows)
    return TermPlan(
        term=term,
        softmax=softmax,
        vocab_size=vocab_size,
        row_weight=row_weight,
        mass=mass,
        rows=rows,
        ids=ids,
        values=values,
        uniform=uniform,
        bucket=bucket,
        entries=torch.split(flat, sizes),
        slopes=torch.split(values * -scale[rows], sizes),
        bucket_entries=bucket_entries,
        bucket_slopes=bucket_slopes,
    )


def check_term(shape: Sequence[int], term: LossTerm) -> None:
    """Refuses what would read or write beside its row of [N, V] logits."""
    target = term.target
    num_rows, vocab_size = shape
    if not 0.0 < term.temperature < float("inf"):
        raise TrainingError(
            f"fused loss: temperature is {term.temperature}; expected a finite number above 0"
        )
    per_row = (target.constant, target.uniform, target.bucket, term.row_weight)
    for tensor in per_row:
        if tensor is not None and tensor.shape != (num_rows,):
            raise TrainingError(
                f"fused loss: the target covers {list(tensor.shape)} positions; expected "
                f"[{num_rows}], one per row of logits"
            )
    if not target.rows.shape == target.ids.shape == target.values.shape:
        raise TrainingError(
            f"fused loss: {list(target.rows.shape)} rows, {list(target.ids.shape)} ids and "
            f"{list(target.values.shape)} values; expected as many of each"
        )
    # On another device the check would wait for it; there the gather's own one stops the kernel.
    if target.ids.device.type != "cpu" or not len(target.ids):
        return
    low, high = (int(bound) for bound in target.ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise TrainingError(
            f"fused loss: target ids run from {low} to {high}; expected 0 to {vocab_size - 1}, "
            "the columns of the logits"
        )
    first, last = int(target.rows[0]), int(target.rows[-1])
    if first < 0 or last >= num_rows or bool((target.rows[1:] < target.rows[:-1]).any()):
        raise TrainingError(
            f"fused loss: target rows run from {first} to {last}; expected them ascending within "
            f"0 to {num_rows - 1}"
        )
