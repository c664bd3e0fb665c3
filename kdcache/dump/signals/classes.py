"""The classes signal: logits of a classifier, or scores of a regressor, for whole texts."""

# F items, B rows of a batch, C labels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from kdcache.dump.signals.encoder import Columns, Request, SignalEncoder, common_fields
from kdcache.dump.signals.items import Items, masked_items, sample_items
from kdcache.dump.signals.values import float_codes, to_host
from kdcache.dump.teacher import Teacher
from kdcache.errors import ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.ragged import Ragged
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import ClassesRecord
from kdcache.formats.units import MAIN_COLUMN
from kdcache.recipe import ClassesSignal


class ClassesEncoder(SignalEncoder):
    """What a classifier says of every sample, or of those of one task.

    A sample has C scores for every reading of it, in the order of the record's `labels`; samples
    of other tasks have none.
    """

    main = MAIN_COLUMN["classes"]
    record: ClassesRecord
    teacher: Teacher
    _corpus_rows: np.ndarray

    def __init__(self, cache: Cache, request: Request) -> None:
        super().__init__(cache, request)
        signal = request.signal
        assert isinstance(signal, ClassesSignal), "the runner chooses by kind"
        assert request.teacher is not None, "classes were checked to have a teacher"
        self.teacher = teacher = request.teacher.for_task(signal.task)
        self._tasks = cache.manifest.corpus.tasks
        self.record = ClassesRecord(
            **common_fields(cache, request),
            masks=signal.masks,
            task=signal.task,
            problem=teacher.problem,
            labels=list(teacher.labels),
            values=signal.values,
        )

    @classmethod
    def check(cls, request: Request) -> None:
        """The teacher must be a classifier or a regressor."""
        name, signal = request.name, request.signal
        assert isinstance(signal, ClassesSignal), "the runner chooses by kind"
        assert request.teacher is not None, "classes were checked to have a teacher"
        teacher = request.teacher.for_task(signal.task)
        if "classes" not in teacher.signals or not teacher.labels:
            raise teacher.cannot(f"classes ({name})")

    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """The samples of the signal's task, or the maskings of them."""
        record = self.record
        self._corpus_rows = samples.row
        if record.masks is None:
            items = sample_items(samples, record.stream)
        else:
            items = masked_items(samples, record.stream, inputs[record.masks])
        if record.task is None:
            return items
        mine = samples.task_index(self._tasks) == self._tasks.index(record.task)
        chosen = np.flatnonzero(mine[items.sample])
        return Items(items.sample[chosen], items.variant[chosen], items.tokens.take(chosen))

    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 scores, C each."""
        return np.full(len(items), len(self.record.labels), dtype=np.int64)

    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """One forward of whole texts; none where there are no items."""
        record, teacher, labels = self.record, self.teacher, self.record.labels
        scores = torch.empty(0, len(labels))
        if len(rows):
            batch = items.batch(rows, teacher.pad_id, teacher.device)
            scores = teacher.scores(batch)  # [B, C]
        if scores.shape[1] != len(labels):
            raise ModelError(
                f"{teacher.record.path} gives {scores.shape[1]} scores and names {len(labels)} "
                "labels; both must be as many"
            )

        def place(index: Sequence[int]) -> str:
            item = rows[index[0]]
            replica = f", replica {items.variant[item]}" if record.masks is not None else ""
            row = self._corpus_rows[items.sample[item]]
            return f"corpus row {row}{replica}: the score of {labels[index[1]]!r}"

        codes = float_codes(scores, record.values, "float32", place)
        offsets = np.arange(len(rows) + 1, dtype=np.int64) * len(labels)
        return lambda: {self.main: Ragged(offsets, {"value": to_host(codes).reshape(-1)})}
