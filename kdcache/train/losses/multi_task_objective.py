"""The objective of a student of several tasks: its terms, each over the task of a batch."""

# C scores of a task

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcache.errors import RecipeError
from kdcache.formats.signals import ClassesRecord, SignalRecord
from kdcache.models.tasks import Task
from kdcache.recipe import ScoreKLTerm, ScoreMSETerm, TaskLossTerm, Term
from kdcache.train.batches.gold import GOLD, shown
from kdcache.train.batches.tasks import TaskGold, TaskOrder
from kdcache.train.losses.layer_terms import check_scores_signal
from kdcache.train.losses.objective import Moment, Objective, used_terms
from kdcache.train.losses.score_terms import tempered

#: What a signal of each kind of task says.
PROBLEMS = {
    "classification": "classification",
    "similarity": "regression",
    "ranking": "regression",
}


class MultiTaskObjective(Objective):
    """The terms of a recipe over the signals of a cache; one that never counts is not built.

    Args:
        terms: the recipe's objective.
        signals: the cache's signals.
        stream: what the student reads.
        heads: its tasks by name.

    Attributes:
        heads: as given.

    Others as `Objective` has them.

    Raises:
        RecipeError: no term, one that such a student cannot have, or a signal that is not there
            or has other labels.
        IdentityError: a signal is of another stream.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        signals: Mapping[str, SignalRecord],
        stream: str,
        heads: Mapping[str, Task],
    ) -> None:
        self.source = self.target = stream
        self.paths, self.terms, self.names = used_terms(terms)
        self.hypotheses, self.records = {}, {}
        self.parts = [[] for _ in self.terms]
        self.heads = dict(heads)
        hard = []
        for where, term in zip(self.paths, self.terms, strict=True):
            _check_kind(where, term, self.heads)
            if isinstance(term, TaskLossTerm):
                hard.append(where)
                continue
            assert isinstance(term, ScoreMSETerm | ScoreKLTerm)
            for name, task in self.heads.items():
                record = task_signal(where, term, signals, stream, name)
                _check_labels(where, record, name, task)
                self.records[record.name] = record
        rankings = tuple(name for name, task in heads.items() if task.kind == "ranking")
        self.tasks = TaskOrder(tuple(heads), rankings if hard else (), stream)
        alone = len(hard) == len(self.terms)
        self.gold = TaskGold(self.heads, hard[0], alone) if hard else None

    def count(self, number: int, counts: Mapping[str, int]) -> int:
        """Samples that a term is the mean over, at least 1.

        Args:
            number: of the term.
            counts: of a global batch, see `GlobalBatch`; all its samples are of one task.
        """
        term = self.terms[number]
        if isinstance(term, TaskLossTerm):
            return max(1, counts[GOLD])
        assert isinstance(term, ScoreMSETerm | ScoreKLTerm)
        found = sum(
            counts[signal_name(term, name)] // task.num_scores for name, task in self.heads.items()
        )
        return max(1, found)

    def at(self, step: int, total_steps: int) -> list[Moment]:
        """The terms that count at a step, see `Objective.at`."""
        return list(tempered(super().at(step, total_steps), self.terms))


def signal_name(term: ScoreMSETerm | ScoreKLTerm, task: str) -> str:
    """The signal of a term for one task."""
    return f"{term.signal}_{task}"


def task_signal(
    where: str,
    term: ScoreMSETerm | ScoreKLTerm,
    signals: Mapping[str, SignalRecord],
    stream: str,
    task: str,
) -> ClassesRecord:
    """The signal of a term for one task.

    Args:
        where: the term's path in the recipe.
        term: over it.
        signals: of the cache.
        stream: what the student reads.
        task: its name.

    Raises:
        RecipeError: it is not there, of another kind, or of another task.
        IdentityError: it is of another stream.
    """
    name = signal_name(term, task)
    record = signals.get(name)
    if record is None:
        kind = f"{{kind: classes, stream: {stream}, task: {task}}}"
        raise RecipeError(
            f"{where}.signal: cache has no signal {name!r}, which task {task!r} needs; dump it "
            f"(--dump.signals.{name} '{kind}'), or leave the task out (train.tasks)"
        )
    check_scores_signal(where, term, record, stream, name)
    assert isinstance(record, ClassesRecord)
    if record.task != task:
        raise RecipeError(
            f"{where}.signal: {name!r} labels the samples of task {record.task!r}; the student "
            f"needs those of task {task!r}; dump it with task: {task}"
        )
    return record


def _check_kind(where: str, term: Term, heads: Mapping[str, Task]) -> None:
    """Refuse a term that is not over scores of tasks."""
    if not isinstance(term, TaskLossTerm | ScoreMSETerm | ScoreKLTerm):
        raise RecipeError(
            f"{where}: {term.loss} is no term of a multi_task student, which takes task_loss, "
            "score_mse and score_kl"
        )
    if term.sample_weight is not None:
        raise RecipeError(f"{where}.sample_weight: a multi_task student's terms have none")
    numbers = [name for name, task in heads.items() if task.kind != "classification"]
    if isinstance(term, ScoreKLTerm) and numbers:
        raise RecipeError(
            f"{where}: score_kl is of classes, task {numbers[0]!r} says a number; take score_mse"
        )


def _check_labels(where: str, record: ClassesRecord, name: str, task: Task) -> None:
    """Refuse scores of other labels than the student's."""
    if record.problem != PROBLEMS[task.kind] or len(record.labels) != task.num_scores:
        raise RecipeError(
            f"{where}.signal: {record.name!r} is of problem {record.problem} with "
            f"{len(record.labels)} scores; task {name!r} is a {task.kind} with {task.num_scores}"
        )
    if task.kind == "classification" and tuple(record.labels) != task.labels:
        raise RecipeError(
            f"{where}.signal: {record.name!r} has the labels {shown(record.labels)}, the student "
            f"{shown(task.labels)}; give train.student.tasks.{name}.labels the same names in the "
            "same order"
        )
