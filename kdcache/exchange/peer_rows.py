"""Rows of another project's dump, in the one form that all importers give them."""

# T tokens of a row, N labelled tokens, E entries

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kdcache.errors import CorpusError


@dataclass(frozen=True)
class PeerLabels:
    """What a row says of its tokens: a few ids with log-probs for each of some tokens in a row.

    Attributes:
        first: the token that the first label is of; None: the labels are those of the last N.
        counts: [N] int64 entries of each label.
        ids: [E] int64, label after label, in any order within one.
        log_probs: [E] float64 nats over the whole vocabulary, at temperature 1.
        gold: [N] float64 nats of the token itself, where the file says them; NaN where not.
    """

    first: int | None
    counts: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    gold: np.ndarray

    def part(self, start: int, stop: int) -> PeerLabels:
        """Labels [start, stop) alone; `first` is None in what comes back."""
        ends = np.concatenate([[0], np.cumsum(self.counts)])
        inside = slice(int(ends[start]), int(ends[stop]))
        here = slice(start, stop)
        return PeerLabels(
            None, self.counts[here], self.ids[inside], self.log_probs[inside], self.gold[here]
        )


@dataclass(frozen=True)
class PeerRow:
    """One text of the dump.

    Attributes:
        number: counted over all files, from 0.
        where: words for a message, as `data.jsonl: line 3`.
        ids: [T] int64 its tokens, where the file has them.
        text: it, where the file has it.
        messages: the canonical text of its messages, where the file has them.
        loss: [T] bool, which tokens are learned, where the file says so.
        labels: reads the labels; called when they are needed.
    """

    number: int
    where: str
    ids: np.ndarray | None
    text: str | None
    messages: str | None
    loss: np.ndarray | None
    labels: Callable[[], PeerLabels]


class Reader(Protocol):
    """Reads the files of one format, a row at a time.

    Attributes:
        limits: what such files cannot say, a sentence each.
        unit: what `rows` advances by.
        total: of these units; None where that is unknown.
        lossy: whether log-probs are approximations, so that their probabilities may exceed 1.
        has_loss: whether rows say which tokens are learned.
    """

    limits: tuple[str, ...]
    unit: str
    total: int | None
    lossy: bool
    has_loss: bool

    def rows(self, advance: Callable[[int], object], start: int = 0) -> Iterator[PeerRow]:
        """The rows from number `start` on.

        Args:
            advance: called with the units that were read.
            start: rows before it are passed over.

        Raises:
            CorpusError: a file or a row is not of the format; says where.
        """
        ...


def integers(value: object, what: str, where: str) -> np.ndarray:
    """[T] int64 from a list of whole numbers.

    Raises:
        CorpusError: it is none.
    """
    if isinstance(value, list) and not any(type(item) is not int for item in value):
        return np.array(value, dtype=np.int64)
    raise CorpusError(f"{where}: {what!r} should be a list of whole numbers")
