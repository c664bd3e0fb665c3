"""Signals at the tokens that a student predicts: those of the reference, or of a hypothesis."""

from __future__ import annotations

from collections.abc import Mapping

from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.signals import BeamsRecord, LogitsRecord, SignalRecord


def check_label_signal(
    where: str,
    name: str,
    what: str,
    signals: Mapping[str, SignalRecord],
    source: str,
    target: str,
) -> LogitsRecord:
    """A signal of soft labels at tokens that the student predicts.

    Args:
        where: path in the recipe.
        name: of the signal.
        what: needs it.
        signals: of the cache.
        source: stream the student's encoder reads.
        target: stream it predicts.

    Raises:
        RecipeError: it is none, or not there.
        IdentityError: it labels other streams.
    """
    record = signals.get(name)
    if record is None:
        raise RecipeError(
            f"{where}.signal: cache has no signal {name!r}; it has {sorted(signals)}; dump "
            "it, or wait until the dump that is on its way comes to it"
        )
    if not isinstance(record, LogitsRecord) or not _at_predicted(record):
        usable = sorted(other for other, found in signals.items() if _at_predicted(found))
        of_all = isinstance(record, LogitsRecord) and record.hypothesis == "all"
        raise RecipeError(
            f"{where}.signal: {name!r} is {_described(record)}; {what} needs logits at the "
            f"reference's targets, or of one hypothesis, of which the cache has {usable}; dump "
            f"another{', with hypothesis 0' if of_all else ''}"
        )
    _check_streams(where, "labels", record, source, target)
    if record.hypotheses is not None:
        assert isinstance(record.hypothesis, int)
        named = record.hypotheses, record.hypothesis
        check_beams_signal(f"{where}: signal {name!r}", *named, signals, source, target)
    return record


def check_beams_signal(
    where: str,
    name: str,
    number: int,
    signals: Mapping[str, SignalRecord],
    source: str,
    target: str,
) -> BeamsRecord:
    """A signal of hypotheses that the student can predict.

    Args:
        where: what asks for them.
        name: of the signal.
        number: which hypothesis of each sample, 0 the best.
        signals: of the cache.
        source: stream the student's encoder reads.
        target: stream it predicts.

    Raises:
        RecipeError: it is none, not there, or has not so many.
        IdentityError: the hypotheses are of another source, or in another stream's tokens.
    """
    record = signals.get(name)
    if not isinstance(record, BeamsRecord):
        usable = sorted(n for n, other in signals.items() if isinstance(other, BeamsRecord))
        found = (
            f"cache has no signal {name!r}"
            if record is None
            else f"{name!r} is {_described(record)}"
        )
        free = name if record is None else "beams"
        kind = f"{{kind: beams, source: {source}, stream: {target}}}"
        advice = "name one of those" if usable else f"dump it: --dump.signals.{free} '{kind}'"
        raise RecipeError(
            f"{where}: {found}; hypotheses are a signal of kind beams, of which the cache has "
            f"{usable}; {advice}"
        )
    if number >= record.num_hypotheses:
        raise RecipeError(
            f"{where}: hypothesis {number} of signal {name!r}, which keeps {record.num_hypotheses} "
            f"for each sample; take one below that, or dump with num_hypotheses {number + 1}"
        )
    _check_streams(where, "is written in", record, source, target)
    return record


def check_text(cache: Cache, target: str) -> None:
    """Refuse references that were dumped without text: their targets are end tokens alone.

    Args:
        cache: that is trained on.
        target: stream that the student predicts.

    Raises:
        RecipeError: there is no text.
    """
    field, corpus = cache.stream(target).field, cache.manifest.recipe.get("corpus", {})
    if field not in corpus.get("without", []) or not cache.num_shards:
        return
    # Where hypotheses have become the targets since, they have some.
    if not any(text.strip() for text in cache.samples(0).text(field).to_pylist()):
        raise RecipeError(
            f"train.objective: {cache.path} was dumped without text in {field!r} "
            f"(corpus.without), so there are no references in stream {target!r}; name a beams "
            "signal as the term's hypotheses, or make them targets by `kdcache compile --targets`"
        )


def _check_streams(
    where: str, does: str, record: LogitsRecord | BeamsRecord, source: str, target: str
) -> None:
    """Refuse what is not of the student's streams."""
    for role, found, expected in (
        (does, record.stream, target),
        ("was made from source", record.source, source),
    ):
        if found != expected:
            raise IdentityError(
                f"{where}: signal {record.name!r} {role} stream {found!r}, the student uses "
                f"{expected!r}; set train.source and train.target to the signal's streams"
            )


def _at_predicted(record: SignalRecord) -> bool:
    """Whether a signal labels tokens that a student can be asked to predict."""
    if not isinstance(record, LogitsRecord) or record.at != "targets":
        return False
    return record.hypotheses is None or record.hypothesis != "all"


def _described(record: SignalRecord) -> str:
    """A signal in a word or three."""
    if not isinstance(record, LogitsRecord):
        return f"of kind {record.kind}"
    if record.hypotheses is not None:
        return f"logits of all hypotheses ({record.hypotheses})"
    return f"logits at {record.at}"
