"""The masks signal: which tokens are masked, and what stands in their place. It has no teacher."""

# F items, M samples, B rows of a batch, R replicas

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kdcache.dump.signals.encoder import Columns, Request, SignalEncoder, common_fields
from kdcache.dump.signals.items import Items, sample_items
from kdcache.formats.cache import Cache
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import MasksRecord
from kdcache.formats.units import MAIN_COLUMN
from kdcache.recipe import MasksSignal
from kdcache.text.masking import MaskVocabulary, draw_masks, no_mask_token, scheme_of


class MasksEncoder(SignalEncoder):
    """R maskings of every sample. A tokenizer's strings in the cache are all that is needed."""

    main = MAIN_COLUMN["masks"]
    record: MasksRecord

    def __init__(self, cache: Cache, request: Request) -> None:
        super().__init__(cache, request)
        signal, name = request.signal, request.name
        assert isinstance(signal, MasksSignal), "the runner chooses by kind"
        tokenizer_name = cache.stream(signal.stream).tokenizer
        tokenizer = cache.tokenizer(tokenizer_name)
        self._vocabulary = MaskVocabulary.of(
            cache.tokens(tokenizer_name),
            tokenizer.special_ids,
            tokenizer.mask_id,
            f"{cache.path}: signals.{name}: tokenizer {tokenizer_name!r} of stream "
            f"{signal.stream!r}",
        )
        self._scheme = scheme_of(signal)
        self.record = MasksRecord(
            **common_fields(cache, request),
            scheme=signal.scheme,
            replicas=signal.replicas,
            vocab_size=tokenizer.vocab_size,
            mask_id=self._vocabulary.mask_id,
            parameters=self._scheme.parameters(),
        )

    @classmethod
    def check(cls, request: Request) -> None:
        """The stream's tokenizer must have a mask token, or be trained with one."""
        name = request.name
        stream = request.signal.stream
        tokenizer_name = request.section.streams[stream].tokenizer
        tokenizer = request.tokenizers.get(tokenizer_name)
        planned = request.section.tokenizers[tokenizer_name]
        if tokenizer is None and getattr(planned, "mask", False):
            return  # it is trained with one
        if tokenizer is None or tokenizer.mask_id is None:
            path = "trained on the corpus" if tokenizer is None else tokenizer.path
            raise no_mask_token(
                f"signals.{name}: the tokenizer {tokenizer_name!r} ({path}) of stream {stream!r}"
            )

    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """The samples."""
        self._samples = samples
        return sample_items(samples, self.record.stream)

    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 tokens of all replicas, or replicas where a sample has no tokens."""
        return np.maximum(items.tokens.lengths, 1) * self.record.replicas

    def plan_lengths(self, items: Items) -> tuple[np.ndarray, np.ndarray]:
        """Nothing, so a part is one batch: there is no padding, and masking bounds its memory."""
        none = np.zeros(len(items), dtype=np.int64)
        return none, none

    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """The masks of some samples, which depend on no batch."""
        record, of = self.record, items.sample[rows]
        columns = draw_masks(
            items.tokens.take(rows),
            self._samples.sample_id[of],
            self._samples.row[of],
            self._vocabulary,
            self._scheme,
            record.replicas,
            record.seed,
        )
        return lambda: columns
