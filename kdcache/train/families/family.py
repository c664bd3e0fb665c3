"""What the trainer asks of a family of students; all else is the same for every one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from kdcache.formats.cache import Cache
from kdcache.formats.manifest import TokenizerRecord
from kdcache.formats.signals import SignalRecord
from kdcache.recipe import StudentSection, TrainSection
from kdcache.train.batches.batch import Batch
from kdcache.train.losses.objective import Objective
from kdcache.train.runs.parallel import Ranks
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.student import build_student


@dataclass(frozen=True)
class Setting:
    """What a development set is made for.

    Attributes:
        section: the recipe's train section, with a development corpus.
        cache: an open cache.
        objective: of the student.
        model: the student.
        source: directory of the tokenizer of what is read.
        target: directory of the tokenizer of what is predicted.
        positions: longest sequence that the student takes; None: any.
    """

    section: TrainSection
    cache: Cache
    objective: Objective
    model: Any
    source: Path
    target: Path
    positions: int | None


class Development(Protocol):
    """A development set under a student's tokenizers."""

    def scores(
        self, model: Any, device: torch.device, batch_tokens: int, ranks: Ranks
    ) -> dict[str, float]:
        """Scores by their names in the metrics, `dev_loss` among them.

        Args:
            model: the student, on `device`.
            device: where it is.
            batch_tokens: padded tokens of one forward.
            ranks: which score the batches in turns.
        """
        ...


class Family(ABC):
    """A kind of students."""

    def completed(self, section: TrainSection, caches: Sequence[Cache]) -> TrainSection:
        """A section with what its recipe leaves to the caches, or to the student's directory.

        Args:
            section: the recipe's train section, with a student.
            caches: open.

        Raises:
            RecipeError: there is nothing to complete it from.
        """
        return section

    @abstractmethod
    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """The terms of a recipe over the signals of a cache.

        Raises:
            RecipeError: a term is not one of this family, or the cache cannot serve it.
            IdentityError: a signal labels other streams than the student reads.
        """

    def build(
        self,
        section: StudentSection,
        objective: Objective,
        tokenizer: TokenizerRecord,
        vocab_size: int,
        seed: int,
        source: TokenizerRecord | None,
    ) -> Any:
        """The student of a recipe.

        Args:
            section: the recipe's student.
            objective: from `objective`.
            tokenizer: see `build_student`.
            vocab_size: see `build_student`.
            seed: recipe seed.
            source: see `build_student`.

        Raises:
            ModelError: it cannot be built.
        """
        return build_student(section, tokenizer, vocab_size, seed, source)

    @abstractmethod
    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """Student and objective as one module.

        Raises:
            RecipeError: a term wants a layer that there is not.
        """

    @abstractmethod
    def check_labels(self, micro: Batch, objective: Objective) -> None:
        """Check that labels belong to what the student predicts; on the host.

        Raises:
            TrainingError: they do not.
        """

    @abstractmethod
    def development(self, setting: Setting) -> Development:
        """The development set of a recipe.

        Raises:
            RecipeError: it lacks a field, or nothing of it fits the student.
        """
