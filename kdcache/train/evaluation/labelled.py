"""Texts with gold labels, and what a classifier or regressor is worth on them."""

# M texts, B of a batch, S positions, C classes

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import CorpusError, RecipeError
from kdcache.formats.identity import sample_id
from kdcache.models.tasks import Task
from kdcache.recipe import CorpusSection, EvaluateSection, Recipe
from kdcache.text.corpus import read_corpus
from kdcache.text.tokenizers import encode_pairs
from kdcache.train.batches.batch import Tokens
from kdcache.train.batches.gold import GoldLabels, has_gold
from kdcache.train.evaluation.baseline import Baseline
from kdcache.train.evaluation.predictions import Predictions
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.scoring import score_in_turns
from kdcache.train.runs.validate import encode
from kdcache.train.students.classifier import class_scores
from kdcache.train.students.student import embedding_rows, max_positions


@dataclass(frozen=True)
class LabelledTexts:
    """Encoded texts or pairs with what is right.

    Attributes:
        ids: M times [length] int64.
        segments: M times [length] int64 token types; None without pairs.
        gold: [M] int64 classes, or float64 numbers.
        digest: of the texts and labels.
        query: [M] int64, equal where the first texts are.
        rows: [M] int64, where they stand in the task's own files, from 0.
    """

    ids: list[np.ndarray]
    segments: list[np.ndarray] | None
    gold: np.ndarray
    digest: str
    query: np.ndarray
    rows: np.ndarray

    def scores(
        self, model: Any, device: torch.device, batch_tokens: int, ranks: Ranks
    ) -> dict[str, float]:
        """dev_loss and the other metrics of `Predictions`."""
        found = predictions(model, self, device, batch_tokens, ranks).metrics()
        return {f"dev_{name}": value for name, value in found.items()}

    def limited(self, num_tokens: int) -> LabelledTexts:
        """The first texts with at most this many tokens, at least one."""
        ends = np.cumsum([len(ids) for ids in self.ids])
        count = max(1, int(np.searchsorted(ends, num_tokens, side="right")))
        segments = None if self.segments is None else self.segments[:count]
        kept = {name: getattr(self, name)[:count] for name in ("ids", "gold", "query", "rows")}
        return replace(self, segments=segments, **kept)

    def check_ids(self, model: Any) -> None:
        """Refuse ids that a model has no row for: torch would fail without naming them.

        Raises:
            CorpusError: with the text and the id.
        """
        rows, _ = embedding_rows(model)
        for number, ids in enumerate(self.ids):
            if int(ids.max(initial=0)) >= rows:
                raise CorpusError(
                    f"text {number} (from 0): it has the token id {int(ids.max())}, the model has "
                    f"{rows} ids; use the tokenizer that it was trained with, or leave out the text"
                )


def labelled_texts(
    where: str,
    corpus: CorpusSection,
    names: tuple[str, str | None, str | None],
    tokenizer: Any,
    gold: GoldLabels,
    positions: int | None,
) -> LabelledTexts:
    """The texts of a corpus that have a gold label and fit a model.

    Args:
        where: the corpus' path in the recipe.
        corpus: to read.
        names: the fields of the text, of its pair (None: none) and of the label.
        tokenizer: of transformers.
        gold: what the labels are.
        positions: longest that is kept; None: any.

    Raises:
        RecipeError: the corpus lacks a field, or nothing of it has a label and fits.
        CorpusError: a label is none of the student's; names it.
    """
    field, pair, label = names
    if label is None:
        raise RecipeError(f"{where}.label: is null; name the field that holds the gold labels")
    known = corpus.field_names
    missing = [name for name in (field, pair, label) if name is not None and name not in known]
    if missing:
        raise RecipeError(f"{where}.fields has {sorted(known)}; scoring needs {missing} too")
    texts: list[str] = []
    pairs: list[str] = []
    codes, rows = [], []
    for batch in read_corpus(corpus):
        if gold.task is not None and batch.task and batch.task != gold.task:
            continue
        found = gold.encode(batch.fields[label], lambda n, at=batch: f"{where}: {at.place(n)}")  # type: ignore[misc]
        kept = np.flatnonzero(has_gold(found)).tolist()
        codes.append(found[kept])
        rows.append(batch.rows[kept] - batch.start)
        texts += [batch.fields[field][n] for n in kept]
        pairs += [batch.fields[pair][n] if pair else "" for n in kept]
    ids, segments = encode(tokenizer, texts, False), None
    if pair is not None:
        ids, segments = (
            [np.asarray(one, np.int64) for one in side]
            for side in encode_pairs(tokenizer, texts, pairs, False)
        )
    fits = [n for n, one in enumerate(ids) if 0 < len(one) <= (positions or len(one))]
    if not fits:
        raise RecipeError(f"{where}: no row has a gold label and fits the student's positions")
    answers = np.concatenate(codes)
    _, query = np.unique(np.array(texts, dtype=object), return_inverse=True)
    return LabelledTexts(
        ids=[ids[n] for n in fits],
        segments=None if segments is None else [segments[n] for n in fits],
        gold=answers[fits],
        digest=sample_id([*texts, *pairs, *map(str, answers.tolist())]).hex(),
        query=query[fits],
        rows=np.concatenate(rows)[fits],
    )


def predictions(
    model: Any,
    texts: LabelledTexts,
    device: torch.device,
    batch_tokens: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Predictions:
    """What a model says of labelled texts.

    Args:
        model: a transformers sequence classification model on `device`.
        texts: the same on every rank.
        device: of the model.
        batch_tokens: padded tokens of one forward.
        ranks: which score the batches in turns.
    """
    logits = predict(model, texts, device, batch_tokens, ranks)
    return Predictions.of(task_of(model), logits, texts.gold, texts.query, texts.rows)


def task_of(model: Any) -> Task:
    """What a transformers sequence classification model says: one of its classes, or a number."""
    labels = label_names(model)
    return Task("classification", labels) if len(labels) > 1 else Task("similarity")


def label_names(model: Any) -> tuple[str, ...]:
    """C names of a transformers sequence classification model's scores."""
    return tuple(str(model.config.id2label[n]) for n in range(model.config.num_labels))


def predict(
    model: Any,
    texts: LabelledTexts,
    device: torch.device,
    batch_tokens: int,
    ranks: Ranks,
    num_scores: int | None = None,
    say: Callable[[Any, Tokens], Tensor] = class_scores,
) -> np.ndarray:
    """[M, C] float64 scores, in the order of the texts.

    Args:
        model: on `device`.
        texts: the same on every rank.
        device: of the model.
        batch_tokens: padded tokens of one forward.
        ranks: which score the batches in turns.
        num_scores: C; None: as many as the model's config has labels.
        say: the model's [B, C] scores of B texts.
    """
    lengths = [len(ids) for ids in texts.ids]

    def scores(rows: list[int]) -> Tensor:
        return say(model, _tokens(texts, rows, device)).double().cpu()

    num_scores = model.config.num_labels if num_scores is None else num_scores
    said = torch.zeros(len(lengths), num_scores, dtype=torch.float64)
    for rows, found in score_in_turns(model, lengths, batch_tokens, ranks, scores):
        said[rows] = found
    said = ranks.summed(said.to(device)).cpu() if ranks.world > 1 else said
    return said.numpy()


def evaluate_classifier(
    model: Any,
    tokenizer: Any,
    section: EvaluateSection,
    recipe: Recipe,
    baseline: Baseline | None = None,
) -> tuple[dict[str, Any], dict[str, Predictions]]:
    """Score a classifier on a corpus with gold labels.

    Args:
        model: on its device.
        tokenizer: its own.
        section: with a corpus.
        recipe: of the run.
        baseline: what it will be compared with; refused before anything is scored if it cannot be.

    Returns:
        num_texts, labels, references_digest, and the metrics of `Predictions`; and the predictions
        under an empty name.

    Raises:
        RecipeError: the corpus lacks a field.
        CorpusError: a label is none of the model's; names it.
        IdentityError: the baseline was scored on other texts, or has other labels.
    """
    corpus, train = section.corpus, recipe.train
    assert corpus is not None
    assert train.student is not None
    stream = recipe.dump.streams.get(train.source)
    field, pair = (train.source, None) if stream is None else (stream.field, stream.pair)
    label = corpus.label
    if label is None and recipe.corpus is not None:
        label = recipe.corpus.label
    labels = label_names(model)
    gold = GoldLabels(labels, _task_of(recipe) if corpus.tasks else None, range=train.student.range)
    parts = corpus, (field, pair, label), tokenizer, gold
    texts = labelled_texts("evaluate.corpus", *parts, max_positions(model))
    texts.check_ids(model)
    if baseline is not None:
        baseline.check("", task_of(model), texts.digest, texts.rows)
    found = predictions(model, texts, model.device, section.batch_tokens)
    return {
        "num_texts": len(texts.ids),
        "labels": list(labels),
        "references_digest": texts.digest,
        **found.metrics(),
    }, {"": found}


def _task_of(recipe: Recipe) -> str | None:
    """The task whose labels a run learned; None where it has none."""
    assert recipe.train.student is not None
    signals = [recipe.dump.signals.get(getattr(t, "signal", "")) for t in recipe.train.objective]
    tasks = [recipe.train.student.task, *(getattr(one, "task", None) for one in signals)]
    return next((task for task in tasks if task is not None), None)


def _tokens(texts: LabelledTexts, rows: Sequence[int], device: torch.device) -> Tokens:
    """Some texts, padded with 0 at the end."""
    longest = max(len(texts.ids[row]) for row in rows)
    ids, segments = np.zeros((2, len(rows), longest), np.int64)
    mask = np.zeros((len(rows), longest), bool)
    for place, row in enumerate(rows):
        own = texts.ids[row]
        mask[place, : len(own)], ids[place, : len(own)] = True, own
        if texts.segments is not None:
            segments[place, : len(own)] = texts.segments[row]
    types: Tensor | None = torch.from_numpy(segments).to(device)
    read = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
    return Tokens(*read, segments=None if texts.segments is None else types)
