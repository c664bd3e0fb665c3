"""Samples of the output, gathered from the caches that have them.

# S caches, R samples of the output
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdcache.compile.hypotheses import labels_of, tokens_of
from kdcache.compile.matching import first_source
from kdcache.compile.runs import gather_runs
from kdcache.compile.source import Source
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import LogitsRecord


class Gatherer:
    """Takes some samples of the output from the caches, whichever has each first.

    Attributes:
        size: R.
    """

    def __init__(
        self, sources: Sequence[Source], where: np.ndarray, chosen: np.ndarray | None
    ) -> None:
        """Name the samples.

        Args:
            sources: the caches.
            where: [S, R] integer, the number of each sample in each cache, or ABSENT.
            chosen: [R] the hypothesis that is each one's target; None where the targets stay.
        """
        self._sources, self._where, self._chosen = sources, where, chosen
        self.size = where.shape[1]

    def part(self, start: int, stop: int) -> Gatherer:
        """The samples [start, stop) alone."""
        chosen = None if self._chosen is None else self._chosen[start:stop]
        return Gatherer(self._sources, self._where[:, start:stop], chosen)

    def ids(self) -> np.ndarray:
        """[R, 16] uint8 sample ids."""
        out = np.empty((self.size, 16), dtype=np.uint8)
        for source, mine, index in self._split(None):
            out[mine] = source.take_ids(index)
        return out

    def texts(self, field: str) -> list[str]:
        """R raw texts."""
        return self._strings(lambda source, index: source.take_texts(field, index))

    def tasks(self) -> list[str]:
        """R tasks, of caches that have tasks."""
        return self._strings(lambda source, index: source.take_tasks(index))

    def stream(self, name: str) -> Ragged:
        """R lists of tokens, as they are stored."""
        return self._merged(None, lambda source, index: {"": source.take_stream(name, index)})[""]

    def columns(self, signal: str, carriers: Sequence[int]) -> dict[str, Ragged]:
        """Labels of an Arrow signal, by column.

        Args:
            signal: its name in the caches.
            carriers: the caches that have it.
        """
        return self._merged(carriers, lambda source, index: source.take_columns(signal, index))

    def hypotheses(self, beams: str, carriers: Sequence[int]) -> Ragged:
        """[R] ragged `id` int32, the tokens of the chosen hypotheses."""
        assert self._chosen is not None
        return tokens_of(self.columns(beams, carriers), self._chosen.astype(np.int64))

    def chosen_labels(self, record: LogitsRecord, carriers: Sequence[int]) -> dict[str, Ragged]:
        """Labels of the chosen hypotheses, in a signal made on hypotheses.

        Args:
            record: of the signal in the caches.
            carriers: the caches that have it.
        """
        assert self._chosen is not None
        assert record.hypotheses is not None
        # Its own cache's hypotheses are those that it was made on.
        hypotheses = self.columns(record.hypotheses, carriers)
        labels = self.columns(record.name, carriers)
        return labels_of(record, labels, hypotheses, self._chosen.astype(np.int64))

    def counts(self, signal: str, carriers: Sequence[int]) -> np.ndarray:
        """[R] int64 records of a signal's main column."""
        out = np.empty(self.size, dtype=np.int64)
        for source, mine, index in self._split(carriers):
            out[mine] = source.count_labels(signal, index)
        return out

    def dense(
        self,
        signal: str,
        carriers: Sequence[int],
        offsets: np.ndarray,
        values: np.ndarray,
        scale: np.ndarray | None,
    ) -> None:
        """Fill the arrays of a dense part.

        Args:
            signal: its name in the caches.
            carriers: the caches that have it.
            offsets: [R + 1] rows of each sample.
            values: [rows, layers, width].
            scale: [rows, layers] for int8.
        """
        for source, mine, index in self._split(carriers):
            source.take_dense(signal, index, offsets[mine], values, scale)

    def _split(self, carriers: Sequence[int] | None) -> list[tuple[Source, np.ndarray, np.ndarray]]:
        """Each cache that gives some samples, which they are, and their number there."""
        giver = first_source(self._where, carriers)
        found = []
        for s in np.unique(giver):
            assert s >= 0, "the plan leaves no sample without a cache"
            mine = np.flatnonzero(giver == s)
            found.append((self._sources[s], mine, self._where[s, mine].astype(np.int64)))
        return found

    def _strings(self, take: Callable[[Source, np.ndarray], list[str]]) -> list[str]:
        found = np.empty(self.size, dtype=object)
        for source, mine, index in self._split(None):
            found[mine] = take(source, index)
        out: list[str] = found.tolist()
        return out

    def _merged(
        self,
        carriers: Sequence[int] | None,
        take: Callable[[Source, np.ndarray], dict[str, Ragged]],
    ) -> dict[str, Ragged]:
        """Ragged columns of all samples, each from its cache."""
        split = self._split(carriers)
        pieces = [take(source, index) for source, _, index in split]
        if len(pieces) == 1:
            return pieces[0]
        which = np.empty(self.size, dtype=np.int64)
        inner = np.empty(self.size, dtype=np.int64)
        for number, (_, mine, _) in enumerate(split):
            which[mine], inner[mine] = number, np.arange(len(mine))
        return {
            name: gather_runs([piece[name] for piece in pieces], which, inner) for name in pieces[0]
        }
