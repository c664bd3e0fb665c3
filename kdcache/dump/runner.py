"""The whole of `kdcache dump`: check the inputs, write the samples, then every signal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.corpus import read_corpus
from kdcache.dump.checks import check_inputs, check_later, check_signal, check_streams
from kdcache.dump.ranks import Ranks
from kdcache.dump.samples import SampleWriter, check_corpus, check_recipe, check_templates
from kdcache.dump.shards import dump_signal
from kdcache.dump.signals.encoder import Request
from kdcache.dump.signals.kinds import ENCODERS, in_order
from kdcache.dump.stopping import Stopping
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.loading import load_teacher, teacher_positions
from kdcache.dump.tokenize import Tokenizer, train_sentencepiece
from kdcache.dump.watch import Watch
from kdcache.errors import IdentityError, RecipeError, StoppedError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.claims import POLL_SECONDS
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.units import MAIN_COLUMN
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import (
    CorpusSection,
    DumpSection,
    PretrainedTokenizer,
    Recipe,
    SentencePieceTokenizer,
    TeacherSection,
)

logger = logging.getLogger(__name__)

DumpSummary = dict[str, Any]


def dump(
    recipe: Recipe,
    out: str | Path,
    only: np.ndarray | None = None,
    ranks: Ranks | None = None,
) -> DumpSummary:
    """Write a cache, or finish or extend the one that stands.

    Shards that are committed are skipped. Signals that the cache has and the recipe does not
    name are left alone.

    Args:
        recipe: its corpus and dump sections are used.
        out: directory or URL of the cache.
        only: numbers of the corpus rows to take, ascending, for a pilot; all without it.
        ranks: which of several processes this is; the only one without it.

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
    section, ranks = recipe.dump, ranks or Ranks()
    corpus = check_streams(recipe)
    began = time.perf_counter()
    next(read_corpus(corpus))  # a missing file should fail before anything is loaded
    with CacheWriter(out):
        pass  # so should an output that cannot be used
    check_inputs(section, out)
    order = in_order(section)
    tokenizers = _pretrained(section)
    check_templates(section.streams, tokenizers)
    teachers = Teachers(section)
    for name in order:
        if teachers.ready(name):
            check_signal(section, name, teachers.of(name), tokenizers)
        else:
            check_later(section, name, teachers.same_model(name), tokenizers)
    loaded = time.perf_counter()
    if ranks.world > 1:
        logger.info("%s: %s", out, ranks)
    with CacheWriter(out) as writer, Stopping() as stopping:
        watch = Watch(writer.store, ranks, stopping)
        try:
            _SamplesStage(writer, recipe, corpus, teachers, watch).run(tokenizers, ranks, only)
            tokenised = time.perf_counter()
            signals = {}
            for name in order:
                watch.stage("loading", signal=name)
                teacher = teachers.of(name)
                check_signal(section, name, teacher, tokenizers)
                cache = open_cache(out)  # with the signals written so far
                encoder = ENCODERS[section.signals[name].kind](
                    cache, Request(section, name, teacher)
                )
                begun = time.perf_counter()
                signals[name] = dump_signal(writer, cache, encoder, ranks, watch)
                signals[name]["seconds"] = time.perf_counter() - begun
        except StoppedError as error:
            watch.stage("stopped")
            goes_on = "the same command goes on from there"
            raise StoppedError(f"{out}: {error}: {_standing(writer, order, goes_on)}") from None
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
            others = _standing(writer, order, "others write the rest")
            logger.info("%s: %s has done its part: %s", out, ranks, others)
        return summary


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


class _SamplesStage:
    """Stage one: some process writes the samples, the others wait for them and check."""

    def __init__(
        self,
        writer: CacheWriter,
        recipe: Recipe,
        corpus: CorpusSection,
        teachers: Teachers,
        watch: Watch,
    ) -> None:
        self._writer, self._recipe, self._corpus = writer, recipe, corpus
        self._teachers, self._watch = teachers, watch
        self._told = False

    def run(self, tokenizers: dict[str, Tokenizer], ranks: Ranks, only: np.ndarray | None) -> None:
        """Write the samples, or find that the recipe's are those that stand.

        Args:
            tokenizers: by name, those that exist already; those trained here are added.
            ranks: which process this is.
            only: rows to take, for a pilot.
        """
        writer = self._writer
        if writer.manifest is None and not writer.store.exclusive and ranks.rank:
            self._wait_for_first()
        if not self._written():
            claim = writer.wait(SAMPLES, self._waiting, self._written)
            try:
                if claim is not None and not self._written():
                    self._write(tokenizers, only)
                    return
            finally:
                if claim is not None:
                    writer.release(claim, SAMPLES)
        cache = open_cache(writer.path)
        check_recipe(cache.manifest, self._recipe, writer.path)
        _check_tokenizers(cache, tokenizers)
        if not ranks.rank:  # one process that reads the whole corpus again is enough
            check_corpus(cache, self._corpus)

    def _written(self) -> bool:
        """Whether the manifest and every samples shard stand."""
        manifest = self._writer.reread()
        if manifest is None:
            return False
        return self._writer.committed(SAMPLES) >= set(range(len(manifest.shards)))

    def _write(self, tokenizers: dict[str, Tokenizer], only: np.ndarray | None) -> None:
        self._watch.stage("tokenising")
        num_rows = sum(batch.num_read for batch in read_corpus(self._corpus))
        tokenizers |= _trained(self._recipe.dump, self._corpus)
        limit = max_tokens(self._recipe.dump, self._teachers, tokenizers)
        samples = SampleWriter(self._writer, self._recipe, self._corpus, tokenizers, limit)
        samples.run(num_rows, self._watch.stopping, only)

    def _waiting(self) -> None:
        """Say once that another process is waited for, and stop where that was asked for."""
        if not self._told:
            logger.info("%s: waiting for the process that writes the samples", self._writer.path)
            self._watch.stage("waiting")
            self._told = True
        self._watch.stopping.check()

    def _wait_for_first(self) -> None:
        """Where nobody can be kept out, the first rank alone writes the samples."""
        while self._writer.reread() is None:
            self._waiting()
            time.sleep(10 * POLL_SECONDS)


class Teachers:
    """The teachers of a recipe, one in memory at a time."""

    def __init__(self, section: DumpSection) -> None:
        """Load nothing yet.

        Args:
            section: whose signals name their teachers.
        """
        self._section = section
        self._key: tuple[TeacherSection, bool] | None = None
        self._teacher: Teacher | None = None

    def ready(self, signal: str) -> bool:
        """Whether a signal needs no teacher, or the one that is loaded, or the first."""
        key = self._key_of(signal)
        return key is None or self._key in (None, key)

    def of(self, signal: str) -> Teacher | None:
        """The teacher of a signal, loaded in place of another one; None where none is needed."""
        key = self._key_of(signal)
        if key is None:
            return None
        if key != self._key:
            self._teacher = None  # before the next one takes memory
            logger.info("loading the teacher %s", key[0].label)
            self._teacher = load_teacher(key[0], needs_attention=key[1])
            self._key = key
        return self._teacher

    def same_model(self, signal: str) -> Teacher | None:
        """The teacher in memory if it is a signal's, whether loaded for attention or not."""
        key = self._key_of(signal)
        same = key is not None and self._key is not None and key[0] == self._key[0]
        return self._teacher if same else None

    def _key_of(self, signal: str) -> tuple[TeacherSection, bool] | None:
        section = self._section.teacher_of(signal)
        if section is None:
            return None
        # Attention probabilities need another implementation, which gives other float noise.
        return section, self._section.signals[signal].kind == "attention"

    def max_positions(self) -> int | None:
        """Longest input that all teachers of the recipe take; None for no limit."""
        sections = [self._section.teacher] if self._section.teacher else []
        for name in self._section.signals:
            section = self._section.teacher_of(name)
            if section is not None and section not in sections:
                sections.append(section)
        limits = [self._positions(section) for section in sections]
        return min((limit for limit in limits if limit is not None), default=None)

    def _positions(self, section: TeacherSection) -> int | None:
        if self._teacher is not None and self._key is not None and self._key[0] == section:
            return self._teacher.max_positions
        return teacher_positions(section)


def recipe_tokenizers(recipe: Recipe, corpus: CorpusSection) -> dict[str, Tokenizer]:
    """The tokenizers of a recipe by name, loaded or trained.

    Args:
        recipe: its dump section is used.
        corpus: what some of them are trained on.
    """
    return _pretrained(recipe.dump) | _trained(recipe.dump, corpus)


def _used(section: DumpSection) -> set[str]:
    """Names of the tokenizers that a stream uses; others are not loaded."""
    return {stream.tokenizer for stream in section.streams.values()}


def _pretrained(section: DumpSection) -> dict[str, Tokenizer]:
    """Load the tokenizers that exist already."""
    loaded = {}
    for name in sorted(_used(section)):
        tokenizer = section.tokenizers[name]
        if isinstance(tokenizer, PretrainedTokenizer):
            loaded[name] = Tokenizer.load(*_tokenizer_path(section, name, tokenizer))
    return loaded


def _tokenizer_path(
    section: DumpSection, name: str, tokenizer: PretrainedTokenizer
) -> tuple[str, str | None]:
    """Path and revision of a pretrained tokenizer."""
    if tokenizer.path is not None:
        return tokenizer.path, None
    if section.teacher is None:
        raise RecipeError(
            f"tokenizer {name!r} is the teacher's, and there is no teacher: set "
            f"dump.tokenizers.{name}.path or dump.teacher.path"
        )
    return section.teacher.paths[0], section.teacher.revision


def _trained(section: DumpSection, corpus: CorpusSection) -> dict[str, Tokenizer]:
    """Train the tokenizers that come from the corpus."""
    trained = {}
    for name in sorted(_used(section)):
        tokenizer = section.tokenizers[name]
        if isinstance(tokenizer, SentencePieceTokenizer):
            logger.info("training SentencePiece %r, %d pieces", name, tokenizer.vocab_size)
            trained[name] = train_sentencepiece(_sentences(corpus, tokenizer), tokenizer, name)
    return trained


def _sentences(corpus: CorpusSection, tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    """Lines to train on: one field after another, the first `max_sentences` of each."""
    for field in tokenizer.fields:
        texts = (text for batch in read_corpus(corpus) for text in batch.fields[field])
        yield from islice(texts, tokenizer.max_sentences)


def max_tokens(
    section: DumpSection, teachers: Teachers, tokenizers: dict[str, Tokenizer]
) -> int | None:
    """Longest stream of a sample: the recipe's limit, the teachers', or the tokenizers'."""
    if section.teacher is None and not section.signals:
        lengths = [tokenizer.max_length for tokenizer in tokenizers.values()]
        return section.max_tokens or min((n for n in lengths if n is not None), default=None)
    positions = teachers.max_positions()
    if section.max_tokens is None or positions is None:
        return section.max_tokens or positions
    if section.max_tokens > positions:
        raise RecipeError(
            f"dump.max_tokens is {section.max_tokens}, the teacher takes at most {positions}; "
            "leave it out or lower it"
        )
    return section.max_tokens


def _check_tokenizers(cache: Cache, tokenizers: dict[str, Tokenizer]) -> None:
    """The tokenizers of the recipe must be those of the cache."""
    for name, tokenizer in tokenizers.items():
        stands = cache.tokenizer(name)
        if stands.digest != tokenizer.digest:
            raise IdentityError(
                f"{cache.path}: tokenizer {name!r} is {stands.digest} in the cache, "
                f"{tokenizer.path} is {tokenizer.digest}: use what the cache was made with, "
                "or choose another output"
            )


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
