"""The objective of a masked LM: losses at masked tokens, hard, soft or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.signals import LogitsRecord, MasksRecord, SignalRecord
from kdcache.recipe import CrossEntropyTerm, MaskedKLTerm, SoftTerm, Term
from kdcache.train.losses.objective import Objective, Part, used_terms
from kdcache.train.losses.soft_terms import check_tails

#: What an `at` is called.
PLACES = {"masked": "masked tokens", "segment_in_place": "masked segments in their places"}


class MaskedObjective(Objective):
    """The terms of a recipe over the signals of a cache; one that never counts is not built.

    Args:
        terms: the recipe's objective.
        signals: the cache's signals.
        stream: what the student reads with tokens masked, and predicts there.

    Attributes:
        masks: name of the masks signal, the same for all terms.
        predicted: what the masked tokens are called where a stream's tokens are counted.

    Others as `Objective` has them; `soft_labels` are those of the masked tokens. A class of it says
    where its labels are (`place`), and what the student and the teacher are called.

    Raises:
        RecipeError: no term, one that a masked LM cannot have, a signal that is not there, or
            one that cannot serve the term.
        IdentityError: a signal is of another stream.
    """

    place = "masked"
    student, teacher = "a masked LM", "a masked model"

    def __init__(
        self, terms: Sequence[Term], signals: Mapping[str, SignalRecord], stream: str
    ) -> None:
        self.source = self.target = stream
        self.paths, self.terms, self.names = used_terms(terms)
        self.records, self.hypotheses = {}, {}
        found: dict[str, str] = {}
        for where, term in zip(self.paths, self.terms, strict=True):
            for name in self._masks_of(where, term, signals):
                found.setdefault(name, where)
                self.records[name] = signals[name]
        if len(found) > 1:
            (masks, first), (other, second) = list(found.items())[:2]
            raise RecipeError(
                f"{second}: is of masks {other!r}, {first} of {masks!r}; {self.student} reads one "
                "masking: give all terms the same"
            )
        (self.masks,) = found
        self.predicted = f"{self.masks}.masked"
        self.parts = [
            [Part(self.predicted, one) for one in term.signals]
            if isinstance(term, SoftTerm)
            else [Part(self.predicted, None)]
            for term in self.terms
        ]

    @property
    def soft_labels(self) -> dict[str, LogitsRecord]:
        """Those of the signals that label the masked tokens."""
        found = self.records.items()
        return {name: one for name, one in found if isinstance(one, LogitsRecord)}

    def _masks_of(self, where: str, term: Term, signals: Mapping[str, SignalRecord]) -> list[str]:
        """The masks that a term is of; its labels join the records."""
        hard = isinstance(term, CrossEntropyTerm)
        soft = isinstance(term, SoftTerm) and not isinstance(term, MaskedKLTerm)
        if not hard and not soft:
            raise RecipeError(
                f"{where}: {term.loss} is no term of {self.student}, which takes cross_entropy "
                "with masks, and losses over logits at masked tokens"
            )
        if term.sample_weight is not None:
            raise RecipeError(
                f"{where}.sample_weight: {self.student}'s terms have none; take it out"
            )
        if isinstance(term, CrossEntropyTerm):
            if term.masks is None:
                raise RecipeError(
                    f"{where}.masks: is null; {self.student} predicts the tokens of a masks "
                    f"signal, of which the cache has {_named(signals, MasksRecord)}"
                )
            return [self._checked_masks(f"{where}.masks", term.masks, signals)]
        assert isinstance(term, SoftTerm)
        return [self._masks_of_labels(where, name, term, signals) for name in term.signals]

    def _masks_of_labels(
        self, where: str, name: str, term: SoftTerm, signals: Mapping[str, SignalRecord]
    ) -> str:
        """The masks that one of a term's signals labels."""
        record = signals.get(name)
        if not isinstance(record, LogitsRecord) or record.at != self.place:
            raise RecipeError(
                f"{where}.signal: {name!r} is no logits signal at {PLACES[self.place]}, of which "
                f"the cache has {_named(signals, LogitsRecord, self.place)}; dump with "
                f"{self.teacher} {name}: {{at: {self.place}, stream: {self.source}, masks: NAME}}"
            )
        check_tails(where, term, record)
        self.records[name] = record
        assert record.masks is not None
        return self._checked_masks(f"{where}.signal", record.masks, signals)

    def _checked_masks(self, where: str, name: str, signals: Mapping[str, SignalRecord]) -> str:
        """The name of a masks signal over what the student reads."""
        record = signals.get(name)
        if not isinstance(record, MasksRecord):
            raise RecipeError(
                f"{where}: {name!r} is no masks signal of the cache, which has "
                f"{_named(signals, MasksRecord)}; dump {name}: {{kind: masks, stream: "
                f"{self.source}}}"
            )
        if record.stream != self.source:
            raise IdentityError(
                f"{where}: {name!r} masks stream {record.stream!r}, the student reads "
                f"{self.source!r}; set train.source and train.target to the signal's stream"
            )
        return name


class SegmentObjective(MaskedObjective):
    """The same of an encoder-decoder that predicts a masked segment, every token in its place."""

    place = "segment_in_place"
    student, teacher = "a masked_seq2seq", "an encoder-decoder"


def _named(
    signals: Mapping[str, SignalRecord], kind: type[SignalRecord], at: str | None = None
) -> list[str]:
    """Names of the signals of a kind, at some place."""
    found = sorted(signals.items())
    return [n for n, one in found if isinstance(one, kind) and at in (None, getattr(one, "at", at))]
