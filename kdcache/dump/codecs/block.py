"""A block: rows of logits that are worked on at once, and what is found in them."""

# R rows, V vocabulary, W padded width, E exact entries, D drawn entries, n stored temperatures

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache.dump.codecs.fixed_point import GROUP
from kdcache.errors import ModelError


class NotFiniteError(ModelError):
    """Logits that are no distribution.

    Attributes:
        position: of the first such row among those that were given.
    """

    def __init__(self, position: int, where: str = "") -> None:
        """Say where.

        Args:
            position: among the rows that were given.
            where: the same in words, for people.
        """
        super().__init__(
            f"{where or f'position {position} of the batch'}: the teacher's logits have a NaN, a "
            "+inf or nothing but -inf where finite numbers were expected; try "
            "dump.teacher.dtype float32"
        )
        self.position = position


class Block:
    """R rows of logits and what is found in them.

    An entry is named by its place in the block: row x W + id, W the padded width. Whatever can
    wait is not here: a small operation costs one block as much as all of them joined.
    """

    def __init__(self, logits: Tensor, buffers: Tensor, start: int) -> None:
        num_rows, vocab_size = logits.shape
        self.first = start * buffers.shape[2]
        self.logits = logits.to(torch.float32)  # [R, V]
        self.padded_probs, self.padded_scratch = buffers[:, :num_rows]  # [R, W], 0 from id V on
        self.probs = self.padded_probs[:, :vocab_size]  # [R, V]
        self.scratch = self.padded_scratch[:, :vocab_size]  # [R, V]
        torch.softmax(self.logits, dim=-1, out=self.probs)
        self.peak = self.probs.amax(dim=-1)  # [R]
        if not math.isfinite(float(self.peak.sum())):
            raise NotFiniteError(start + int(self.peak.isnan().nonzero()[0]))
        self.peak_logit = self.logits.amax(dim=-1)  # [R]
        self.mean_logit = torch.mul(self.probs, self.logits, out=self.scratch).sum(dim=-1)  # [R]
        self.exact: Tensor | None = None  # [E] int64 places
        self.drawn: Tensor | None = None  # [D] int64 places
        self.counts: Tensor | None = None  # [D] int64
        self.tail_sums: Tensor | None = None  # [R, n]
        self.codes: Tensor | None = None  # [R, V]

    def row_places(self) -> Tensor:
        """[R, 1] place of the first id of each row."""
        num_rows, width = self.padded_probs.shape
        return torch.arange(0, num_rows * width, width, device=self.probs.device)[:, None]

    def release(self) -> Block:
        """Itself without what the next block overwrites."""
        del self.logits, self.padded_probs, self.padded_scratch, self.probs, self.scratch
        return self


def rows_and_ids(pieces: Sequence[tuple[int, Tensor]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Positions and ids of all entries from their places in the blocks."""
    width = -(-vocab_size // GROUP) * GROUP
    places = torch.cat([piece + first for first, piece in pieces])
    rows = places.div(width, rounding_mode="floor")
    return rows, places - rows * width
