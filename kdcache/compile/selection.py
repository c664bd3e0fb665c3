"""The samples of all caches that are still in, and the choices that leave some out.

# S caches, U samples of all caches, n samples of the output
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kdcache.compile.compatible import PlannedSignal, require_signal
from kdcache.compile.hypotheses import SentenceBleu, Texts, all_tokens, closest
from kdcache.compile.id_list import IdList
from kdcache.compile.matching import (
    ABSENT,
    below,
    choice_hashes,
    first_source,
    match,
    occurrences,
    smallest,
    stack,
)
from kdcache.compile.measures import BLOCK_SAMPLES, fulfilled, has_measure, measure
from kdcache.compile.options import CompileOptions, Condition, Targets
from kdcache.compile.source import Source
from kdcache.errors import RecipeError


class Selection:
    """The samples that are still in, of all caches.

    Attributes:
        where: [S, U] integer, the number of each sample in each cache, or ABSENT.
        left_out: reason to the number of samples that were left out for it.
    """

    def __init__(self, sources: Sequence[Source], options: CompileOptions) -> None:
        """Take in all samples: one after another where they are mixed, else matched by id.

        Args:
            sources: the caches.
            options: says whether they are mixed, and the seed.
        """
        self._sources, self._options = sources, options
        self._duplicates: list[np.ndarray] | None = None
        self._ids: list[np.ndarray] | None = None
        self.left_out: dict[str, int] = {}
        if options.mix is not None or len(sources) == 1:
            self.where = stack([source.num_samples for source in sources])
        else:
            ids, duplicates = self._identities()
            self.where = match(ids, duplicates)

    def filter(self, conditions: Sequence[Condition]) -> None:
        """Leave out what does not fulfil all conditions.

        Where several caches have a sample, the first that can tell does.
        """
        for condition in conditions:
            able = [s.number for s in self._sources if has_measure(s, condition)]
            if not able:
                self._refuse(condition)
            teller = first_source(self.where, able)
            unknown = int((teller == ABSENT).sum())
            if unknown and self._options.missing == "refuse":
                raise RecipeError(
                    f"filter '{condition}': {unknown} of {len(teller)} samples are in no cache "
                    f"that has {condition.name!r}; drop them with --missing drop, or leave the "
                    "filter out"
                )
            keep = np.zeros(len(teller), dtype=bool)
            for s in able:
                mine = np.flatnonzero(teller == s)
                wanted = np.zeros(self._sources[s].num_samples, dtype=bool)
                wanted[self.where[s, mine]] = True
                tokenizer = self._options.bleu_tokenizer
                values = measure(self._sources[s], condition, wanted, tokenizer)
                keep[mine] = fulfilled(condition, values)[self.where[s, mine]]
            self._keep(keep, str(condition))

    def _refuse(self, condition: Condition) -> None:
        """Name what there is in place of what a filter looks at."""
        if condition.quantity == "number":
            raise RecipeError(
                f"filter '{condition}': no field {condition.name!r}; there are "
                f"{sorted(self._sources[0].cache.manifest.corpus.fields)}"
            )
        if condition.quantity != "length":
            require_signal(self._sources, condition.name, f"filter '{condition}'")
        raise RecipeError(
            f"filter '{condition}': no stream {condition.name!r}; there are "
            f"{sorted(self._sources[0].cache.manifest.streams)}"
        )

    def keep_listed(self, wanted: IdList) -> None:
        """Leave out what is not listed.

        Raises:
            RecipeError: something is listed that is not there.
        """
        if len(wanted.rows) and len(self._sources) > 1:
            raise RecipeError(
                f"{wanted.name}: it lists corpus rows, which of {len(self._sources)} caches is not "
                "known; list sample ids, or compile one cache"
            )
        keep = np.isin(self.ids(), wanted.ids) if len(wanted.ids) else np.zeros(self.size, bool)
        found = len(np.unique(self.ids()[keep])) if len(wanted.ids) else 0
        if len(wanted.rows):
            rows = self._sources[0].rows()[self.where[0]]
            listed = np.isin(rows, wanted.rows)
            found += int(listed.sum())
            keep |= listed
        if found < len(wanted):
            raise RecipeError(
                f"{wanted.name}: {len(wanted) - found} of {len(wanted)} samples that it lists are "
                "not there (or left out by a filter); list samples of the caches"
            )
        self._keep(keep, "not listed")

    def require_signals(self, signals: Sequence[PlannedSignal]) -> None:
        """Refuse, or leave out, samples that lack a signal of the output.

        Raises:
            RecipeError: some do, and they are not to be dropped.
        """
        for signal in signals:
            names = [*signal.inputs, *([signal.record.hypotheses] if signal.chosen else [])]
            for name in [signal.name, *filter(None, names)]:
                self._require(name, [s.number for s in self._sources if name in s.cache.signals])
        targets = self._options.chosen_targets
        if targets is not None:
            self._require(targets.beams, require_signal(self._sources, targets.beams, "targets"))

    def _require(self, name: str, carriers: Sequence[int]) -> None:
        has = first_source(self.where, carriers) != ABSENT
        lacking = int((~has).sum())
        if lacking and self._options.missing == "refuse":
            source = self._sources[int(first_source(self.where)[np.flatnonzero(~has)[0]])]
            raise RecipeError(
                f"compile: {lacking} of {len(has)} samples lack the signal {name!r}, the first is "
                f"of {source.name}; leave the signal out with --signals, or the samples with "
                "--missing drop"
            )
        if lacking:
            self._keep(has, f"without {name}")

    def subset(self, fraction: float | None, count: int | None) -> None:
        """Leave out all but a keyed choice."""
        everything = np.arange(self.size)
        hashes = self.hashes("subset", everything, np.zeros(self.size, dtype=np.uint32))
        keep = below(hashes, fraction) if fraction is not None else smallest(hashes, count or 0)
        self._keep(keep, "not chosen")

    def copies(self, weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
        """[n] int64 samples of the output, repeated by weight, and [n] uint32 which copy each is.

        Cache after cache, and of each copy after copy.
        """
        if weights is None:
            return np.arange(self.size), np.zeros(self.size, dtype=np.uint32)
        home = first_source(self.where)
        columns: list[np.ndarray] = []
        copies: list[np.ndarray] = []
        for s, weight in enumerate(weights):
            mine = np.flatnonzero(home == s)
            whole, part = int(weight), weight - int(weight)
            taken = [mine] * whole
            if part > 0:
                hashes = self.hashes(f"mix {s}", mine, np.zeros(len(mine), dtype=np.uint32))
                taken.append(mine[below(hashes, part)])
            columns += taken
            copies += [np.full(len(some), copy) for copy, some in enumerate(taken)]
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *columns]), np.concatenate([empty, *copies]).astype(np.uint32)

    def closest(self, targets: Targets) -> np.ndarray:
        """[U] int32 the hypothesis of each sample that is closest to its reference."""
        carriers = require_signal(self._sources, targets.beams, "targets")
        bleu = SentenceBleu(self._options.bleu_tokenizer)
        found = np.zeros(self.size, dtype=np.int32)
        first = self._sources[carriers[0]].cache
        stream = first.signal(targets.beams).stream
        texts, field = Texts(first, stream), first.stream(stream).field

        def look(source: Source, columns: np.ndarray, index: np.ndarray) -> None:
            hypotheses = source.take_columns(targets.beams, index)
            references = source.take_texts(field, index)
            decoded = texts.decode(all_tokens(hypotheses))
            found[columns] = closest(hypotheses, decoded, references, bleu)

        in_blocks(self._sources, self.where, carriers, look)
        return found

    @property
    def size(self) -> int:
        """U: samples that are in."""
        return self.where.shape[1]

    def ids(self) -> np.ndarray:
        """[U] 16 bytes, the sample_id of each."""
        out = np.empty(self.size, dtype="S16")
        home = first_source(self.where)
        for s, ids in enumerate(self._identities()[0]):
            mine = np.flatnonzero(home == s)
            out[mine] = _packed(ids)[self.where[s, mine]]
        return out

    def hashes(self, purpose: str, columns: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """[n] uint64, a random number of each sample and copy.

        Args:
            purpose: what it is for.
            columns: [n] samples.
            copies: [n] which copy of each.
        """
        out = np.empty(len(columns), dtype=np.uint64)
        home = first_source(self.where)[columns]
        ids, duplicates = self._identities()
        for s in np.unique(home):
            for copy in np.unique(copies[home == s]):
                mine = np.flatnonzero((home == s) & (copies == copy))
                index = self.where[s, columns[mine]]
                seed = self._options.seed
                out[mine] = choice_hashes(
                    ids[s][index], duplicates[s][index], seed, purpose, int(copy)
                )
        return out

    def _identities(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Ids and duplicate numbers of the samples of each cache, read when first asked for."""
        if self._ids is None or self._duplicates is None:
            self._ids = [source.sample_ids() for source in self._sources]
            self._duplicates = [occurrences(ids) for ids in self._ids]
        return self._ids, self._duplicates

    def _keep(self, keep: np.ndarray, reason: str) -> None:
        left = int((~keep).sum())
        if left:
            self.left_out[reason] = self.left_out.get(reason, 0) + left
            self.where = self.where[:, keep]


def in_blocks(
    sources: Sequence[Source],
    where: np.ndarray,
    carriers: Sequence[int],
    look: Callable[[Source, np.ndarray, np.ndarray], None],
) -> None:
    """Call a function with each cache, some samples of the output, and their number there."""
    teller = first_source(where, carriers)
    for s in carriers:
        mine = np.flatnonzero(teller == s)
        for at in range(0, len(mine), BLOCK_SAMPLES):
            columns = mine[at : at + BLOCK_SAMPLES]
            look(sources[s], columns, where[s, columns].astype(np.int64))


def _packed(ids: np.ndarray) -> np.ndarray:
    """[M] 16 bytes each, of [M, 16] uint8."""
    return np.ascontiguousarray(ids).view("S16")[:, 0]
