"""Texts with gold labels of several tasks, and what a model of these tasks is worth on them."""

# M texts of a task, B of a batch, C scores of a task

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import RecipeError
from kdcache.formats.identity import sample_id
from kdcache.models.multi_task import task_scores
from kdcache.models.tasks import Task
from kdcache.recipe import CorpusSection, EvaluateSection, Recipe
from kdcache.train.batches.batch import Tokens
from kdcache.train.batches.tasks import TaskGold
from kdcache.train.evaluation.baseline import Baseline
from kdcache.train.evaluation.labelled import LabelledTexts, labelled_texts, predict
from kdcache.train.evaluation.predictions import Predictions
from kdcache.train.runs.parallel import Ranks
from kdcache.train.students.student import max_positions


@dataclass(frozen=True)
class TaskTexts:
    """Encoded texts with what is right, of each task.

    Attributes:
        heads: the tasks by name.
        texts: of those that have some.
    """

    heads: Mapping[str, Task]
    texts: Mapping[str, LabelledTexts]

    def scores(
        self, model: Any, device: torch.device, batch_tokens: int, ranks: Ranks
    ) -> dict[str, float]:
        """dev_loss and dev_score, the means over the tasks, and of each dev_TASK_METRIC."""
        said = predict_tasks(model, self, device, batch_tokens, ranks)
        found = {name: scored(one) for name, one in said.items()}
        each = {
            f"dev_{name}_{metric}": value
            for name, values in found.items()
            for metric, value in values.items()
        }
        mean = {key: float(np.mean([one[key] for one in found.values()])) for key in MEANS}
        return {f"dev_{key}": value for key, value in mean.items()} | each

    def limited(self, num_tokens: int) -> TaskTexts:
        """Of every task the first texts with at most its share of so many tokens."""
        share = max(1, num_tokens // len(self.texts))
        return TaskTexts(self.heads, {name: one.limited(share) for name, one in self.texts.items()})

    def check_ids(self, model: Any) -> None:
        """Refuse ids that a model has no row for.

        Raises:
            CorpusError: with the text and the id.
        """
        for texts in self.texts.values():
            texts.check_ids(model)


#: What is averaged over the tasks.
MEANS = ("loss", "score")


def task_texts(
    where: str,
    corpus: CorpusSection,
    names: tuple[str, str | None, str | None],
    tokenizer: Any,
    heads: Mapping[str, Task],
    positions: int | None,
) -> TaskTexts:
    """The texts of a corpus that have a gold label of one of some tasks, and fit a model.

    Args:
        where: the corpus' path in the recipe.
        corpus: of tasks; without tasks it is of the model's only one.
        names: the fields of the text, of its pair (None: none) and of the label.
        tokenizer: of transformers.
        heads: the tasks by name; those that the corpus lacks are not scored, and the reverse.
        positions: longest that is kept; None: any.

    Raises:
        RecipeError: the corpus has none of the tasks, lacks a field, or has nothing that fits.
        CorpusError: a label is none of its task's, or out of its range; names it.
    """
    if not corpus.tasks and len(heads) > 1:
        raise RecipeError(
            f"{where}.tasks: is empty, and the student has the tasks {list(heads)}; give each its "
            "own files there"
        )
    shared = [name for name in heads if not corpus.tasks or name in corpus.tasks]
    if not shared:
        raise RecipeError(
            f"{where}.tasks has {sorted(corpus.tasks)}; the student's tasks are {list(heads)}"
        )
    gold, found = TaskGold(heads), {}
    for name in shared:
        path, own = where, corpus
        if corpus.tasks:
            path, part = f"{where}.tasks.{name}", corpus.tasks[name]
            # What a task has no text of is empty there, as in a cache.
            lacking = [field for field in names[1:2] if field and field not in part.fields]
            own = corpus.model_copy(update={"tasks": {name: part}, "without": lacking})
        found[name] = labelled_texts(path, own, names, tokenizer, gold.of_task(name), positions)
    return TaskTexts(heads, found)


def predict_tasks(
    model: Any, texts: TaskTexts, device: torch.device, batch_tokens: int, ranks: Ranks
) -> dict[str, Predictions]:
    """What a model says of the texts of each task.

    Args:
        model: a `MultiTaskModel` on `device`.
        texts: the same on every rank.
        device: of the model.
        batch_tokens: padded tokens of one forward.
        ranks: which score the batches in turns.
    """
    found = {}
    for name, own in texts.texts.items():
        task = texts.heads[name]

        def say(model: Any, tokens: Tokens, name: str = name) -> Tensor:
            return task_scores(model, tokens.ids, tokens.mask, tokens.segments, name)

        scores = predict(model, own, device, batch_tokens, ranks, task.num_scores, say)
        found[name] = Predictions.of(task, scores, own.gold, own.query, own.rows)
    return found


def scored(said: Predictions, chosen: np.ndarray | None = None) -> dict[str, float]:
    """Metrics of one task, and score: what the mean over the tasks is made of.

    The score is the accuracy, of a similarity the mean of pearson and spearman. Of a ranking what
    has a score above 0 is said to be relevant.

    Args:
        said: of the task.
        chosen: see `Predictions.metrics`.
    """
    metrics = said.metrics(chosen)
    score = metrics.get("accuracy")
    if score is None:
        score = (metrics["pearson"] + metrics["spearman"]) / 2
    return metrics | {"score": score}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    section: EvaluateSection,
    recipe: Recipe,
    baseline: Baseline | None = None,
) -> tuple[dict[str, Any], dict[str, Predictions]]:
    """Score a model of several tasks on corpora with gold labels.

    Args:
        model: on its device.
        tokenizer: its own.
        section: with a corpus, of tasks.
        recipe: of the run.
        baseline: what it will be compared with; refused before anything is scored if it cannot be.

    Returns:
        num_texts, references_digest, tasks (by name num_texts, kind, labels, references_digest,
        and what `scored` returns), and score and loss, their means over the tasks; and the
        predictions by task.

    Raises:
        RecipeError: the corpus has none of the model's tasks, or lacks a field.
        CorpusError: a label is none of its task's, or out of its range; names it.
        IdentityError: the baseline has none of the tasks, or of one of them other texts or labels.
    """
    corpus, train = section.corpus, recipe.train
    assert corpus is not None
    stream = recipe.dump.streams.get(train.source)
    field, pair = (train.source, None) if stream is None else (stream.field, stream.pair)
    label = corpus.label
    if label is None and recipe.corpus is not None:
        label = recipe.corpus.label
    heads = model.config.task_list
    parts = corpus, (field, pair, label), tokenizer, heads, max_positions(model)
    texts = task_texts("evaluate.corpus", *parts)
    texts.check_ids(model)
    if baseline is not None:
        for name in baseline.shared(list(texts.texts)):
            one = texts.texts[name]
            baseline.check(name, heads[name], one.digest, one.rows)
    said = predict_tasks(model, texts, model.device, section.batch_tokens, Ranks())
    tasks = {
        name: {
            "num_texts": len(texts.texts[name].ids),
            "kind": heads[name].kind,
            "labels": list(heads[name].labels),
            "references_digest": texts.texts[name].digest,
            **scored(one),
        }
        for name, one in said.items()
    }
    digests = [one.digest for one in texts.texts.values()]
    means = {key: float(np.mean([one[key] for one in tasks.values()])) for key in MEANS}
    return {
        "num_texts": sum(len(one.ids) for one in texts.texts.values()),
        "references_digest": sample_id(digests).hex(),
        "tasks": tasks,
        **means,
    }, said
