"""The objective of a recipe: which losses are built, from what, and with which weight."""

# N positions, V vocabulary, E entries

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.labels import CodedLabels, LogitsSpec, SparseTarget, decode, resolve_tail
from kdcache.recipe import CrossEntropyTerm, ForwardKLTerm, Term
from kdcache.train.batch import Batch
from kdcache.train.losses import LossTerm, hard_target
from kdcache.train.narrowing import narrowed


class Objective:
    """The terms of a recipe over the signals of a cache; a term of weight 0 is not built.

    Args:
        terms: the recipe's objective.
        signals: the cache's signals.
        source: stream the student's encoder reads.
        target: stream the student predicts.

    Attributes:
        terms: those with a weight.
        names: name of each in metrics: its loss, numbered where a loss stands twice.
        signals: names of the signals they need.

    Raises:
        RecipeError: no term, a signal that is not there, or one that cannot serve the term.
        IdentityError: a signal labels other streams than the student reads.
    """

    def __init__(
        self, terms: Sequence[Term], signals: Mapping[str, SignalRecord], source: str, target: str
    ) -> None:
        self.target = target
        self.terms = [term for term in terms if term.weight > 0]
        if not self.terms:
            raise RecipeError(
                "train.objective has no term with a weight; give at least "
                "{loss: cross_entropy, weight: 1.0}"
            )
        self.records: dict[str, LogitsRecord] = {}
        for number, term in enumerate(terms):
            if isinstance(term, ForwardKLTerm) and term.weight > 0:
                record = _checked(f"train.objective.{number}", term, signals, source, target)
                self.records[term.signal] = record
        kinds = [term.loss for term in self.terms]
        self.names = [
            kind if kinds.count(kind) == 1 else f"{kind}.{kinds[:number].count(kind)}"
            for number, kind in enumerate(kinds)
        ]

    @property
    def signals(self) -> list[str]:
        """Names of the signals that the terms need."""
        return list(self.records)

    def vocab_size(self, student_rows: int) -> int:
        """Ids the losses are over: the student's, without rows that no teacher knows of.

        Args:
            student_rows: rows of the student's output projection.
        """
        return min([student_rows, *(record.vocab_size for record in self.records.values())])

    def loss_terms(self, batch: Batch, num_tokens: int, vocab_size: int) -> list[LossTerm]:
        """What `fused_loss` takes for one micro-batch.

        Every position weighs 1 / num_tokens, so the losses of all micro-batches of a global
        batch add up to its mean per token, however it was cut.

        Args:
            batch: on the device of the logits; N positions.
            num_tokens: target tokens of the whole global batch.
            vocab_size: V, from `vocab_size`.
        """
        labels = batch.streams[self.target].flat
        row_weight = torch.full((len(labels),), 1 / max(1, num_tokens), device=labels.device)
        built = []
        for term in self.terms:
            weight, temperature = term.weight, 1.0
            if isinstance(term, CrossEntropyTerm):
                target = hard_target(labels, vocab_size, term.label_smoothing)
            else:
                temperature = term.temperature
                coded = batch.signals[term.signal]
                assert isinstance(coded, CodedLabels)
                target = decode(coded, temperature, term.tail)
                if coded.spec.vocab_size > vocab_size:
                    target = _narrowed(term, coded.spec, target, vocab_size)
                if term.temperature_squared:
                    weight *= temperature**2
            built.append(LossTerm(target, temperature, weight, row_weight))
        return built


def _narrowed(
    term: ForwardKLTerm, spec: LogitsSpec, target: SparseTarget, num_ids: int
) -> SparseTarget:
    """A target over the ids that the student has."""
    tail = resolve_tail(spec.codec, spec.temperatures, term.temperature, term.tail)
    return narrowed(target, spec.vocab_size, num_ids, drawn=tail == "sampled")


def _checked(
    where: str,
    term: ForwardKLTerm,
    signals: Mapping[str, SignalRecord],
    source: str,
    target: str,
) -> LogitsRecord:
    """The signal of a term, if it can serve it."""
    record = signals.get(term.signal)
    if record is None:
        raise RecipeError(
            f"{where}.signal: cache has no signal {term.signal!r}; it has {sorted(signals)}; dump "
            "it, or wait until the dump that is on its way comes to it"
        )
    if not isinstance(record, LogitsRecord) or not _of_references(record):
        usable = sorted(name for name, other in signals.items() if _of_references(other))
        raise RecipeError(
            f"{where}.signal: {term.signal!r} is {_described(record)}; {term.loss} needs logits "
            f"at the reference's targets, of which the cache has {usable}"
        )
    for role, found, expected in (
        ("labels stream", record.stream, target),
        ("was made from source stream", record.source, source),
    ):
        if found != expected:
            raise IdentityError(
                f"{where}: signal {term.signal!r} {role} {found!r}, the student uses {expected!r}; "
                "set train.source and train.target to the signal's streams"
            )
    try:
        resolve_tail(record.codec, record.temperatures, term.temperature, term.tail)
    except RecipeError as error:
        raise RecipeError(f"{where}: signal {term.signal!r}: {error}") from None
    return record


def _of_references(record: SignalRecord) -> bool:
    """Whether a signal labels the tokens that a student is to predict."""
    labels = isinstance(record, LogitsRecord) and record.at == "targets"
    return labels and record.hypotheses is None


def _described(record: SignalRecord) -> str:
    """A signal in a word or three."""
    if not isinstance(record, LogitsRecord):
        return f"of kind {record.kind}"
    if record.hypotheses is not None:
        return f"logits of hypotheses ({record.hypotheses})"
    return f"logits at {record.at}"
