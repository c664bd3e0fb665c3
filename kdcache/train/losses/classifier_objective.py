"""The objective of a classifier: losses over classes, gold or a teacher's, and over layers."""

# C classes

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcache.errors import RecipeError
from kdcache.formats.signals import ClassesRecord, SignalRecord
from kdcache.recipe import (
    ClassifierTerm,
    LabelCrossEntropyTerm,
    LabelMSETerm,
    LayersTerm,
    ScoreKLTerm,
    ScoreMSETerm,
    Term,
)
from kdcache.train.batches.gold import GOLD, GoldLabels, shown
from kdcache.train.losses.layer_terms import check_layers_signal, check_scores_signal
from kdcache.train.losses.objective import Moment, Objective, used_terms
from kdcache.train.losses.score_terms import tempered


class ClassifierObjective(Objective):
    """The terms of a recipe over the signals of a cache; one that never counts is not built.

    Args:
        terms: the recipe's objective.
        signals: the cache's signals.
        stream: what the student reads.
        labels: names of its classes; None: those of the terms' signals, also of a term without
            weight.
        task: whose gold labels count; None: that of the terms' signals, else all.
        bounds: the lowest and the highest gold number; None: any.

    Attributes:
        labels: C names; a single one: the student says a number.

    Others as `Objective` has them.

    Raises:
        RecipeError: no term, one that a classifier cannot have, a signal that is not there or
            has other labels, or nothing that names the labels.
        IdentityError: a signal is of another stream.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        signals: Mapping[str, SignalRecord],
        stream: str,
        labels: Sequence[str] | None = None,
        task: str | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.source = self.target = stream
        self.paths, self.terms, self.names = used_terms(terms)
        self.hypotheses, self.records = {}, {}
        self.parts = [[] for _ in self.terms]
        used = list(zip(self.paths, self.terms, strict=True))
        found = None if labels is None else tuple(labels)
        for where, term in used:
            _check_kind(where, term)
            if isinstance(term, LayersTerm):
                check_layers_signal(where, term, signals.get(term.signal))
                self.records[term.signal] = _of_plain_encoder(where, signals[term.signal])
            if isinstance(term, ScoreMSETerm | ScoreKLTerm):
                record = signals.get(term.signal)
                check_scores_signal(where, term, record, stream)
                assert isinstance(record, ClassesRecord)
                self.records[term.signal] = record
                task = record.task if task is None else task
                found = _agreed(where, record, found)
        if found is None:
            found = _named_by_unused(terms, signals)
        if found is None:
            raise RecipeError(
                "train.student.labels: is null, and no term names a classes signal; list the names "
                "of the classes as the gold labels have them, or one name for a number"
            )
        self.labels: tuple[str, ...] = found
        hard = [
            (where, t) for where, t in used if isinstance(t, LabelCrossEntropyTerm | LabelMSETerm)
        ]
        for where, term in used:
            _check_number(where, term, self.labels)
        if bounds is not None and len(self.labels) > 1:
            raise RecipeError(
                f"train.student.range: is of a number, the student says which of "
                f"{shown(self.labels)} a text is; take it out"
            )
        self.gold = GoldLabels(self.labels, task, hard[0][0], range=bounds) if hard else None

    def count(self, number: int, counts: Mapping[str, int]) -> int:
        """Samples, of a term over layers rows, that a term is the mean over, at least 1.

        Args:
            number: of the term.
            counts: of a global batch, see `GlobalBatch`.
        """
        term = self.terms[number]
        if isinstance(term, ScoreMSETerm | ScoreKLTerm):
            return max(1, counts[term.signal] // len(self.labels))
        if isinstance(term, LayersTerm):
            return max(1, counts[term.signal])
        return max(1, counts[GOLD])

    def at(self, step: int, total_steps: int) -> list[Moment]:
        """The terms that count at a step, see `Objective.at`."""
        return list(tempered(super().at(step, total_steps), self.terms))


def _named_by_unused(
    terms: Sequence[Term], signals: Mapping[str, SignalRecord]
) -> tuple[str, ...] | None:
    """Labels of the first classes signal that a term without weight names, if the cache has it."""
    for term in terms:
        if isinstance(term, ScoreMSETerm | ScoreKLTerm):
            record = signals.get(term.signal)
            if isinstance(record, ClassesRecord):
                return tuple(record.labels)
    return None


def _check_kind(where: str, term: Term) -> None:
    """Refuse a term that is neither over classes nor over layers."""
    if not isinstance(term, ClassifierTerm | ScoreMSETerm | LayersTerm):
        raise RecipeError(
            f"{where}: {term.loss} is no term of a classifier, which takes label_cross_entropy, "
            "label_mse, score_mse, score_kl, hidden_mse, hidden_cosine and attention_mse"
        )
    if term.sample_weight is not None:
        raise RecipeError(f"{where}.sample_weight: a classifier's terms have none; take it out")


def _of_plain_encoder(where: str, record: SignalRecord) -> SignalRecord:
    """A signal of layers, if it is of an encoder that read what the student reads."""
    side = getattr(record, "side", None)
    if side != "encoder" or record.masks is not None:
        found = f"of side {side}" if side != "encoder" else f"of inputs masked by {record.masks!r}"
        raise RecipeError(
            f"{where}.signal: {record.name!r} is {found}; a classifier learns layers of an encoder "
            f"over plain inputs: dump {record.name}: {{kind: {record.kind}, side: encoder}}"
        )
    return record


def _agreed(where: str, record: ClassesRecord, labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """The labels of the student, after comparing those of a signal with them."""
    own = tuple(record.labels)
    if record.problem == "multi_label" or (record.problem == "regression") != (len(own) == 1):
        raise RecipeError(
            f"{where}.signal: {record.name!r} is of problem {record.problem} with {len(own)} "
            "labels; a classifier has one class a sample, or says one number"
        )
    if labels is None:
        return own
    # Of a number the name means nothing.
    if labels != own and not len(labels) == len(own) == 1:
        raise RecipeError(
            f"{where}.signal: {record.name!r} has the labels {shown(own)}, the student "
            f"{shown(labels)}; give train.student.labels the same names in the same order"
        )
    return labels


def _check_number(where: str, term: Term, labels: Sequence[str]) -> None:
    """Refuse a term of classes for a number, and the other way round."""
    number = len(labels) == 1
    if isinstance(term, LabelMSETerm) and not number:
        raise RecipeError(
            f"{where}: label_mse is of numbers, the student has the classes {shown(labels)}; take "
            "label_cross_entropy, or name one label"
        )
    if isinstance(term, LabelCrossEntropyTerm | ScoreKLTerm) and number:
        raise RecipeError(
            f"{where}: {term.loss} is of classes, the student has one label, {labels[0]!r}, and "
            "says a number; take label_mse or score_mse"
        )
