"""Teachers that have a head for each of several tasks."""

# B batch, T positions, C scores of a task

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from kdcache.dump.batches import Batch
from kdcache.dump.teacher import Problem
from kdcache.dump.teachers.encoder import EncoderTeacher
from kdcache.errors import ModelError
from kdcache.formats.signals import TeacherRecord
from kdcache.models.multi_task import is_own, task_scores


class MultiTaskTeacher(EncoderTeacher):
    """A `MultiTaskModel`; before `for_task` it has the body's states alone."""

    kind = "multi_task"
    signals: tuple[str, ...] = ("classes", "hidden", "attention")

    def __init__(
        self, model: Any, record: TeacherRecord, device: torch.device, has_attention: bool = True
    ) -> None:
        super().__init__(model, record, device, has_attention)
        self.sides = ("encoder",)
        if is_own(model.config.text_config):
            self.signals = ("classes",)
        self._task: str | None = None

    def for_task(self, task: str | None) -> MultiTaskTeacher:
        """The same model with one of its heads, see `Teacher.for_task`."""
        try:
            name = self.model.one_task(task)
        except ModelError:
            raise ModelError(
                f"{self.record.path}: a classes signal of task {task!r}; its heads are of the "
                f"tasks {list(self.model.heads)}; name one as the signal's task"
            ) from None
        found, head = copy.copy(self), self.model.config.task_list[name]
        found._task, found.labels = name, head.score_names
        problem: Problem = "classification" if head.kind == "classification" else "regression"
        found.problem = problem
        return found

    @torch.inference_mode()
    def scores(self, batch: Batch) -> Tensor:
        """[B, C] scores of the task, see `Teacher.scores`."""
        assert self._task is not None, "asked for by signals of a task alone"
        parts = (batch.ids, batch.mask, batch.segments)
        return task_scores(self.model, *parts, self._task).to(self.device)
