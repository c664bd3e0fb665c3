"""Sparse targets: what a student is held to, as a list of entries for each position."""

# N positions, E entries, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SparseTarget:
    """A density over the vocabulary for each of N positions, as a list of entries.

    The density of id i at position n is uniform[n] plus every value listed for (n, i): repeats
    add. Its mass W is taken as it is and never renormalised. None of the tensors gets a gradient.

    Attributes:
        rows: [E] int64, position of each entry, ascending.
        ids: [E] int64, vocabulary id of each entry.
        values: [E] float, mass of each entry.
        uniform: [N] float, mass that every one of the V ids has besides; None for none.
        bucket: [N] float, mass of one extra class, "an id that is not listed here", whose student
            probability is the sum over the ids not listed; None for none. Exclusive with uniform.
        constant: [N] float, nats, what the loss adds to make it a divergence (the negative entropy
            of the density, or what is known of it); zeros for a cross-entropy.
    """

    rows: Tensor
    ids: Tensor
    values: Tensor
    uniform: Tensor | None
    bucket: Tensor | None
    constant: Tensor


def densify(target: SparseTarget, vocab_size: int) -> Tensor:
    """[N, V] density over the ids that a target describes; a bucket's mass is not in it."""
    dense = target.values.new_zeros(len(target.constant), vocab_size)
    if target.uniform is not None:
        dense += target.uniform[:, None]
    return dense.index_put_((target.rows, target.ids), target.values, accumulate=True)
