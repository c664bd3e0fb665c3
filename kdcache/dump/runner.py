"""The whole of `kdcache dump`: check the inputs, write the samples, then every signal."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.dump.checks import check_inputs, check_later, check_signal, check_streams
from kdcache.dump.ranks import Ranks
from kdcache.dump.recipe_tokenizers import pretrained_tokenizers
from kdcache.dump.samples import check_copies, check_templates
from kdcache.dump.samples_stage import SamplesStage
from kdcache.dump.shards import dump_signal
from kdcache.dump.signals.encoder import Request
from kdcache.dump.signals.kinds import ENCODERS, in_order
from kdcache.dump.stopping import Stopping
from kdcache.dump.teachers.in_turn import Teachers
from kdcache.dump.watch import Watch
from kdcache.errors import StoppedError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.units import MAIN_COLUMN
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import (
    Recipe,
)
from kdcache.text.corpus import read_corpus

logger = logging.getLogger(__name__)

DumpSummary = dict[str, Any]


def dump(
    recipe: Recipe,
    out: str | Path,
    only: np.ndarray | None = None,
    ranks: Ranks | None = None,
    processes: int = 1,
) -> DumpSummary:
    """Write a cache, or finish or extend the one that stands.

    Shards that are committed are skipped. Signals that the cache has and the recipe does not
    name are left alone.

    Args:
        recipe: its corpus and dump sections are used.
        out: directory or URL of the cache.
        only: numbers of the corpus rows to take, ascending, for a pilot; all without it.
        ranks: which of several processes this is; the only one without it.
        processes: that tokenise a large corpus, where this process writes the samples.

    Returns:
        cache, samples, rows, dropped, shards, tokens (per stream), bytes (data files), rank, world,
        complete (whether every shard of every signal is committed), signals (name to kind, labels,
        bytes, bytes_per_token, entries_per_token, shards_written, shards_skipped,
        shards_elsewhere, labels_written, seconds), and seconds (load, tokenise, teacher, total).
        Bytes and labels are those of this process's shards.

    Raises:
        RecipeError: the recipe cannot be dumped.
        CorpusError: the corpus is wrong; nothing was written that counts.
        ModelError: a teacher or tokenizer cannot be loaded or used.
        IdentityError: the cache that stands was made of something else.
        StorageError: the store refused, or the output holds something else.
        StoppedError: the process got a SIGTERM; the message says where it goes on.
    """
    ranks, began = ranks or Ranks(), time.perf_counter()
    with Stopping() as stopping:
        inputs = _Inputs(recipe, out)
        loaded = time.perf_counter()
        if stopping.requested:
            raise StoppedError(
                f"{out}: stopped by SIGTERM: nothing was written yet; the same command goes on"
            )
        if ranks.world > 1:
            logger.info("%s: %s", out, ranks)
        with CacheWriter(out) as writer:
            watch = Watch(writer.store, ranks, stopping)
            try:
                inputs.samples_stage(writer, watch, processes).run(inputs.tokenizers, ranks, only)
                tokenised = time.perf_counter()
                signals = {n: inputs.dump_signal(n, writer, ranks, watch) for n in inputs.order}
            except StoppedError as error:
                watch.stage("stopped")
                standing = _standing(writer, inputs.order, "the same command goes on from there")
                raise StoppedError(f"{out}: {error}: {standing}") from None
            except BaseException:
                watch.stage("failed")
                raise
            ended = time.perf_counter()
            seconds = {
                "load": loaded - began,
                "tokenise": tokenised - loaded,
                "teacher": ended - tokenised,
                "total": ended - began,
            }
            summary = _summary(open_cache(out), signals, seconds, ranks)
            watch.stage("done", complete=summary["complete"])
            if not summary["complete"]:
                others = _standing(writer, inputs.order, "others write the rest")
                logger.info("%s: %s has done its part: %s", out, ranks, others)
            return summary


class _Inputs:
    """What a recipe names, loaded and checked before anything is written."""

    def __init__(self, recipe: Recipe, out: str | Path) -> None:
        self.recipe, self.out = recipe, out
        self.corpus = check_streams(recipe.single())
        section = recipe.dump
        next(read_corpus(self.corpus))  # a missing file should fail before anything is loaded
        with CacheWriter(out):
            pass  # so should an output that cannot be used
        check_inputs(section, out)
        self.order = in_order(section)
        self.tokenizers = pretrained_tokenizers(section)
        check_templates(section.streams, self.tokenizers)
        check_copies(self.corpus, section.streams, self.tokenizers)
        self.teachers = Teachers(section)
        for name in self.order:
            if self.teachers.ready(name):
                check_signal(section, name, self.teachers.of(name), self.tokenizers)
            else:
                check_later(section, name, self.teachers.same_model(name), self.tokenizers)

    def samples_stage(self, writer: CacheWriter, watch: Watch, processes: int) -> SamplesStage:
        """The writing of the samples, not begun."""
        return SamplesStage(writer, self.recipe, self.corpus, self.teachers, watch, processes)

    def dump_signal(
        self, name: str, writer: CacheWriter, ranks: Ranks, watch: Watch
    ) -> dict[str, Any]:
        """Write one signal, with its teacher."""
        section = self.recipe.dump
        watch.stage("loading", signal=name)
        teacher = self.teachers.of(name)
        check_signal(section, name, teacher, self.tokenizers)
        cache = open_cache(self.out)  # with the signals written so far
        encoder = ENCODERS[section.signals[name].kind](cache, Request(section, name, teacher))
        begun = time.perf_counter()
        written = dump_signal(writer, cache, encoder, ranks, watch)
        return written | {"seconds": time.perf_counter() - begun}


def _standing(writer: CacheWriter, order: list[str], after: str) -> str:
    """What is committed.

    Args:
        writer: the cache.
        order: of the signals.
        after: what to say of it.
    """
    manifest = writer.reread()
    if manifest is None:
        return "no samples are committed yet; the same command begins again"
    shards = len(manifest.shards)
    done = [f"{len(writer.committed(name))} of {shards} shards of {name!r}" for name in order]
    return f"{', '.join(done) or 'all samples'} are committed; {after}"


def _summary(
    cache: Cache, signals: dict[str, dict[str, Any]], seconds: dict[str, float], ranks: Ranks
) -> DumpSummary:
    """What a dump reports, read from the records."""
    manifest = cache.manifest
    own = set(ranks.own(cache.num_shards))
    total_bytes = _size(cache, SAMPLES, own)[0]
    for name, summary in signals.items():
        data_bytes, labels, entries = _size(cache, name, own)
        total_bytes += data_bytes
        record = cache.signal(name)
        # Soft labels are counted one by one, all else by the tokens of its stream.
        share = sum(manifest.shards[n].tokens for n in own) / sum(s.tokens for s in manifest.shards)
        stream_tokens = round(share * cache.stream(record.stream).num_tokens)
        tokens = labels if record.kind == "logits" else stream_tokens
        summary |= {
            "kind": record.kind,
            "labels": labels,
            "bytes": data_bytes,
            "bytes_per_token": data_bytes / max(1, tokens),
            "entries_per_token": {
                column: count / max(1, tokens)
                for column, count in entries.items()
                if column != MAIN_COLUMN[record.kind]
            },
        }
    return {
        "cache": cache.path,
        "samples": cache.num_samples,
        "rows": manifest.corpus.num_rows,
        "dropped": dict(manifest.corpus.dropped),
        "shards": cache.num_shards,
        "tokens": {name: stream.num_tokens for name, stream in manifest.streams.items()},
        "bytes": total_bytes,
        "rank": ranks.rank,
        "world": ranks.world,
        "complete": all(cache.complete(name) for name in signals),
        "signals": signals,
        "seconds": seconds,
    }


def _size(cache: Cache, signal: str, shards: set[int]) -> tuple[int, int, dict[str, int]]:
    """Bytes, tokens and entries of those shards of a signal that are committed."""
    data_bytes = tokens = 0
    entries: dict[str, int] = {}
    for shard in sorted(cache.committed(signal) & shards):
        commit = cache.commit_record(signal, shard)
        data_bytes += sum(file.bytes for part in commit.parts for file in part.files)
        tokens += commit.tokens
        for column, count in commit.entries.items():
            entries[column] = entries.get(column, 0) + count
    return data_bytes, tokens, entries
