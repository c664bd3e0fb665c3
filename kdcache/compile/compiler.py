"""The whole of `kdcache compile`: caches to one cache, without a teacher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.compile.compatible import (
    PlannedSignal,
    check_manifests,
    planned_signals,
    require_signal,
)
from kdcache.compile.history import check_lineage, lineage_of
from kdcache.compile.labels import SignalOutput, encoded_record, output_record, summary_of
from kdcache.compile.options import CompileOptions
from kdcache.compile.overlaps import check_overlaps, num_overlaps
from kdcache.compile.planning import Plan, make_plan
from kdcache.compile.samples import SamplesOutput
from kdcache.compile.source import Source
from kdcache.errors import RecipeError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import RESERVED, SAMPLES, Lineage
from kdcache.formats.writer import CacheWriter
from kdcache.progress import progress

#: Steps of making a plan.
_PLAN_STEPS = 4


def compile_caches(
    sources: Sequence[str | Path], out: str | Path, options: CompileOptions | None = None
) -> dict[str, Any]:
    """Make one cache of others: merge or mix, select, choose targets, re-encode, reshard.

    Shards that are committed are skipped, so an interrupted compilation goes on where it was.

    Args:
        sources: directories or URLs of finished caches.
        out: directory or URL of the new cache.
        options: what is done; without it the caches are merged, or the one is copied.

    Returns:
        cache, sources, samples, left_out (reason to samples), shards, tokens (per stream), bytes
        (data files), signals (name to kind, labels, bytes, shards_written, shards_skipped), and
        dropped_signals (of the caches, not in the output).

    Raises:
        RecipeError: the options cannot be applied to these caches.
        FormatError: a cache is unfinished or damaged.
        IdentityError: the caches do not fit together, or the output was begun in another way.
        StorageError: a store refused.
    """
    options = options or CompileOptions()
    if not sources:
        raise RecipeError("compile: no cache is given; name at least one")
    for path in sources:
        _refuse_same(path, out)
    options.check(len(sources))
    opened = [Source(open_cache(path), number) for number, path in enumerate(sources)]
    check_manifests(opened)
    signals = planned_signals(opened, options)
    _check_names(signals, options)
    lineage = lineage_of(opened, signals, options)
    with CacheWriter(out) as writer:
        if writer.manifest is not None:
            check_lineage(writer.manifest.lineage, lineage, str(writer.path))
        with progress(_PLAN_STEPS, "plan", "step") as bar:
            plan = make_plan(opened, signals, options, bar)
        overlaps = num_overlaps(plan) if options.mix is None else 0
        if overlaps:
            with progress(overlaps, "compare", "sample") as bar:
                check_overlaps(opened, plan, signals, bar)
        _write_samples(writer, opened, plan, lineage)
        written = _write_signals(writer, opened, plan, signals, options)
    return _summary(open_cache(out), opened, plan, signals, written)


def _refuse_same(source: str | Path, out: str | Path) -> None:
    """An output that is one of the caches would be read while it is written."""
    places = [str(location).removeprefix("file://").rstrip("/") for location in (source, out)]
    places = [place if "://" in place else os.path.realpath(place) for place in places]
    if places[0] == places[1]:
        raise RecipeError(f"{out}: the output is one of the caches; choose another output")


def _check_names(signals: Sequence[PlannedSignal], options: CompileOptions) -> None:
    """What is re-encoded or renamed must be in the output, and names must stay apart."""
    names = {signal.name for signal in signals}
    for what, given in (("codec", options.codecs), ("rename", options.rename)):
        for name in given:
            if name not in names:
                raise RecipeError(
                    f"{what}: no signal {name!r} in the output; it has {sorted(names)}"
                )
    final = [options.rename.get(name, name) for name in sorted(names)]
    twice = [name for name in final if final.count(name) > 1]
    if twice:
        raise RecipeError(f"rename: two signals would be called {twice[0]!r}; keep names apart")
    taken = sorted(set(final) & RESERVED)
    if taken:
        raise RecipeError(f"rename: {taken[0]!r} is a name of the format; choose another")
    codecs = options.parsed_codecs
    for signal in signals:
        if signal.name in codecs:
            encoded_record(signal.record, codecs[signal.name])


def _write_samples(
    writer: CacheWriter, sources: Sequence[Source], plan: Plan, lineage: Lineage
) -> None:
    """Write the samples, or find that they stand."""

    def written() -> bool:
        manifest = writer.reread()
        return manifest is not None and writer.committed(SAMPLES) >= set(range(len(plan.shards)))

    claim = None if written() else writer.wait(SAMPLES, until=written)
    try:
        if claim is not None and not written():
            beams = [] if plan.targets is None else _carriers(sources, plan.targets.beams)
            with progress(plan.num_samples, "samples", "sample") as bar:
                SamplesOutput(writer, sources, plan, beams).run(lineage, bar)
    finally:
        if claim is not None:
            writer.release(claim, SAMPLES)
    assert writer.manifest is not None
    check_lineage(writer.manifest.lineage, lineage, str(writer.path))


def _carriers(sources: Sequence[Source], name: str) -> list[int]:
    return require_signal(sources, name, "targets")


def _write_signals(
    writer: CacheWriter,
    sources: Sequence[Source],
    plan: Plan,
    signals: Sequence[PlannedSignal],
    options: CompileOptions,
) -> dict[str, dict[str, int]]:
    """Write all signals; name in the output to what was done."""
    assert writer.manifest is not None
    codecs, written = options.parsed_codecs, {}
    for signal in signals:
        codec = codecs.get(signal.name)
        record = output_record(signal, writer.manifest, codec, options.rename)
        cache = open_cache(writer.path)  # with the signals written so far
        output = SignalOutput(writer, sources, plan, signal, codec)
        with progress(plan.num_samples, f"{record.kind} ({record.name})", "sample") as bar:
            written[record.name] = output.run(record, cache, bar)
    return written


def _summary(
    cache: Cache,
    sources: Sequence[Source],
    plan: Plan,
    signals: Sequence[PlannedSignal],
    written: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """What a compilation reports, read from the records."""
    kept = {signal.name for signal in signals}
    had = {name for source in sources for name in source.cache.signals}
    found = {name: {**summary_of(cache, name), **counts} for name, counts in written.items()}
    commits = [cache.commit_record(SAMPLES, shard) for shard in range(cache.num_shards)]
    samples_bytes = sum(f.bytes for c in commits for part in c.parts for f in part.files)
    return {
        "cache": str(cache.path),
        "sources": [source.name for source in sources],
        "samples": cache.num_samples,
        "left_out": plan.left_out,
        "shards": cache.num_shards,
        "tokens": {name: stream.num_tokens for name, stream in cache.manifest.streams.items()},
        "bytes": samples_bytes + sum(signal["bytes"] for signal in found.values()),
        "signals": found,
        "dropped_signals": sorted(had - kept),
    }
