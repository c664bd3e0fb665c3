"""Students that fill in masked tokens: BERT, RoBERTa, DistilBERT and their like."""

# M texts, B of a batch, S positions, K masked tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import CorpusError, RecipeError
from kdcache.formats.identity import sample_id
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import join_ids, split_ids
from kdcache.formats.signals import MasksRecord, SignalRecord
from kdcache.models.loading import load_tokenizer
from kdcache.models.passes import project_only, shift_in_place
from kdcache.recipe import TrainSection
from kdcache.text.corpus import read_corpus
from kdcache.text.mask_choice import Scheme
from kdcache.text.masking import MaskVocabulary, draw_masks
from kdcache.text.tokenizers import all_special_ids, token_strings
from kdcache.train.batches.batch import Batch
from kdcache.train.families.family import Family, Setting
from kdcache.train.losses.masked_objective import MaskedObjective
from kdcache.train.losses.objective import Objective
from kdcache.train.runs.canary import check_masked
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.scoring import (
    Score,
    score_tokens_in_turns,
    sums_of_samples,
    token_sums,
)
from kdcache.train.runs.validate import encode
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.masked_lm import MaskedDistillation
from kdcache.train.students.student import decoder_start, embedding_rows


@dataclass(frozen=True)
class MaskedTexts:
    """Texts with tokens masked, once each and always the same.

    Attributes:
        rows: [M] int64 which of the texts given they are.
        tokens: M times [length] int64, as they were.
        positions: M times [count] int64, the masked ones.
        ids: M times [count] int64, what stands there.
    """

    rows: np.ndarray
    tokens: list[np.ndarray]
    positions: list[np.ndarray]
    ids: list[np.ndarray]

    def scores(
        self, model: Any, device: torch.device, batch_tokens: int, ranks: Ranks
    ) -> dict[str, float]:
        """dev_loss (nats per masked token) and dev_accuracy."""
        found = score_masked(model, self, device, batch_tokens, ranks)
        return {"dev_loss": found.loss_nats, "dev_accuracy": found.accuracy}


class MaskedLM(Family):
    """It reads train.source with tokens masked, and predicts what stood there."""

    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """See `MaskedObjective`."""
        if section.source != section.target:
            raise RecipeError(
                f"train.source is {section.source!r} and train.target {section.target!r}; a masked "
                "LM predicts tokens of what it reads: give both the same stream"
            )
        return MaskedObjective(section.objective, signals, section.source)

    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """See `MaskedDistillation`."""
        return MaskedDistillation(student, objective, seed)

    def check_labels(self, micro: Batch, objective: Objective) -> None:
        """Soft labels against the tokens that were masked."""
        assert isinstance(objective, MaskedObjective)
        check_masked(micro, objective.source, dict.fromkeys(objective.soft_labels, objective.masks))

    def development(self, setting: Setting) -> MaskedTexts:
        """Texts that fit the student, masked as the cache's are."""
        section, objective = setting.section, setting.objective
        corpus, stream = section.validation.corpus, setting.cache.stream(section.source)
        assert corpus is not None
        assert isinstance(objective, MaskedObjective)
        if stream.field not in corpus.fields:
            raise RecipeError(
                f"train.validation.corpus.fields has {sorted(corpus.fields)}; the cache's stream "
                f"reads {stream.field}"
            )
        record = objective.records[objective.masks]
        assert isinstance(record, MasksRecord)
        texts = [text for batch in read_corpus(corpus) for text in batch.fields[stream.field]]
        tokenizer, limit = load_tokenizer(setting.source), section.validation.limit_tokens
        found = masked_texts(tokenizer, texts, scheme_of_record(record), setting.positions, limit)
        if not sum(map(len, found.positions)):
            raise RecipeError("train.validation.corpus: no row fits the student's positions")
        _check_ids(found, setting.model)
        return found


def scheme_of_record(record: MasksRecord) -> Scheme:
    """How a cache's samples were masked."""
    defaults = {"mask_share": 1.0, "random_share": 0.0, "span_p": 0.2, "span_max": 10}
    figures = defaults | record.parameters
    return Scheme(record.scheme, **figures | {"span_max": int(figures["span_max"])})  # type: ignore[arg-type]


def masked_texts(
    tokenizer: Any,
    texts: Sequence[str],
    scheme: Scheme,
    positions: int | None,
    limit_tokens: int | None = None,
) -> MaskedTexts:
    """Encode and mask texts, each as a function of itself and of its place.

    Args:
        tokenizer: of transformers, with a mask token.
        texts: to encode; those without a token are left out.
        scheme: how they are masked.
        positions: longest that is kept; None: any.
        limit_tokens: keep the first with at most so many tokens, at least one; None: all.

    Raises:
        ModelError: the tokenizer has no mask token.
    """
    encoded = encode(tokenizer, texts, False)
    kept = [n for n, ids in enumerate(encoded) if 0 < len(ids) <= (positions or len(ids))]
    if limit_tokens is not None:
        ends = np.cumsum([len(encoded[n]) for n in kept])
        kept = kept[: max(1, int(np.searchsorted(ends, limit_tokens, side="right")))]
    vocabulary = MaskVocabulary.of(
        token_strings(tokenizer),
        sorted(all_special_ids(tokenizer)),
        tokenizer.mask_token_id,
        "the student's tokenizer",
    )
    tokens, rows = [encoded[n] for n in kept], np.array(kept, dtype=np.int64)
    if not tokens:
        return MaskedTexts(rows, [], [], [])
    fields = split_ids(np.concatenate(tokens), len(vocabulary.special))
    stream = Ragged(offsets_of(np.array([len(ids) for ids in tokens])), fields)
    keys = np.frombuffer(b"".join(sample_id([texts[n]]) for n in kept), np.uint8).reshape(-1, 16)
    columns = draw_masks(stream, keys, np.arange(len(kept)), vocabulary, scheme, 1, 0)
    masked = columns["masked"]
    cuts = masked.offsets[1:-1]
    positions_of = np.split(masked.fields["position"].astype(np.int64), cuts)
    ids = np.split(join_ids(masked.fields).astype(int), cuts)
    return MaskedTexts(rows, tokens, positions_of, ids)


def score_masked(
    model: Any,
    texts: MaskedTexts,
    device: torch.device,
    batch_tokens: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Score:
    """Loss and accuracy over masked tokens.

    Args:
        model: on `device`, a transformers masked LM, or an encoder-decoder that writes what is
            masked.
        texts: the same on every rank.
        device: of the model.
        batch_tokens: padded tokens of one forward.
        ranks: which score the batches in turns.
    """
    lengths, num_tokens = [len(ids) for ids in texts.tokens], sum(map(len, texts.positions))

    sums = partial(_sums, model, texts, device)
    return score_tokens_in_turns(model, lengths, num_tokens, device, batch_tokens, ranks, sums)


def masked_sums(
    model: Any, texts: MaskedTexts, device: torch.device, batch_tokens: int
) -> np.ndarray:
    """[M, 2] float64, of each text what `token_sums` says of its masked tokens.

    Args:
        model: see `score_masked`.
        texts: to score.
        device: of the model.
        batch_tokens: padded tokens of one forward.
    """
    lengths = [len(ids) for ids in texts.tokens]
    return sums_of_samples(model, lengths, batch_tokens, partial(_sums, model, texts, device))


def _sums(model: Any, texts: MaskedTexts, device: torch.device, rows: Sequence[int]) -> Tensor:
    """[B, 2] float64: summed negative log-prob of masked tokens, number of first choices."""
    longest = max(len(texts.tokens[row]) for row in rows)
    ids, labels = np.zeros((2, len(rows), longest), np.int64)
    mask, chosen = np.zeros((2, len(rows), longest), bool)
    for place, row in enumerate(rows):
        own, positions = texts.tokens[row], texts.positions[row]
        mask[place, : len(own)] = True
        labels[place, : len(own)] = ids[place, : len(own)] = own
        ids[place, positions], chosen[place, positions] = texts.ids[row], True
    truth, at = torch.from_numpy(labels).to(device), torch.from_numpy(chosen).to(device)
    read = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device).long()
    written: dict[str, Any] = {}
    if model.config.is_encoder_decoder:  # the masked tokens are what its decoder writes
        start = decoder_start(model)
        written = {"decoder_input_ids": shift_in_place(truth, at, pad=0, start=start)}
        written |= {"decoder_attention_mask": at.long(), "use_cache": False}
    with project_only(model, at):
        logits = model(input_ids=read[0], attention_mask=read[1], **written).logits  # [K, V]
    return token_sums(logits, truth[at], at.sum(1))


def _check_ids(texts: MaskedTexts, model: Any) -> None:
    """Refuse ids that a model has no row for: torch would fail without naming them."""
    rows = embedding_rows(model)[1]
    for number, parts in enumerate(zip(texts.tokens, texts.ids, strict=True)):
        largest = max(int(ids.max(initial=0)) for ids in parts)
        if largest >= rows:
            raise CorpusError(
                f"text {number} (from 0): it has the token id {largest}, the model has {rows} "
                "ids; use the tokenizer that it was trained with, or leave out the text"
            )
