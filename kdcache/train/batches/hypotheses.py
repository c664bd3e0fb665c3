"""Hypotheses as a stream: what a student predicts where it learns from a teacher's translations."""

# B samples, H hypotheses, K tokens of all hypotheses, T positions, N tokens of the chosen ones

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdcache.errors import ModelError
from kdcache.train.batches.batch import Batch, Hypotheses, Tokens


def hypothesis_stream(beams: str, number: int) -> str:
    """The name that some hypotheses have as a stream; no stream of a cache has a dot in its own.

    Args:
        beams: name of a beams signal.
        number: which hypothesis of each sample, 0 the best.
    """
    return f"{beams}.{number}"


def is_hypothesis(stream: str) -> bool:
    """Whether a name is one of `hypothesis_stream`."""
    return "." in stream


def hypothesis_tokens(hypotheses: Hypotheses, number: int) -> Tokens:
    """One hypothesis of each sample as padded tokens; those without it have none.

    Args:
        hypotheses: of B samples, on the host.
        number: which, 0 the best.
    """
    counts, lengths = hypotheses.counts, hypotheses.lengths
    has = counts > number
    chosen = (counts.cumsum(0) - counts)[has] + number  # [samples that have it] of H
    own = torch.zeros_like(counts)
    own[has] = lengths[chosen]
    starts = torch.zeros_like(counts)
    starts[has] = (lengths.cumsum(0) - lengths)[chosen]  # of K
    mask = torch.arange(max([1, *own.tolist()])) < own[:, None]  # [B, T]
    flat = hypotheses.ids[_places(starts, own)]  # [N]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = flat
    return Tokens(ids=ids, mask=mask, flat=flat)


def _places(starts: Tensor, lengths: Tensor) -> Tensor:
    """[N] indices of the tokens of some pieces, one piece after another."""
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(shift, lengths)


def with_hypotheses(
    batch: Batch, wanted: Mapping[str, tuple[str, int]], max_positions: int | None
) -> Batch:
    """A batch with some of its hypotheses as streams too.

    Args:
        batch: on the host.
        wanted: name of a stream to the beams signal and the number of the hypothesis.
        max_positions: most tokens that a student takes; None: any.

    Raises:
        ModelError: a hypothesis is longer; its sample is named.
    """
    if not wanted:
        return batch
    streams = dict(batch.streams)
    for name, (beams, number) in wanted.items():
        hypotheses = batch.signals[beams]
        assert isinstance(hypotheses, Hypotheses)
        streams[name] = tokens = hypothesis_tokens(hypotheses, number)
        longest = tokens.ids.shape[1]
        if max_positions is not None and longest > max_positions:
            row = batch.rows[int(tokens.mask.sum(1).argmax())]
            raise ModelError(
                f"student: takes {max_positions} positions, and hypothesis {number} of signal "
                f"{beams!r} has {longest} tokens at corpus row {row}; give the student more "
                f"(train.student.config.max_position_embeddings), or dump the hypotheses with "
                f"max_length {max_positions}"
            )
    return replace(batch, streams=streams)
