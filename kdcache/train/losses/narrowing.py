"""Soft labels for a student that has fewer ids than its teacher.

Both vocabularies begin with the same ids; the teacher has more of them, most often rows that
pad its output layer. What it gave to the ids that the student lacks is not lost from sight: it
goes where the label keeps the mass that it does not list.
"""

# N positions, V vocabulary of the teacher, S ids of the student, E listed entries of a target

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdcache.labels.sparse_target import SparseTarget


def narrowed(target: SparseTarget, vocab_size: int, num_ids: int, drawn: bool) -> SparseTarget:
    """A target over the first S ids.

    `bucket`: the mass of the ids that the student lacks joins the bucket. `uniform`: it joins
    the tail, which is spread over the ids that the student has and the label does not list.
    Neither: what is left is scaled to the sum 1, as if the teacher had no other ids (a position
    of which nothing is left gets no label). So these stay divergences: zero where the student
    equals the target, and never below. `drawn`: entries are left out and nothing is moved,
    since no other entry stands for them; the label then sums to less than 1, its gradient pulls
    towards the teacher's distribution given the student's ids, and its constant stays that of
    all ids.

    Args:
        target: over V ids, entries of a position without repeats, as `decode` makes it.
        vocab_size: V.
        num_ids: S.
        drawn: whether the entries are a sample.

    Returns:
        The target over S ids; the same object where nothing has to go.
    """
    if num_ids >= vocab_size:
        return target
    keep = target.ids < num_ids
    kept = replace(target, rows=target.rows[keep], ids=target.ids[keep], values=target.values[keep])
    if drawn:
        return kept
    if target.uniform is not None:
        return _uniform(target, kept, keep, vocab_size, num_ids)
    if target.bucket is not None:
        mass = target.bucket + _per_row(target.values[~keep], target.rows[~keep], target)
        # Where every id of the student is listed there is no class to put it in.
        mass = mass * (_counts(kept) < num_ids)
        constant = _plogp(kept.values, kept) + _times_log(mass)
        return replace(kept, bucket=mass, constant=constant)
    values = kept.values / _per_row(kept.values, kept.rows, kept)[kept.rows]
    values = values.nan_to_num(nan=0.0)
    return replace(kept, values=values, constant=_plogp(values, kept))


def _uniform(
    target: SparseTarget, kept: SparseTarget, keep: Tensor, vocab_size: int, num_ids: int
) -> SparseTarget:
    """With the tail and what goes over the student's unlisted ids."""
    assert target.uniform is not None
    probs = target.values + target.uniform[target.rows]  # [E] an entry lies on the floor
    mass = target.uniform * (vocab_size - _counts(target))  # [N] of the tail
    mass = mass + _per_row(probs[~keep], target.rows[~keep], target)
    rest = (num_ids - _counts(kept)).to(mass.dtype)  # [N] ids it is spread over
    mass = mass * (rest > 0)
    uniform = mass / rest.clamp(min=1)
    probs = probs[keep]
    return replace(
        kept,
        values=probs - uniform[kept.rows],
        uniform=uniform,
        constant=_plogp(probs, kept) + _times_log(mass, rest.clamp(min=1)),
    )


def _per_row(values: Tensor, rows: Tensor, target: SparseTarget) -> Tensor:
    """[N] sums of [e] values by position."""
    return torch.zeros_like(target.constant).index_add_(0, rows, values)


def _counts(target: SparseTarget) -> Tensor:
    """[N] listed entries of each position."""
    return torch.bincount(target.rows, minlength=len(target.constant))


def _plogp(probs: Tensor, target: SparseTarget) -> Tensor:
    """[N] sums of p ln p over the listed entries."""
    return _per_row(_times_log(probs), target.rows, target)


def _times_log(mass: Tensor, parts: Tensor | None = None) -> Tensor:
    """Mass m as m ln m, or m ln (m / parts); 0 at m = 0."""
    share = mass if parts is None else mass / parts
    return torch.where(mass > 0, mass * share.clamp(min=torch.finfo(mass.dtype).tiny).log(), 0)
