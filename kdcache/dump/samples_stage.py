"""Who of several processes writes the samples, and what the others check."""

from __future__ import annotations

import logging
import time

import numpy as np

from kdcache.dump.ranks import Ranks
from kdcache.dump.recipe_tokenizers import max_tokens, trained_tokenizers
from kdcache.dump.same_samples import check_corpus, check_recipe
from kdcache.dump.samples import SampleWriter, check_copies
from kdcache.dump.teachers.in_turn import Teachers
from kdcache.dump.tokenize import Tokenizer
from kdcache.dump.watch import Watch
from kdcache.errors import IdentityError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.stores.claims import POLL_SECONDS
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import CorpusSection, Recipe
from kdcache.text.corpus import read_corpus

logger = logging.getLogger(__name__)


class SamplesStage:
    """Stage one: some process writes the samples, the others wait for them and check."""

    def __init__(
        self,
        writer: CacheWriter,
        recipe: Recipe,
        corpus: CorpusSection,
        teachers: Teachers,
        watch: Watch,
        processes: int,
    ) -> None:
        self._writer, self._recipe, self._corpus = writer, recipe, corpus
        self._teachers, self._watch = teachers, watch
        self._processes = processes
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
        tokenizers |= trained_tokenizers(self._recipe.dump, self._corpus)
        check_copies(self._corpus, self._recipe.dump.streams, tokenizers)
        limit = max_tokens(self._recipe.dump, self._teachers, tokenizers)
        samples = SampleWriter(self._writer, self._recipe, self._corpus, tokenizers, limit)
        samples.run(num_rows, self._watch.stopping, only, self._processes)

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
