"""Students that predict every token from those before it: GPT-2, Llama, Qwen and their like."""

# M texts, B of a batch, T positions, N predicted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import CorpusError, RecipeError
from kdcache.formats.signals import SignalRecord
from kdcache.models.loading import load_tokenizer
from kdcache.models.passes import project_only
from kdcache.recipe import TrainSection
from kdcache.text.chat import ChatTemplate
from kdcache.text.corpus import read_corpus
from kdcache.train.batches.batch import Batch
from kdcache.train.families.family import Family, Setting
from kdcache.train.losses.causal_objective import CausalObjective
from kdcache.train.losses.objective import Objective
from kdcache.train.runs.canary import check_labels
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.scoring import (
    Score,
    score_tokens_in_turns,
    sums_of_samples,
    token_sums,
)
from kdcache.train.runs.validate import encode
from kdcache.train.students.causal_lm import CausalDistillation, predicted_tokens
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.student import embedding_rows


@dataclass(frozen=True)
class CausalTexts:
    """Texts, and which of their tokens are predicted.

    Attributes:
        rows: [M] int64 which of the texts given they are.
        tokens: M times [length] int64.
        predicted: M times [length] bool: every token but the first, of a chat those that the
            assistant wrote.
        num_long: texts that were left out because the model has too few positions.
    """

    rows: np.ndarray
    tokens: list[np.ndarray]
    predicted: list[np.ndarray]
    num_long: int = 0

    @property
    def num_predicted(self) -> int:
        """Tokens that are predicted."""
        return sum(int(one.sum()) for one in self.predicted)

    def scores(
        self, model: Any, device: torch.device, batch_tokens: int, ranks: Ranks
    ) -> dict[str, float]:
        """dev_loss (nats per predicted token), dev_perplexity (of a token) and dev_accuracy."""
        found = score_causal(model, self, device, batch_tokens, ranks)
        return {
            "dev_loss": found.loss_nats,
            "dev_perplexity": found.perplexity,
            "dev_accuracy": found.accuracy,
        }


class CausalLM(Family):
    """It reads train.source, and predicts every token of it but the first."""

    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """See `CausalObjective`."""
        if section.source != section.target:
            raise RecipeError(
                f"train.source is {section.source!r} and train.target {section.target!r}; a causal "
                "LM predicts tokens of what it reads: give both the same stream"
            )
        return CausalObjective(section.objective, signals, section.source)

    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """See `CausalDistillation`."""
        return CausalDistillation(student, objective, seed)

    def check_labels(self, micro: Batch, objective: Objective) -> None:
        """Soft labels against the tokens that are predicted."""
        tokens = micro.streams[objective.source]
        at = predicted_tokens(tokens)
        targets, lengths = tokens.ids[at].numpy(), at.sum(1).numpy()
        for name in objective.soft_labels:
            check_labels(name, micro.signals[name], targets, lengths)  # type: ignore[arg-type]

    def development(self, setting: Setting) -> CausalTexts:
        """Texts that fit the student's positions and ids."""
        section, stream = setting.section, setting.cache.stream(setting.section.source)
        corpus = section.validation.corpus
        assert corpus is not None
        if stream.field not in corpus.fields:
            raise RecipeError(
                f"train.validation.corpus.fields has {sorted(corpus.fields)}; the cache's stream "
                f"reads {stream.field}"
            )
        texts = [text for batch in read_corpus(corpus) for text in batch.fields[stream.field]]
        tokenizer, chat = load_tokenizer(setting.source), stream.template == "chat"
        limit = section.validation.limit_tokens
        found = causal_texts(tokenizer, texts, chat, setting.positions, limit)
        if not found.num_predicted:
            raise RecipeError(
                "train.validation.corpus: no row has a token to predict and fits the student's "
                "positions"
            )
        check_ids(found, setting.model)
        return found


def causal_texts(
    tokenizer: Any,
    texts: Sequence[str],
    chat: bool,
    positions: int | None,
    limit_tokens: int | None = None,
) -> CausalTexts:
    """Encode texts as a dump does; those too long, or with nothing to predict, are left out.

    Args:
        tokenizer: of transformers.
        texts: to encode.
        chat: whether they are messages, of which the assistant's alone are predicted.
        positions: longest that is kept; None: any.
        limit_tokens: keep the first with at most so many tokens, at least one; None: all.

    Raises:
        CorpusError: a text holds no messages that the template takes.
    """
    if chat:
        template = ChatTemplate(tokenizer, "the student")
        pairs = [template.encode(text) for text in texts]
        encoded = [np.array(ids, np.int64) for ids, _ in pairs]
        chosen = [np.array(loss, bool) for _, loss in pairs]
    else:
        encoded = encode(tokenizer, texts, False)
        chosen = [np.ones(len(ids), bool) for ids in encoded]
    for one in chosen:
        one[:1] = False
    some = [row for row, one in enumerate(chosen) if one.any()]
    kept = [row for row in some if positions is None or len(encoded[row]) <= positions]
    num_long = len(some) - len(kept)
    if limit_tokens is not None:
        ends = np.cumsum([len(encoded[row]) for row in kept])
        kept = kept[: max(1, int(np.searchsorted(ends, limit_tokens, side="right")))]
    rows = np.array(kept, dtype=np.int64)
    tokens, predicted = ([of[row] for row in kept] for of in (encoded, chosen))
    return CausalTexts(rows, tokens, predicted, num_long)


def check_ids(texts: CausalTexts, model: Any) -> None:
    """Refuse ids that a model has no row for: torch would fail without naming them.

    Raises:
        CorpusError: with the text and the id.
    """
    known = embedding_rows(model)[1]
    for row, ids in zip(texts.rows.tolist(), texts.tokens, strict=True):
        if int(ids.max()) >= known:
            raise CorpusError(
                f"text {row} (from 0): it has the token id {int(ids.max())}, the model has {known} "
                "ids; use the tokenizer that it was trained with, or leave out the text"
            )


def score_causal(
    model: Any,
    texts: CausalTexts,
    device: torch.device,
    batch_tokens: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Score:
    """Loss and accuracy over predicted tokens.

    Args:
        model: a transformers causal LM on `device`.
        texts: the same on every rank.
        device: of the model.
        batch_tokens: padded tokens of one forward.
        ranks: which score the batches in turns.
    """
    lengths = [len(ids) for ids in texts.tokens]

    sums = partial(_sums, model, texts, device)
    return score_tokens_in_turns(
        model, lengths, texts.num_predicted, device, batch_tokens, ranks, sums
    )


def causal_sums(
    model: Any, texts: CausalTexts, device: torch.device, batch_tokens: int
) -> np.ndarray:
    """[M, 2] float64, of each text what `token_sums` says of its predicted tokens.

    Args:
        model: a transformers causal LM on `device`.
        texts: to score.
        device: of the model.
        batch_tokens: padded tokens of one forward.
    """
    lengths = [len(ids) for ids in texts.tokens]
    return sums_of_samples(model, lengths, batch_tokens, partial(_sums, model, texts, device))


def _sums(model: Any, texts: CausalTexts, device: torch.device, rows: Sequence[int]) -> Tensor:
    """[B, 2] float64: summed negative log-prob of predicted tokens, number of first choices."""
    longest = max(len(texts.tokens[row]) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    at = np.zeros((len(rows), longest), bool)
    for place, row in enumerate(rows):
        length = len(texts.tokens[row])
        ids[place, :length], at[place, :length] = texts.tokens[row], texts.predicted[row]
    before = np.zeros_like(at)
    before[:, :-1] = at[:, 1:]
    targets = torch.from_numpy(ids[at]).to(device)  # [N]
    with project_only(model, torch.from_numpy(before).to(device)):
        out = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False)
    return token_sums(out.logits, targets, torch.from_numpy(at.sum(1)))
