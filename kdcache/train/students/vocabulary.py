"""A student's ids and the cache's: the same, a prefix, a padding, or refused.

The ids of a cache name tokens of its tokenizer. A student may know fewer of them (a prefix) or
more ids besides (a padding), but an id that both have must name the same token.
"""

# B batch, S source positions, T target positions

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import Cache
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import StudentSection
from kdcache.text.tokenizers import (
    directory_files,
    has_tokenizer,
    special_ids,
    token_strings,
    tokenizer_digest,
)
from kdcache.train.batches.batch import Batch, Masked
from kdcache.train.batches.hypotheses import is_hypothesis
from kdcache.train.students.student import embedding_rows

logger = logging.getLogger(__name__)

#: A cache's own list of token strings; no file of a tokenizer.
TOKENS_FILE = "tokens.json"


def check_tokenizer(
    section: StudentSection, cache: Cache, name: str, folder: str = ""
) -> list[Path]:
    """Refuse a student whose own tokenizer gives the cache's ids other meanings.

    Args:
        section: the recipe's student.
        cache: an open cache.
        name: the tokenizer whose ids the student predicts (or reads).
        folder: of the student's directory that holds its tokenizer.

    Returns:
        Files of the student's own tokenizer; none where it is built from a config, or has none.

    Raises:
        IdentityError: its tokenizer is neither the cache's, nor a prefix or a padding of it.
        ModelError: transformers cannot load its tokenizer.
    """
    if section.path is None:
        return []
    path = Path(section.path).expanduser() / folder
    if not has_tokenizer(path):
        logger.info(
            "%s: no tokenizer beside the student; only the number of its ids is checked", path
        )
        return []
    backend = load_tokenizer(path)
    files = directory_files(backend, path)
    record, digest = cache.tokenizer(name), tokenizer_digest(backend, files)
    if digest != record.digest:
        own, theirs = token_strings(backend), cache.tokens(name)
        if difference := _difference(backend, own, cache, name, theirs):
            raise IdentityError(
                f"{path}: the student's tokenizer (digest {digest}) is neither a prefix nor a "
                f"padding of the cache's {name!r} (digest {record.digest}): {difference}; use a "
                "student of the cache's tokenizer, or dump with the student's"
            )
        logger.info(
            "%s: the student's tokenizer (digest %s, %d ids) names the shared ids as the cache's "
            "%r does (digest %s, %d ids)",
            *(path, digest, len(own), name, record.digest, len(theirs)),
        )
    return [path / file for file in files]


def _difference(
    backend: Any, own: Sequence[str], cache: Cache, name: str, theirs: Sequence[str]
) -> str | None:
    """What an id means to the student and what in the cache, where that is not the same."""
    if getattr(backend, "separate_vocabs", False):
        return "it has two vocabularies, which must be equal"
    # What is no Unicode was replaced when the cache's list was written.
    own = [token.encode("utf-8", "replace").decode() for token in own]
    for number, (here, there) in enumerate(zip(own, theirs, strict=False)):
        if here != there and there:  # an id that names nothing is in no text
            return f"id {number} is {here!r} there and {there!r} in the cache"
    record = cache.tokenizer(name)
    for role, mine in special_ids(backend).items():
        its: int | None = getattr(record, role)
        if mine is not None and its is not None and mine != its and its < len(own):
            return f"{role} is {mine} there and {its} in the cache"
    return None


@dataclass(frozen=True)
class KnownIds:
    """How many ids of each stream a student has rows for; None where it has all.

    Attributes:
        cache: the cache, for names of tokens.
        source: name of the stream that the encoder reads.
        target: name of the stream that is predicted.
        source_rows: of the encoder's embedding.
        target_rows: of the decoder's embedding and the output projection.
    """

    cache: Cache
    source: str
    target: str
    source_rows: int | None
    target_rows: int | None

    @classmethod
    def of(cls, model: Any, cache: Cache, source: str, target: str, all_needed: bool) -> KnownIds:
        """Those of a student that is to read and predict two streams of a cache.

        Args:
            model: the student.
            cache: an open cache.
            source: name of the stream that its encoder reads.
            target: name of the stream that it predicts.
            all_needed: whether it must have rows for all: nothing says what its ids mean.

        Raises:
            ModelError: it needs them and has not.
        """
        rows: list[int | None] = []
        for found, stream in zip(embedding_rows(model), (source, target), strict=True):
            num_ids = cache.stream(stream).vocab_size
            rows.append(None if found >= num_ids else found)
            if found < num_ids and all_needed:
                raise ModelError(
                    f"student: {found} rows for the ids of stream {stream!r}, which has {num_ids} "
                    "ids; use a student of the same tokenizer, or put its own beside it to show "
                    "that its ids are the first of them"
                )
            if found < num_ids:
                logger.info(
                    "student: has the first %d of the %d ids of stream %r; batches are checked",
                    *(found, num_ids, stream),
                )
        return cls(cache, source, target, *rows)

    @property
    def all_known(self) -> bool:
        """Whether the student has a row for every id of both streams."""
        return self.source_rows is None and self.target_rows is None

    def checked(self, batch: Batch) -> Batch:
        """A batch whose every id has a row; padding is put on one.

        Args:
            batch: on the host.

        Raises:
            ModelError: a token has no row; its sample is named.
        """
        streams = dict(batch.streams)
        limits = [(self.source, self.source_rows), (self.target, self.target_rows)]
        limits += [(name, self.target_rows) for name in streams if is_hypothesis(name)]
        for name, rows in limits:
            if rows is not None:
                streams[name] = replace(streams[name], ids=self._fitted(batch, name, rows))
        if self.source_rows is not None:
            self._check_masked(batch, self.source_rows)
        return replace(batch, streams=streams)

    def _check_masked(self, batch: Batch, rows: int) -> None:
        """Refuse ids that masks put into the source and that have no row."""
        for name, masked in batch.signals.items():
            largest = int(masked.ids.max()) if isinstance(masked, Masked) and len(masked.ids) else 0
            if largest >= rows:
                raise ModelError(
                    f"student: has {rows} ids, and masks signal {name!r} puts id {largest} into "
                    f"stream {self.source!r}; use a student with more ids "
                    f"({self.cache.stream(self.source).vocab_size} are in the tokenizer)"
                )

    def _fitted(self, batch: Batch, stream: str, rows: int) -> Tensor:
        """The [B, L] ids of a stream, with id 0 outside the mask."""
        ids, mask = batch.streams[stream].ids, batch.streams[stream].mask
        over = mask & (ids >= rows)
        if over.any():
            sample, position = (int(i) for i in over.nonzero()[0])
            found = int(ids[sample, position])
            known = self.cache.stream(self.source if stream == self.source else self.target)
            token = self.cache.tokens(known.tokenizer)[found]
            raise ModelError(
                f"student: has {rows} ids, and stream {stream!r} has id {found} ({token!r}) at "
                f"token {position} of corpus row {int(batch.rows[sample])}: use a student with "
                f"more ids ({known.vocab_size} are in the tokenizer), or dump "
                "text without that token"
            )
        return torch.where(mask, ids, 0)


def tokenizer_files(cache: Cache, ids: KnownIds, own: Sequence[Path]) -> list[Path]:
    """Files of the tokenizer that goes with a student.

    Args:
        cache: an open cache.
        ids: that the student has.
        own: from `check_tokenizer`.

    Returns:
        The cache's; but the student's own where it has not all of the cache's ids.
    """
    if own and not ids.all_known:
        return list(own)
    return cache_tokenizer_files(cache, cache.stream(ids.target).tokenizer)


def cache_tokenizer_files(cache: Cache, name: str) -> list[Path]:
    """Files of a tokenizer of a cache, as transformers loads it.

    Args:
        cache: an open cache.
        name: of the tokenizer.
    """
    folder, record = cache.tokenizer_dir(name), cache.tokenizer(name)
    names = sorted(file.path.rsplit("/", 1)[-1] for file in record.files)
    return [folder / name for name in names if name != TOKENS_FILE]
