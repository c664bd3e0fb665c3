"""The objective of a recipe: which losses are built, from what, and with which weight when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdcache.errors import RecipeError
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.recipe import (
    ClassifierTerm,
    CrossEntropyTerm,
    LayersTerm,
    MaskedKLTerm,
    ScoreMSETerm,
    SoftTerm,
    TaskLossTerm,
    Term,
)
from kdcache.train.batches.gold import GoldLabels
from kdcache.train.batches.hypotheses import hypothesis_stream
from kdcache.train.batches.tasks import TaskGold, TaskOrder
from kdcache.train.losses.label_signals import check_beams_signal, check_label_signal
from kdcache.train.losses.layer_terms import check_layers_signal, check_scores_signal
from kdcache.train.losses.masked_terms import check_masked_signal
from kdcache.train.losses.schedule import value_at
from kdcache.train.losses.soft_terms import check_soft_signals


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


@dataclass(frozen=True)
class Part:
    """Tokens that a term over the vocabulary is over; most terms have one part.

    Attributes:
        stream: whose tokens are predicted: the target, or a stream of hypotheses.
        signal: of soft labels at its tokens; None for the tokens themselves.
    """

    stream: str
    signal: str | None


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
        parts: of each, where it is over the vocabulary; else none.
        records: of the signals that they need.
        hypotheses: streams of hypotheses that they predict, to the beams signal and which of its
            hypotheses.
        gold: how gold labels of samples become targets; None where no term is over them.
        tasks: of which every batch is of one; None where tasks do not matter.

    Raises:
        RecipeError: no term, a signal that is not there, or one that cannot serve the term.
        IdentityError: a signal labels other streams than the student reads.
    """

    gold: GoldLabels | TaskGold | None = None
    tasks: TaskOrder | None = None

    def __init__(
        self, terms: Sequence[Term], signals: Mapping[str, SignalRecord], source: str, target: str
    ) -> None:
        self.source, self.target = source, target
        self.paths, self.terms, self.names = used_terms(terms)
        self.records: dict[str, SignalRecord] = {}
        self.hypotheses: dict[str, tuple[str, int]] = {}
        self.parts: list[list[Part]] = []
        for where, term in zip(self.paths, self.terms, strict=True):
            self.parts.append(self._built(where, term, signals))
            weighing = weighing_signal(where, term)
            if weighing is not None:
                path = f"{where}.sample_weight"
                record = check_label_signal(path, weighing, "it", signals, source, target)
                self._read_labels(record, signals)

    def _built(self, where: str, term: Term, signals: Mapping[str, SignalRecord]) -> list[Part]:
        """The parts of a term, after checking its signals and noting what is to be read."""
        streams = self.source, self.target
        if isinstance(term, CrossEntropyTerm):
            if term.hypotheses is None:
                return [Part(self.target, None)]
            named = term.hypotheses, term.hypothesis
            check_beams_signal(f"{where}.hypotheses", *named, signals, *streams)
            return [Part(self._read_hypotheses(named, signals), None)]
        if isinstance(term, MaskedKLTerm):
            check_masked_signal(where, term, signals, self.source)
        elif isinstance(term, SoftTerm):
            records = check_soft_signals(where, term, signals, *streams)
            return [Part(self._read_labels(one, signals), one.name) for one in records]
        elif isinstance(term, LayersTerm):
            check_layers_signal(where, term, signals.get(term.signal))
        elif isinstance(term, ClassifierTerm):
            raise RecipeError(f"{where}: {term.loss} goes with a student of kind classifier")
        elif isinstance(term, TaskLossTerm):
            raise RecipeError(f"{where}: {term.loss} goes with a student of kind multi_task")
        else:
            check_scores_signal(where, term, signals.get(term.signal), self.source)
        # Where the teacher read masked tokens the student is to read them too.
        masks = signals[term.signal].masks
        self.records |= {name: signals[name] for name in (term.signal, masks) if name is not None}
        return []

    def _read_labels(self, record: LogitsRecord, signals: Mapping[str, SignalRecord]) -> str:
        """Note soft labels and what they label, of which this is the stream."""
        self.records[record.name] = record
        if record.hypotheses is not None:
            assert isinstance(record.hypothesis, int)
            self._read_hypotheses((record.hypotheses, record.hypothesis), signals)
        return self.stream_of(record.name)

    def _read_hypotheses(self, named: tuple[str, int], signals: Mapping[str, SignalRecord]) -> str:
        """Note hypotheses, of which this is the stream."""
        name = hypothesis_stream(*named)
        self.hypotheses[name] = named
        self.records[named[0]] = signals[named[0]]
        return name

    def stream_of(self, signal: str) -> str:
        """The stream whose tokens one of the logits signals labels."""
        record = self.records[signal]
        assert isinstance(record, LogitsRecord)
        if record.hypotheses is None:
            return self.target
        assert isinstance(record.hypothesis, int)
        return hypothesis_stream(record.hypotheses, record.hypothesis)

    def count(self, number: int, counts: Mapping[str, int]) -> int:
        """Units that a term is the mean over, at least 1.

        Args:
            number: of the term.
            counts: of a global batch, see `GlobalBatch`.
        """
        term, names = self.terms[number], [part.stream for part in self.parts[number]]
        if not names:
            assert isinstance(term, LayersTerm | ScoreMSETerm | MaskedKLTerm)
            names = [term.signal]
        return max(1, sum(counts[name] for name in names))

    @property
    def over_references(self) -> bool:
        """Whether some term is over the tokens of references."""
        return any(part.stream == self.target for parts in self.parts for part in parts)

    @property
    def signals(self) -> list[str]:
        """Names of the signals that the terms need."""
        return list(self.records)

    @property
    def soft_labels(self) -> dict[str, LogitsRecord]:
        """Those of them that label the target's tokens, or those of a hypothesis."""
        found = {n: one for n, one in self.records.items() if isinstance(one, LogitsRecord)}
        return {name: one for name, one in found.items() if one.masks is None}

    @property
    def labelled(self) -> dict[str, list[str]]:
        """Streams that are predicted, to those of the signals that label their tokens."""
        found: dict[str, list[str]] = {}
        for name in self.soft_labels:
            found.setdefault(self.stream_of(name), []).append(name)
        return found

    @property
    def masked_labels(self) -> dict[str, str]:
        """Signals that label masked tokens, each with the masks that it was made from."""
        found = self.records.items()
        return {
            name: one.masks
            for name, one in found
            if isinstance(one, LogitsRecord) and one.masks is not None
        }

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
    """The one signal that says how much each sample counts, for all labels of the term.

    None where all count alike, and where each of the term's own signals says it of its labels.

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
    return term.sample_weight.signal
