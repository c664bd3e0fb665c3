"""Batches of one task each, over the union of several tasks, and the gold labels of each task."""

# M samples of a window, U units, B samples of a batch

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdcache.errors import RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.keyed import permutation
from kdcache.formats.window import WindowReader
from kdcache.models.tasks import Task
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.gold import GoldLabels
from kdcache.train.batches.order import fill, order_key, pools


@dataclass(frozen=True)
class Groups:
    """Which samples of a window stand in one batch.

    Attributes:
        names: of the tasks.
        task: [M] int64 number of each sample's task: a batch is of one task alone; -1: of none,
            it stands in no batch.
        unit: [M] int64, those of one unit (the candidates of a query) stand together, in one
            micro-batch.
    """

    names: tuple[str, ...]
    task: np.ndarray
    unit: np.ndarray

    def batches(
        self,
        digest: str,
        seed: int,
        epoch: int,
        window: int,
        lengths: Sequence[np.ndarray],
        batch_tokens: int,
    ) -> list[np.ndarray]:
        """Global batches of a window: every sample of the tasks exactly once.

        Units are permuted, those of each task are put into batches by length within its pools,
        and the batches of all tasks are permuted.

        Args:
            digest: see `window_batches`; the others too.
            seed: recipe seed.
            epoch: from 0.
            window: from 0.
            lengths: [M] int64 tokens in each of the streams.
            batch_tokens: most samples x longest sample of a batch; a larger unit is a batch of
                its own.
        """
        members = np.flatnonzero(self.task >= 0)
        members = members[np.argsort(self.unit[members], kind="stable")]
        if not len(members):
            return []
        changes = np.flatnonzero(np.diff(self.unit[members])) + 1
        starts = np.concatenate([[0], changes])  # [U]
        units = np.split(members, changes)
        longest = np.maximum.reduceat(np.maximum(np.max(lengths, axis=0), 1)[members], starts)
        sizes, tasks = np.diff(np.append(starts, len(members))), self.task[members[starts]]
        order = permutation(len(units), order_key(digest, seed, epoch, "samples", window))
        found: list[np.ndarray] = []
        for task in range(len(self.names)):
            own = order[tasks[order] == task]
            for pool in pools(own, (longest * sizes)[own], batch_tokens):
                pool = pool[np.argsort(-longest[pool], kind="stable")]
                parts = fill(pool, longest[pool], batch_tokens, sizes[pool])
                found += [np.concatenate([units[n] for n in part]) for part in parts]
        mixed = permutation(len(found), order_key(digest, seed, epoch, "batches", window))
        return [found[n] for n in mixed]

    def told(self, batch: Batch, part: np.ndarray) -> Batch:
        """A micro-batch with its task and units.

        Args:
            batch: gathered.
            part: [B] its samples.
        """
        name = self.names[int(self.task[part[0]])]
        return replace(batch, task=name, unit=torch.from_numpy(self.unit[part]))


@dataclass(frozen=True)
class TaskOrder:
    """The tasks that a student is trained on.

    Attributes:
        names: of the tasks, as the cache has them.
        rankings: those of them whose samples of one query stand together.
        stream: what the student reads; the first text of a pair is the query of a ranking.
    """

    names: tuple[str, ...]
    rankings: tuple[str, ...] = ()
    stream: str = ""

    @property
    def identity(self) -> list[str]:
        """What the order of batches depends on."""
        return ["tasks", *self.names, "rankings", *self.rankings]

    def check(self, cache: Cache) -> None:
        """Refuse a cache without one of the tasks.

        Raises:
            RecipeError: names those there are.
        """
        known = cache.manifest.corpus.tasks
        for name in self.names:
            if name not in known:
                raise RecipeError(
                    f"train.student.tasks.{name}: {cache.path} has the tasks {known}; leave it "
                    f"out (train.tasks), or dump it as corpus.tasks.{name}"
                )

    def of_window(self, cache: Cache, window: WindowReader) -> Groups:
        """Task and unit of every sample; queries are told apart by their text."""
        number = {name: n for n, name in enumerate(self.names)}
        names = window.tasks()
        task = np.array([number.get(name, -1) for name in names], np.int64)
        unit = np.arange(len(names), dtype=np.int64)
        ranked = [n for n, name in enumerate(names) if name in self.rankings]
        if ranked:
            texts, first = (
                window.texts(cache.stream(self.stream).field),
                dict[tuple[str, str], int](),
            )
            for n in ranked:
                unit[n] = first.setdefault((names[n], texts[n].strip()), n)
        return Groups(self.names, task, unit)


@dataclass(frozen=True)
class TaskGold:
    """Gold labels of several tasks as numbers, see `GoldLabels`.

    Attributes:
        tasks: by name.
        where: the path in the recipe of what needs them.
        alone: whether nothing but gold labels is learned, so that every task must have some.
    """

    tasks: Mapping[str, Task]
    where: str = "train.objective"
    alone: bool = True

    def of_task(self, name: str) -> GoldLabels:
        """How the labels of one task become targets."""
        task = self.tasks[name]
        names = task.labels or ("score",)
        key = f"train.student.tasks.{name}"
        return GoldLabels(names, name, self.where, key=key, range=task.range)

    def check(self, cache: Cache) -> None:
        """Refuse a cache without gold labels, or a task without any where nothing else is learned.

        Raises:
            RecipeError: names the task.
        """
        for name in self.tasks:
            self.of_task(name).check(cache)
            part = cache.manifest.recipe.get("corpus", {}).get("tasks", {}).get(name)
            if (
                self.alone
                and part is not None
                and cache.manifest.corpus.label not in part["fields"]
            ):
                raise RecipeError(
                    f"{self.where}: task {name!r} has no gold labels in {cache.path} (its fields "
                    f"are {sorted(part['fields'])}); leave it out (train.tasks), or add a term "
                    "over its signal"
                )

    def of_window(self, cache: Cache, window: WindowReader) -> np.ndarray:
        """[M] float64 targets, numbers of classes or numbers; NaN for none.

        Raises:
            CorpusError: a label is none of its task's; names it and its row.
        """
        assert cache.manifest.corpus.label is not None  # or it was refused
        texts, of = window.texts(cache.manifest.corpus.label), window.tasks()
        found = np.full(len(of), np.nan)
        for name in self.tasks:
            rows = [n for n, task in enumerate(of) if task == name]
            codes = self.of_task(name).encode(
                [texts[n] for n in rows],
                lambda number, rows=rows: f"corpus row {window.row[rows[number]]}",  # type: ignore[misc]
            )
            found[rows] = np.where(codes < 0, np.nan, codes) if codes.dtype.kind == "i" else codes
        return found
