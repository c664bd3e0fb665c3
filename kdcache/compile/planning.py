"""The plan of a compilation: which sample of which cache stands where in the output.

Reading is shard by shard; what stays are a few numbers for each sample.

# S caches, n samples of the output
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.compile.compatible import (
    PlannedSignal,
    dropped_streams,
    replaced_stream,
    require_signal,
)
from kdcache.compile.hypotheses import choose, tokens_of
from kdcache.compile.id_list import IdList
from kdcache.compile.matching import first_source
from kdcache.compile.options import CompileOptions, Targets
from kdcache.compile.selection import Selection, in_blocks
from kdcache.compile.source import Source
from kdcache.errors import RecipeError
from kdcache.formats.plan import plan_shards


@dataclass(frozen=True)
class Plan:
    """Where every sample of the output comes from.

    Attributes:
        where: [S, n] integer, its number in each cache; ABSENT where the cache lacks it.
        chosen: [n] int32, the hypothesis that is its target; None where the targets stay.
        targets: how it was chosen.
        replaced: the stream whose tokens become those of hypotheses; None where the targets stay.
        streams: names of the streams of the output, sorted.
        shards: (start, stop) of the output's shards.
        shard_tokens: what they were cut by.
        left_out: reason to the number of samples that were left out for it.
    """

    where: np.ndarray
    chosen: np.ndarray | None
    targets: Targets | None
    replaced: str | None
    streams: list[str]
    shards: list[tuple[int, int]]
    shard_tokens: int
    left_out: dict[str, int]

    @property
    def num_samples(self) -> int:
        """Samples of the output."""
        return self.where.shape[1]


def make_plan(
    sources: Sequence[Source],
    signals: Sequence[PlannedSignal],
    options: CompileOptions,
    bar: tqdm[Any],
) -> Plan:
    """Decide which samples the output has, in which order and shards.

    Args:
        sources: the caches.
        signals: of the output.
        options: what is asked for.
        bar: advanced by one for each step.

    Raises:
        RecipeError: a filter or list cannot be applied, samples lack a signal, or none is left.
    """
    selection = Selection(sources, options)
    bar.update()
    selection.filter(options.conditions)
    bar.update()
    if options.ids is not None:
        selection.keep_listed(IdList.read(options.ids))
    selection.require_signals(signals)
    if options.fraction is not None or options.count is not None:
        selection.subset(options.fraction, options.count)
    bar.update()
    targets = options.chosen_targets
    manifest = sources[0].cache.manifest
    replaced = None if targets is None else replaced_stream(sources, targets)
    gone = set() if replaced is None else dropped_streams(manifest, replaced)
    streams = sorted(set(manifest.streams) - gone)
    fixed = selection.closest(targets) if targets and targets.choice == "reference" else None
    columns, copies = selection.copies(options.mix)
    where = selection.where[:, columns]
    if not where.shape[1]:
        raise RecipeError(f"compile: no sample is left; left out: {selection.left_out}")
    counts = _token_counts(sources, where, [name for name in streams if name != replaced])
    chosen = None
    if targets is not None:
        sampled = targets.choice == "sampled"
        chosen, lengths = _choose(
            sources,
            where,
            targets,
            selection.hashes("hypothesis", columns, copies) if sampled else None,
            None if fixed is None else fixed[columns],
        )
        counts += lengths
    bar.update()
    shard_tokens = options.shard_tokens or manifest.shard_tokens
    shards = plan_shards(counts, shard_tokens)
    return Plan(
        where=where,
        chosen=chosen,
        targets=targets,
        replaced=replaced,
        streams=streams,
        shards=shards,
        shard_tokens=shard_tokens,
        left_out=selection.left_out,
    )


def _token_counts(
    sources: Sequence[Source], where: np.ndarray, streams: Sequence[str]
) -> np.ndarray:
    """[n] int64 tokens of each sample, some streams summed."""
    counts = np.zeros(where.shape[1], dtype=np.int64)
    home = first_source(where)
    for source in sources:
        mine = np.flatnonzero(home == source.number)
        if len(mine):
            for lengths in source.lengths(streams).values():
                counts[mine] += lengths[where[source.number, mine]]
    return counts


def _choose(
    sources: Sequence[Source],
    where: np.ndarray,
    targets: Targets,
    hashes: np.ndarray | None,
    fixed: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """[n] int32 chosen hypothesis of each sample, and [n] int64 its tokens."""
    chosen = np.zeros(where.shape[1], dtype=np.int32)
    lengths = np.zeros(where.shape[1], dtype=np.int64)

    def look(source: Source, columns: np.ndarray, index: np.ndarray) -> None:
        beams = source.take_columns(targets.beams, index)
        found = choose(
            targets.choice,
            beams,
            None if hashes is None else hashes[columns],
            None if fixed is None else fixed[columns],
        )
        chosen[columns] = found
        lengths[columns] = tokens_of(beams, found.astype(np.int64)).lengths

    in_blocks(sources, where, require_signal(sources, targets.beams, "targets"), look)
    return chosen, lengths
