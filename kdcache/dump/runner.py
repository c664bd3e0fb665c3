"""The whole of `kdcache dump`: check the inputs, write the samples, then every signal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kdcache.corpus import read_corpus
from kdcache.dump.logits import dump_logits
from kdcache.dump.samples import SampleWriter, check_corpus, check_recipe
from kdcache.dump.teacher import Teacher, teacher_positions
from kdcache.dump.tokenize import Tokenizer, train_sentencepiece
from kdcache.errors import IdentityError, ModelError, RecipeError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import MANIFEST_NAME, SAMPLES
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


def dump(recipe: Recipe, out: str | Path) -> DumpSummary:
    """Write a cache, or finish or extend the one that stands.

    Shards that are committed are skipped. Signals that the cache has and the recipe does not
    name are left alone.

    Args:
        recipe: its corpus and dump sections are used.
        out: directory of the cache.

    Returns:
        cache, samples, rows, dropped, shards, tokens (per stream), bytes (data files), signals
        (name to tokens, bytes, bytes_per_token, entries_per_token, shards_written,
        shards_skipped), and seconds (load, tokenise, teacher, total).

    Raises:
        RecipeError: the recipe cannot be dumped.
        CorpusError: the corpus is wrong; nothing was written that counts.
        ModelError: a teacher or tokenizer cannot be loaded or used.
        IdentityError: the cache that stands was made of something else.
        StorageError: the disk refused, or the output holds something else.
    """
    out = Path(out)
    corpus = _checked_corpus(recipe)
    began = time.perf_counter()
    next(read_corpus(corpus))  # a missing file should fail before anything is loaded
    if out.exists():
        with CacheWriter(out):
            pass  # so should an output that cannot be used
    teacher = _load_teacher(recipe.dump)
    tokenizers = _pretrained(recipe.dump)
    if teacher is not None:
        _check_vocabulary(recipe.dump, teacher, tokenizers)
    loaded = time.perf_counter()
    num_rows = 0
    if not (out / MANIFEST_NAME).exists():
        num_rows = sum(batch.num_read for batch in read_corpus(corpus))
        tokenizers |= _trained(recipe.dump, corpus)
    with CacheWriter(out) as writer:
        if writer.manifest is None:
            limit = _max_tokens(recipe.dump, teacher, tokenizers)
            SampleWriter(writer, recipe, corpus, tokenizers, limit).run(num_rows)
            cache = open_cache(out)
        else:
            cache = open_cache(out)
            check_recipe(cache.manifest, recipe, out)
            _check_tokenizers(cache, tokenizers)
            check_corpus(cache, corpus)
        tokenised = time.perf_counter()
        signals = {}
        for name in recipe.dump.signals:
            assert teacher is not None, "signals were checked to have a teacher"
            signals[name] = dump_logits(writer, cache, recipe.dump, name, teacher)
    ended = time.perf_counter()
    seconds = {
        "load": loaded - began,
        "tokenise": tokenised - loaded,
        "teacher": ended - tokenised,
        "total": ended - began,
    }
    return _summary(open_cache(out), signals, seconds)


def _checked_corpus(recipe: Recipe) -> CorpusSection:
    """What can be known from the recipe alone."""
    corpus, section = recipe.corpus, recipe.dump
    if corpus is None:
        raise RecipeError("a dump needs a corpus: set corpus.fields (and corpus.format)")
    for name, stream in section.streams.items():
        if stream.field not in corpus.fields:
            raise RecipeError(
                f"dump.streams.{name}.field is {stream.field!r}; corpus.fields has "
                f"{sorted(corpus.fields)}"
            )
    for name, tokenizer in section.tokenizers.items():
        if isinstance(tokenizer, SentencePieceTokenizer):
            unknown = sorted(set(tokenizer.fields) - set(corpus.fields))
            if unknown:
                raise RecipeError(
                    f"dump.tokenizers.{name}.fields has {unknown[0]!r}; corpus.fields has "
                    f"{sorted(corpus.fields)}"
                )
    if section.signals and section.teacher is None:
        raise RecipeError("signals need a teacher: set dump.teacher.path")
    if not section.streams:
        raise RecipeError("a dump needs at least one stream: set dump.streams")
    return corpus


def _load_teacher(section: DumpSection) -> Teacher | None:
    """The teacher, where a signal needs it."""
    if not section.signals or section.teacher is None:
        return None
    logger.info("loading the teacher %s", section.teacher.path)
    return Teacher.load(section.teacher)


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
    return section.teacher.path, section.teacher.revision


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


def _max_tokens(
    section: DumpSection, teacher: Teacher | None, tokenizers: dict[str, Tokenizer]
) -> int | None:
    """Longest stream of a sample: the recipe's limit, the teacher's, or the tokenizers'."""
    if teacher is not None:
        positions = teacher.max_positions
    elif section.teacher is not None:
        positions = teacher_positions(section.teacher)
    else:
        lengths = [tokenizer.max_length for tokenizer in tokenizers.values()]
        return section.max_tokens or min((n for n in lengths if n is not None), default=None)
    if section.max_tokens is None or positions is None:
        return section.max_tokens or positions
    if section.max_tokens > positions:
        raise RecipeError(
            f"dump.max_tokens is {section.max_tokens}, the teacher takes at most {positions}; "
            "leave it out or lower it"
        )
    return section.max_tokens


def _check_vocabulary(
    section: DumpSection, teacher: Teacher, tokenizers: dict[str, Tokenizer]
) -> None:
    """A signal's streams must be in the teacher's own ids."""
    assert section.teacher is not None, "a teacher is loaded only where the recipe has one"
    own: Tokenizer | None = None
    for signal, logits in section.signals.items():
        for stream in (logits.source, logits.stream):
            name = section.streams[stream].tokenizer
            if name not in tokenizers:
                raise RecipeError(
                    f"signals.{signal} reads stream {stream!r}, whose tokenizer {name!r} is "
                    "trained on the corpus; the teacher needs its own tokenizer there"
                )
            tokenizer = tokenizers[name]
            if tokenizer.vocab_size > teacher.vocab_size:
                raise ModelError(
                    f"{section.teacher.path}: its output has {teacher.vocab_size} ids, the "
                    f"tokenizer {tokenizer.path} has {tokenizer.vocab_size}; use the "
                    "teacher's own tokenizer"
                )
            if tokenizer.path != section.teacher.path:
                own = own or _own_tokenizer(section.teacher)
                if own is not None and own.digest != tokenizer.digest:
                    raise IdentityError(
                        f"signals.{signal}: stream {stream!r} uses the tokenizer "
                        f"{tokenizer.path} ({tokenizer.digest}), the teacher has its own "
                        f"({own.digest}); leave out dump.tokenizers.{name}.path"
                    )


def _own_tokenizer(section: TeacherSection) -> Tokenizer | None:
    """The tokenizer in the teacher's directory, if there is one."""
    try:
        return Tokenizer.load(section.path, section.revision)
    except ModelError:
        logger.warning("%s has no tokenizer to compare with", section.path)
        return None


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
    cache: Cache, signals: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> DumpSummary:
    """What a dump reports, read from the records."""
    manifest = cache.manifest
    total_bytes = _size(cache, SAMPLES)[0]
    for name, summary in signals.items():
        data_bytes, tokens, entries = _size(cache, name)
        total_bytes += data_bytes
        summary["tokens_written"] = summary.pop("tokens")
        summary["tokens"] = tokens
        summary["bytes"] = data_bytes
        summary["bytes_per_token"] = data_bytes / max(1, tokens)
        summary["entries_per_token"] = {
            column: count / max(1, tokens)
            for column, count in entries.items()
            if column != "tokens"
        }
    return {
        "cache": str(cache.path),
        "samples": cache.num_samples,
        "rows": manifest.corpus.num_rows,
        "dropped": dict(manifest.corpus.dropped),
        "shards": cache.num_shards,
        "tokens": {name: stream.num_tokens for name, stream in manifest.streams.items()},
        "bytes": total_bytes,
        "signals": signals,
        "seconds": seconds,
    }


def _size(cache: Cache, signal: str) -> tuple[int, int, dict[str, int]]:
    """Bytes, tokens and entries of every shard of a signal."""
    data_bytes = tokens = 0
    entries: dict[str, int] = {}
    for shard in sorted(cache.committed(signal)):
        commit = cache.commit_record(signal, shard)
        data_bytes += sum(part.file.bytes for part in commit.parts)
        tokens += commit.tokens
        for column, count in commit.entries.items():
            entries[column] = entries.get(column, 0) + count
    return data_bytes, tokens, entries
