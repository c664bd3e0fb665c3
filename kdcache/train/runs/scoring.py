"""Scoring of a development or test set: batches of like lengths, shared out among the ranks."""

# B samples of a batch, N tokens of it, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.train.runs.parallel import Ranks


@dataclass(frozen=True)
class Score:
    """Teacher-forced scores over the tokens of a set.

    Attributes:
        loss_nats: mean negative log-prob of a target token, in nats.
        accuracy: share of target tokens that are the student's first choice.
        num_tokens: N, tokens scored (those the tokenizer adds, such as eos, included).
    """

    loss_nats: float
    accuracy: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The loss, exponentiated; per token of this tokenizer."""
        return math.exp(self.loss_nats) if self.loss_nats < 700 else math.inf


def score_in_turns(
    model: Any,
    lengths: Sequence[int],
    batch_tokens: int,
    ranks: Ranks,
    score: Callable[[list[int]], Tensor],
) -> list[tuple[list[int], Tensor]]:
    """This rank's share of the batches of a set, each with what is said of it.

    Args:
        model: put into evaluation mode meanwhile.
        lengths: of the samples, each at least 1.
        batch_tokens: most samples x longest sample of a batch; a single sample may have more.
        ranks: which score the batches in turns.
        score: takes the numbers of a batch's samples.
    """
    order = np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable")[::-1]
    cuts, start = [], 0
    while start < len(order):
        cuts.append(start)
        start += max(1, batch_tokens // int(lengths[order[start]]))
    batches = np.split(order, cuts[1:])
    own: list[tuple[list[int], Tensor]] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        # A student that is spread over the ranks runs as often on each: the last may stand in.
        for first in range(0, len(batches), ranks.world):
            number = first + ranks.rank
            rows = batches[min(number, len(batches) - 1)].tolist()
            found = score(rows)
            if number < len(batches):
                own.append((rows, found))
    model.train(was_training)
    return own


def score_tokens_in_turns(
    model: Any,
    lengths: Sequence[int],
    num_tokens: int,
    device: torch.device,
    batch_tokens: int,
    ranks: Ranks,
    sums: Callable[[list[int]], Tensor],
) -> Score:
    """Loss and accuracy over the tokens of a set that are predicted.

    Args:
        model: on `device`.
        lengths: of the samples, each at least 1.
        num_tokens: that are predicted.
        device: of the model.
        batch_tokens: see `score_in_turns`.
        ranks: which score the batches in turns.
        sums: what `token_sums` says of a batch.
    """
    own = [found for _, found in score_in_turns(model, lengths, batch_tokens, ranks, sums)]
    total = torch.cat(own).sum(0) if own else torch.zeros(2, dtype=torch.float64)
    if ranks.world > 1:
        total = ranks.summed(total.to(device)).cpu()
    loss, hits = (total / max(1, num_tokens)).tolist()
    return Score(loss_nats=loss, accuracy=hits, num_tokens=num_tokens)


def token_sums(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """[B, 2] float64, on the host: summed negative log-prob, and number of first choices.

    Args:
        logits: [N, V], those of a sample together, in the order of the samples.
        targets: [N] int64.
        counts: [B] int64, how many are of each sample.
    """
    logits = logits.float()
    losses = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    hits = logits.argmax(1) == targets
    each = torch.stack([losses, hits.float()], 1).cpu().double()  # [N, 2]
    sample = torch.repeat_interleave(counts.cpu())
    # On the host, where it adds in one order.
    return each.new_zeros(len(counts), 2).index_add(0, sample, each)


def sums_of_samples(
    model: Any,
    lengths: Sequence[int],
    batch_tokens: int,
    sums: Callable[[list[int]], Tensor],
) -> np.ndarray:
    """[M, 2] float64, what `token_sums` says of each sample of a set, in their order.

    Args:
        model: put into evaluation mode meanwhile.
        lengths: of the samples, each at least 1.
        batch_tokens: see `score_in_turns`.
        sums: what `token_sums` says of a batch.
    """
    found = torch.zeros(len(lengths), 2, dtype=torch.float64)
    for rows, own in score_in_turns(model, lengths, batch_tokens, Ranks(), sums):
        found[rows] = own
    return found.numpy()
