"""The tokenizers that a recipe names, loaded or trained, and how much they may give."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice

from kdcache.dump.teachers.in_turn import Teachers
from kdcache.dump.tokenize import Tokenizer, train_sentencepiece
from kdcache.dump.wordpiece import train_wordpiece
from kdcache.errors import RecipeError
from kdcache.recipe import (
    CorpusSection,
    DumpSection,
    PretrainedTokenizer,
    Recipe,
    SentencePieceTokenizer,
    WordPieceTokenizer,
)
from kdcache.text.corpus import read_corpus

logger = logging.getLogger(__name__)


def recipe_tokenizers(recipe: Recipe, corpus: CorpusSection) -> dict[str, Tokenizer]:
    """The tokenizers of a recipe by name, loaded or trained.

    Args:
        recipe: its dump section is used.
        corpus: what some of them are trained on.
    """
    return pretrained_tokenizers(recipe.dump) | trained_tokenizers(recipe.dump, corpus)


def _used(section: DumpSection) -> set[str]:
    """Names of the tokenizers that a stream uses; others are not loaded."""
    return {stream.tokenizer for stream in section.streams.values()}


def pretrained_tokenizers(section: DumpSection) -> dict[str, Tokenizer]:
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


def trained_tokenizers(section: DumpSection, corpus: CorpusSection) -> dict[str, Tokenizer]:
    """Train the tokenizers that come from the corpus."""
    trained = {}
    for name in sorted(_used(section)):
        tokenizer = section.tokenizers[name]
        if isinstance(tokenizer, WordPieceTokenizer):
            logger.info("training WordPiece %r, %d pieces", name, tokenizer.vocab_size)
            trained[name] = train_wordpiece(_sentences(corpus, tokenizer), tokenizer, name)
        if isinstance(tokenizer, SentencePieceTokenizer):
            logger.info("training SentencePiece %r, %d pieces", name, tokenizer.vocab_size)
            trained[name] = train_sentencepiece(_sentences(corpus, tokenizer), tokenizer, name)
    return trained


def _sentences(
    corpus: CorpusSection, tokenizer: SentencePieceTokenizer | WordPieceTokenizer
) -> Iterator[str]:
    """Lines to train on: one field after another, the first `max_sentences` of each."""
    for field in tokenizer.fields:
        rows = read_corpus(corpus.without_copies)
        texts = (text for batch in rows for text in batch.fields[field])
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
