"""Tails: log-sum-exps over the ids that are not exact entries."""

# N positions, R rows of a block, V vocabulary, n stored temperatures

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.dump.codecs.block import Block

#: A sum of exponentials outside these bounds is taken again with its peak factored out.
SAFE_SUM = (1e-30, 1e30)


def tail_sums(block: Block, temperatures: Sequence[float]) -> Tensor:
    """[R, n] sums over the ids that are not exact; writes over the block.

    Of probabilities to the power 1/T at T = 1 and 0.5, of exp(logits/T) otherwise.
    """
    assert block.exact is not None
    block.padded_probs.view(-1)[block.exact] = 0
    sums = []
    for temperature in temperatures:
        if temperature == 1:
            sums.append(block.probs.sum(dim=-1))
        elif temperature == 0.5:
            sums.append(torch.linalg.vector_norm(block.probs, dim=-1).square())
        else:  # exp2 is the fastest exponential there is
            torch.mul(block.logits, 1 / (temperature * math.log(2)), out=block.scratch)
            block.padded_scratch.view(-1)[block.exact] = -torch.inf
            sums.append(block.scratch.exp2_().sum(dim=-1))
    return torch.stack(sums, dim=1)


def log_tails(
    sums: Tensor,
    logits: Tensor,
    log_sum: Tensor,
    exact: tuple[Tensor, Tensor],
    num_exact: Tensor,
    temperatures: Sequence[float],
    block_rows: int,
) -> Tensor:
    """[N, n] log-sum-exp of the log-probs of the ids that are not exact, in nats."""
    shifts = [0 if t in (1, 0.5) else 1 / t for t in temperatures]
    tail = sums.log() - log_sum[:, None] * torch.tensor(shifts, device=sums.device)
    smallest, largest = SAFE_SUM
    unsafe = ((sums < smallest) | (sums > largest)).any(dim=1) & (num_exact < logits.shape[1])
    rows, ids = exact
    for again in torch.split(unsafe.nonzero()[:, 0], block_rows):
        some = logits[again].to(torch.float32)
        place = torch.full_like(num_exact, -1)
        place[again] = torch.arange(len(again), device=again.device)
        at = place[rows]
        some[at[at >= 0], ids[at >= 0]] = -torch.inf
        for i, temperature in enumerate(temperatures):
            total = torch.logsumexp(some / temperature, dim=-1)
            tail[again, i] = total - log_sum[again] / temperature
    return tail
