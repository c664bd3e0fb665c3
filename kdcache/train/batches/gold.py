"""Gold labels: the text of a corpus' label field as class numbers, or as the numbers it says."""

# M samples, C classes

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.errors import CorpusError, RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.window import WindowReader

#: Of the samples of a global batch that have a gold label the counts go by this name.
GOLD = ".gold"
#: What stands for the class of a sample without a gold label.
NONE = -100


@dataclass(frozen=True)
class GoldLabels:
    """How gold labels become targets.

    Attributes:
        names: C names of the classes; a single one: labels are numbers.
        task: whose samples have labels; None: all.
        where: the path in the recipe of what needs them.
        key: the path of what is labelled, whose labels name the classes.
        range: of numbers, the lowest and the highest; None: any.
    """

    names: tuple[str, ...]
    task: str | None = None
    where: str = "train.objective"
    key: str = "train.student"
    range: tuple[float, float] | None = None

    @property
    def numbers(self) -> bool:
        """Whether labels are numbers."""
        return len(self.names) == 1

    def encode(self, texts: Sequence[str], place: Callable[[int], str]) -> np.ndarray:
        """Labels as [M] float64 numbers, NaN for none, or as [M] int64 classes, -100 for none.

        Args:
            texts: M labels; one that is empty or white space is none.
            place: says for a message where one of them stands.

        Raises:
            CorpusError: a label is no number, or no name of a class; names it.
        """
        if self.numbers:
            return np.array([self._number(text, place, n) for n, text in enumerate(texts)], float)
        index = {name: number for number, name in enumerate(self.names)}
        found = np.full(len(texts), NONE, dtype=np.int64)
        for number, text in enumerate(texts):
            name = text.strip()
            if not name:
                continue
            if name not in index:
                raise CorpusError(
                    f"{place(number)}: its gold label {name!r} is none of the student's "
                    f"{shown(self.names)}; name all classes in {self.key}.labels, as the "
                    "corpus writes them"
                )
            found[number] = index[name]
        return found

    def check(self, cache: Cache) -> None:
        """Refuse a cache without gold labels, or without the task.

        Raises:
            RecipeError: it has none.
        """
        corpus = cache.manifest.corpus
        if corpus.label is None:
            raise RecipeError(
                f"{self.where}: needs gold labels, and {cache.path} has none; dump with "
                f"corpus.label, one of its fields {corpus.fields}"
            )
        if self.task is not None and self.task not in corpus.tasks:
            raise RecipeError(
                f"{self.where}: is of task {self.task!r}, and {cache.path} has the tasks "
                f"{corpus.tasks}; set train.student.task to one of them"
            )

    def of_window(self, cache: Cache, window: WindowReader) -> np.ndarray:
        """Targets of the samples of a window, see `encode`.

        Raises:
            CorpusError: a label is no number, or no name of a class; names it and its row.
        """
        assert cache.manifest.corpus.label is not None  # or it was refused
        texts = window.texts(cache.manifest.corpus.label)
        if self.task is not None:
            tasks = window.tasks()
            texts = [t if of == self.task else "" for t, of in zip(texts, tasks, strict=True)]
        return self.encode(texts, lambda number: f"corpus row {window.row[number]}")

    def _number(self, text: str, place: Callable[[int], str], index: int) -> float:
        """One label as a number."""
        if not text.strip():
            return math.nan
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low, high = self.range or (-math.inf, math.inf)
        if math.isfinite(value) and not low <= value <= high:
            raise CorpusError(
                f"{place(index)}: its gold label {text!r} lies outside {self.key}.range "
                f"[{low:g}, {high:g}]; mend the row, or set the range that labels have"
            )
        if not math.isfinite(value):
            raise CorpusError(
                f"{place(index)}: its gold label {text!r} is no finite number, which a student "
                f"with one label learns; name the classes in {self.key}.labels, or mend the row"
            )
        return value


def has_gold(codes: np.ndarray) -> np.ndarray:
    """[M] bool, which samples have a gold label.

    Args:
        codes: from `GoldLabels.encode`.
    """
    found: np.ndarray = ~np.isnan(codes) if codes.dtype.kind == "f" else codes != NONE
    return found


def shown(names: Sequence[str], most: int = 8) -> str:
    """The first of them, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"
