"""Students of several tasks: one body, and a head for every task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.errors import ModelError, RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.manifest import TokenizerRecord
from kdcache.formats.signals import ClassesRecord, SignalRecord
from kdcache.models.loading import load_tokenizer
from kdcache.models.tasks import Task
from kdcache.recipe import ScoreKLTerm, ScoreMSETerm, StudentSection, TaskHead, TrainSection
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.tasks import TaskOrder
from kdcache.train.evaluation.tasks import TaskTexts, task_texts
from kdcache.train.families.family import Family, Setting
from kdcache.train.losses.multi_task_objective import MultiTaskObjective, signal_name
from kdcache.train.losses.objective import Objective
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.multi_task import (
    MultiTaskDistillation,
    build_multi_task,
    config_at,
)

logger = logging.getLogger(__name__)


class MultiTask(Family):
    """It reads train.source, and says something of it for one of its tasks."""

    def completed(self, section: TrainSection, caches: Sequence[Cache]) -> TrainSection:
        """The tasks that are trained, each with its labels.

        Raises:
            RecipeError: the student has no such task, or nothing names its labels.
        """
        student = section.student
        assert student is not None
        own = None if student.path is None else config_at(student.path)
        there = {} if own is None else own.task_list
        heads = dict(student.tasks) or {name: _head(task) for name, task in there.items()}
        if not heads:
            raise RecipeError(
                f"train.student.tasks: is empty, and {student.path} is no multi_task model; name "
                "at least one task"
            )
        chosen = list(heads) if section.tasks is None else list(dict.fromkeys(section.tasks))
        if unknown := [name for name in chosen if name not in heads]:
            raise RecipeError(f"train.tasks: the student has no {unknown[0]!r}; {sorted(heads)}")
        for cache in caches:
            TaskOrder(tuple(chosen)).check(cache)
        left = sorted(set(caches[0].manifest.corpus.tasks) - set(chosen))
        if left:
            logger.info("%s: left out, no tasks of the student: %s", caches[0].path, left)
        found = {
            name: _completed(name, heads[name], there.get(name), section, caches) for name in chosen
        }
        return section.model_copy(update={"student": student.model_copy(update={"tasks": found})})

    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """See `MultiTaskObjective`."""
        if section.source != section.target:
            raise RecipeError(
                f"train.source is {section.source!r} and train.target {section.target!r}; a "
                "multi_task student reads one stream: give both the same"
            )
        assert section.student is not None
        heads = {name: _task(head) for name, head in section.student.tasks.items()}
        return MultiTaskObjective(section.objective, signals, section.source, heads)

    def build(
        self,
        section: StudentSection,
        objective: Objective,
        tokenizer: TokenizerRecord,
        vocab_size: int,
        seed: int,
        source: TokenizerRecord | None,
    ) -> Any:
        """See `build_multi_task`."""
        assert isinstance(objective, MultiTaskObjective)
        if given := {"num_labels", "id2label", "label2id"} & set(section.config or ()):
            raise ModelError(
                f"train.student.config.{min(given)}: follows from train.student.tasks; leave it out"
            )
        return build_multi_task(section, objective.heads, tokenizer, vocab_size, seed)

    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """See `MultiTaskDistillation`; it learns nothing beside the student."""
        assert isinstance(objective, MultiTaskObjective)
        return MultiTaskDistillation(student, objective)

    def check_labels(self, micro: Batch, objective: Objective) -> None:
        """Nothing: labels are of whole samples, and their names were compared."""

    def development(self, setting: Setting) -> TaskTexts:
        """Texts with gold labels of every task that the development corpus has."""
        section, objective, cache = setting.section, setting.objective, setting.cache
        corpus, stream = section.validation.corpus, setting.cache.stream(section.source)
        assert corpus is not None
        assert isinstance(objective, MultiTaskObjective)
        found = task_texts(
            "train.validation.corpus",
            corpus,
            (stream.field, stream.pair, corpus.label or cache.manifest.corpus.label),
            load_tokenizer(setting.source),
            objective.heads,
            setting.positions,
        ).limited(section.validation.limit_tokens)
        found.check_ids(setting.model)
        return found


def _task(head: TaskHead) -> Task:
    """The task of a recipe."""
    return Task(kind=head.kind, labels=tuple(head.labels or ()), range=head.range)


def _head(task: Task) -> TaskHead:
    """The section of a task."""
    return TaskHead(kind=task.kind, labels=list(task.labels) or None, range=task.range)


def _completed(
    name: str, head: TaskHead, own: Task | None, section: TrainSection, caches: Sequence[Cache]
) -> TaskHead:
    """A task with its labels."""
    if own is not None and own.kind == head.kind == "similarity" and head.range is None:
        return head.model_copy(update={"range": own.range})
    if head.labels is not None or head.kind == "similarity":
        return head
    if own is not None and own.labels:
        return head.model_copy(update={"labels": list(own.labels)})
    if head.kind == "ranking":
        raise RecipeError(
            f"train.student.tasks.{name}.labels: a ranking needs its two gold labels, the last is "
            "that of what is relevant"
        )
    labels = _of_signals(name, section, caches) or _of_gold(name, caches)
    if len(labels) < 2:
        raise RecipeError(
            f"train.student.tasks.{name}.labels: is null; no term's signal names its classes, and "
            f"the gold labels of {caches[0].path} have {labels}; list them"
        )
    return head.model_copy(update={"labels": labels})


def _of_signals(name: str, section: TrainSection, caches: Sequence[Cache]) -> list[str]:
    """The labels that the first term's signal of a task has."""
    for term in section.objective:
        if term.used and isinstance(term, ScoreMSETerm | ScoreKLTerm):
            record = caches[0].signals.get(signal_name(term, name))
            if isinstance(record, ClassesRecord) and record.problem == "classification":
                return list(record.labels)
    return []


def _of_gold(name: str, caches: Sequence[Cache]) -> list[str]:
    """All gold labels that the samples of a task have, sorted."""
    found: set[str] = set()
    for cache in caches:
        corpus = cache.manifest.corpus
        if corpus.label is None or name not in corpus.tasks:
            continue
        for number in range(cache.num_shards):
            samples = cache.samples(number)
            own = samples.task_index(corpus.tasks) == corpus.tasks.index(name)
            texts = samples.text(corpus.label).take(pa.array(np.flatnonzero(own)))
            found |= {text.strip() for text in texts.to_pylist()}
    return sorted(found - {""})
