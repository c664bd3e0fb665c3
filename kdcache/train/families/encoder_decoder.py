"""Students that read one stream and write another: Marian, T5, BART and their like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kdcache.errors import RecipeError
from kdcache.formats.signals import SignalRecord
from kdcache.models.loading import load_tokenizer
from kdcache.recipe import CrossEntropyTerm, TrainSection
from kdcache.text.corpus import read_corpus
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.hypotheses import with_hypotheses
from kdcache.train.families.family import Family, Setting
from kdcache.train.losses.objective import Objective
from kdcache.train.runs.canary import check_batch, check_masked
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.validate import TokenPairs, encode, score_tokens
from kdcache.train.students.distillation import Distillation


@dataclass(frozen=True)
class DevelopmentPairs:
    """Sources and references, scored as they are and with sources shuffled."""

    pairs: TokenPairs

    def scores(
        self, model: Any, device: torch.device, batch_tokens: int, ranks: Ranks
    ) -> dict[str, float]:
        """dev_loss, dev_loss_shuffled (nats per target token) and dev_accuracy."""
        plain = score_tokens(model, self.pairs, device, batch_tokens, ranks)
        other = score_tokens(model, self.pairs.shuffled(), device, batch_tokens, ranks)
        return {
            "dev_loss": plain.loss_nats,
            "dev_loss_shuffled": other.loss_nats,
            "dev_accuracy": plain.accuracy,
        }


class EncoderDecoder(Family):
    """The encoder reads train.source, the decoder predicts the tokens of train.target."""

    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """See `Objective`."""
        for number, term in enumerate(section.objective):
            if isinstance(term, CrossEntropyTerm) and term.masks is not None:
                raise RecipeError(
                    f"train.objective.{number}.masks: goes with a student of kind masked_lm; an "
                    "encoder-decoder predicts every token of train.target"
                )
        return Objective(section.objective, signals, section.source, section.target)

    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """See `Distillation`."""
        return Distillation(student, objective, seed)

    def check_labels(self, micro: Batch, objective: Objective) -> None:
        """Soft labels against the tokens of target and hypotheses, and those that were masked."""
        whole = with_hypotheses(micro, objective.hypotheses, None)
        for stream, names in objective.labelled.items():
            check_batch(whole, stream, names)
        check_masked(micro, objective.source, objective.masked_labels)

    def development(self, setting: Setting) -> DevelopmentPairs:
        """Pairs that fit the student's positions and ids."""
        section, cache = setting.section, setting.cache
        corpus = section.validation.corpus
        assert corpus is not None
        streams = [cache.stream(section.source), cache.stream(section.target)]
        missing = [s.field for s in streams if s.field not in corpus.fields]
        if missing:
            raise RecipeError(
                f"train.validation.corpus.fields has {sorted(corpus.fields)}; the cache's "
                f"streams read {', '.join(missing)} too"
            )
        batches, sides = list(read_corpus(corpus)), []
        for stream, directory in zip(streams, (setting.source, setting.target), strict=True):
            texts = [text for batch in batches for text in batch.fields[stream.field]]
            sides.append(encode(load_tokenizer(directory), texts, stream.target))
        pairs = TokenPairs(*sides).within(setting.positions)
        if not len(pairs):
            raise RecipeError("train.validation.corpus: no row fits the student's positions")
        pairs.check_ids(setting.model)
        return DevelopmentPairs(pairs.limited(section.validation.limit_tokens))
