"""The objective of a recipe: which losses are built, from what, and with which weight when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.errors import RecipeError
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.recipe import LayersTerm, MaskedKLTerm, ScoreMSETerm, SoftTerm, Term
from kdcache.train.losses.layer_terms import check_layers_signal, check_scores_signal
from kdcache.train.losses.masked_terms import check_masked_signal
from kdcache.train.losses.schedule import value_at
from kdcache.train.losses.soft_terms import check_reference_signal, check_soft_signal


@dataclass(frozen=True)
class Moment:
    """A term as it stands at one step.

    Attributes:
        number: of the term among the objective's.
        weight: above 0, Hinton's squared temperature included.
        temperature: 1 for terms without one.
    """

    number: int
    weight: float
    temperature: float


class Objective:
    """The terms of a recipe over the signals of a cache; one that never counts is not built.

    Args:
        terms: the recipe's objective.
        signals: the cache's signals.
        source: stream the student's encoder reads.
        target: stream the student predicts.

    Attributes:
        source: stream the student's encoder reads.
        target: stream the student predicts.
        terms: those that count at some time.
        paths: where each stands in the recipe.
        names: name of each in metrics: its loss, numbered where a loss stands twice.
        records: of the signals that they need.

    Raises:
        RecipeError: no term, a signal that is not there, or one that cannot serve the term.
        IdentityError: a signal labels other streams than the student reads.
    """

    def __init__(
        self, terms: Sequence[Term], signals: Mapping[str, SignalRecord], source: str, target: str
    ) -> None:
        self.source, self.target = source, target
        self.paths, self.terms, self.names = used_terms(terms)
        self.records: dict[str, SignalRecord] = {}
        for where, term in zip(self.paths, self.terms, strict=True):
            if isinstance(term, MaskedKLTerm):
                check_masked_signal(where, term, signals, source)
            elif isinstance(term, SoftTerm):
                check_soft_signal(where, term, signals, source, target)
            elif isinstance(term, LayersTerm):
                check_layers_signal(where, term, signals.get(term.signal))
            elif isinstance(term, ScoreMSETerm):
                check_scores_signal(where, term, signals.get(term.signal), source)
            named = [] if term.loss == "cross_entropy" else [term.signal]
            weighing = weighing_signal(where, term)
            if weighing is not None:
                path = f"{where}.sample_weight"
                check_reference_signal(path, weighing, "it", signals, source, target)
                named.append(weighing)
            # Where the teacher read masked tokens the student is to read them too.
            masks = [signals[name].masks for name in named]
            named += [name for name in masks if name is not None]
            self.records |= {name: signals[name] for name in named}

    @property
    def signals(self) -> list[str]:
        """Names of the signals that the terms need."""
        return list(self.records)

    @property
    def soft_labels(self) -> dict[str, LogitsRecord]:
        """Those of them that label the target's tokens."""
        found = {n: one for n, one in self.records.items() if isinstance(one, LogitsRecord)}
        return {name: one for name, one in found.items() if one.masks is None}

    def vocab_size(self, student_rows: int) -> int:
        """Ids the losses are over: the student's, without rows that no teacher knows of.

        Args:
            student_rows: rows of the student's output projection.
        """
        return min([student_rows, *(one.vocab_size for one in self.soft_labels.values())])

    def at(self, step: int, total_steps: int) -> list[Moment]:
        """The terms that count at a step.

        Args:
            step: optimiser step, from 1.
            total_steps: last step of the run.
        """
        found = []
        for number, term in enumerate(self.terms):
            weight = value_at(term.weight, term.weight_schedule, step, total_steps)
            temperature = 1.0
            if isinstance(term, SoftTerm):
                schedule = term.temperature_schedule
                temperature = value_at(term.temperature, schedule, step, total_steps)
                weight *= temperature**2 if term.temperature_squared else 1.0
            if weight > 0:
                found.append(Moment(number, weight, temperature))
        return found


def used_terms(terms: Sequence[Term]) -> tuple[list[str], list[Term], list[str]]:
    """The terms that count at some time: their paths in the recipe, themselves, and their names.

    Raises:
        RecipeError: there is none.
    """
    used = [(f"train.objective.{n}", term) for n, term in enumerate(terms) if term.used]
    if not used:
        raise RecipeError(
            "train.objective has no term with a weight; give at least "
            "{loss: cross_entropy, weight: 1.0}"
        )
    kinds = [term.loss for _, term in used]
    names = [
        kind if kinds.count(kind) == 1 else f"{kind}.{kinds[:number].count(kind)}"
        for number, kind in enumerate(kinds)
    ]
    return [path for path, _ in used], [term for _, term in used], names


def weighing_signal(where: str, term: Term) -> str | None:
    """The signal that says how much each sample counts; None where all count alike.

    Args:
        where: the term's path in the recipe.
        term: any.

    Raises:
        RecipeError: the term's own labels cannot say it, and no signal is named.
    """
    if term.sample_weight is None:
        return None
    own = isinstance(term, SoftTerm) and not isinstance(term, MaskedKLTerm)
    if term.sample_weight.signal is None and not own:
        raise RecipeError(
            f"{where}.sample_weight.signal: is missing; {term.loss} has no labels of the target"
        )
    return term.sample_weight.signal or term.signal  # type: ignore[union-attr]
