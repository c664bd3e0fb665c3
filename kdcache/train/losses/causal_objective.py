"""The objective of a causal LM: losses at every token but the first, and over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.recipe import LayersTerm, MaskedKLTerm, ScoreMSETerm, SoftTerm, Term
from kdcache.train.losses.layer_terms import check_layers_signal
from kdcache.train.losses.objective import Objective, Part, used_terms
from kdcache.train.losses.soft_terms import check_tails


class CausalObjective(Objective):
    """The terms of a recipe over the signals of a cache; one that never counts is not built.

    Args:
        terms: the recipe's objective.
        signals: the cache's signals.
        stream: what the student reads and predicts.

    Attributes:
        predicted: what its predicted tokens are called where a stream's tokens are counted.

    Others as `Objective` has them; `soft_labels` are those of the predicted tokens.

    Raises:
        RecipeError: no term, one that a causal LM cannot have, a signal that is not there, or one
            that cannot serve the term.
        IdentityError: a signal is of another stream.
    """

    def __init__(
        self, terms: Sequence[Term], signals: Mapping[str, SignalRecord], stream: str
    ) -> None:
        self.source = self.target = stream
        self.predicted = f"{stream}.predicted"
        self.paths, self.terms, self.names = used_terms(terms)
        self.records, self.hypotheses = {}, {}
        self.parts = []
        for where, term in zip(self.paths, self.terms, strict=True):
            _check_term(where, term)
            if isinstance(term, LayersTerm):
                check_layers_signal(where, term, signals.get(term.signal))
                self.records[term.signal] = _of_decoder(where, signals[term.signal])
                self.parts.append([])
            elif isinstance(term, SoftTerm):
                for name in term.signals:
                    self.records[name] = self._labels(where, name, term, signals)
                self.parts.append([Part(self.predicted, name) for name in term.signals])
            else:
                self.parts.append([Part(self.predicted, None)])

    def _labels(
        self, where: str, name: str, term: SoftTerm, signals: Mapping[str, SignalRecord]
    ) -> LogitsRecord:
        """One of a term's signals, which labels what the student predicts."""
        record = signals.get(name)
        if not isinstance(record, LogitsRecord) or record.at != "positions":
            usable = sorted(
                other
                for other, one in signals.items()
                if isinstance(one, LogitsRecord) and one.at == "positions"
            )
            raise RecipeError(
                f"{where}.signal: {name!r} is no logits signal at positions, of which the cache "
                f"has {usable}; dump with a causal model {name}: "
                f"{{at: positions, stream: {self.source}}}"
            )
        if record.stream != self.source:
            raise IdentityError(
                f"{where}.signal: {name!r} labels stream {record.stream!r}, the student reads "
                f"{self.source!r}; set train.source and train.target to the signal's stream"
            )
        check_tails(where, term, record)
        return record


def _of_decoder(where: str, record: SignalRecord) -> SignalRecord:
    """A signal of layers, if a causal model made it."""
    side = getattr(record, "side", None)
    if side != "decoder":
        raise RecipeError(
            f"{where}.signal: {record.name!r} is of side {side}, a causal LM has side decoder "
            f"alone; dump with a causal model {record.name}: {{kind: {record.kind}, side: decoder}}"
        )
    return record


def _check_term(where: str, term: Term) -> None:
    """Refuse what a causal LM cannot have."""
    if isinstance(term, MaskedKLTerm | ScoreMSETerm):
        raise RecipeError(
            f"{where}: {term.loss} is no term of a causal LM, which takes cross_entropy, "
            "losses over logits at positions, and losses over layers of side decoder"
        )
    if term.sample_weight is not None:
        raise RecipeError(f"{where}.sample_weight: a causal LM's terms have none; take it out")
    for key in ("masks", "hypotheses"):
        if getattr(term, key, None) is not None:
            raise RecipeError(
                f"{where}.{key}: a causal LM predicts the tokens of train.source; take it out"
            )
