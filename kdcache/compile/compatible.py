"""What caches must share to be compiled into one, and which signals the one will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.compile.options import CompileOptions, Targets
from kdcache.compile.source import Source
from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.identity import differences
from kdcache.formats.manifest import Manifest
from kdcache.formats.signals import BeamsRecord, LogitsRecord, SignalRecord

#: What of two records of one signal may differ: who dumped it, from where, and for which samples.
_MAY_DIFFER = (
    "recipe",
    "versions",
    "seed",
    "stream_digest",
    "source_digest",
    "teacher.path",
    "teacher.revision",
)


@dataclass(frozen=True)
class PlannedSignal:
    """A signal of the output.

    Attributes:
        name: what the caches call it.
        record: that of the first cache that has it.
        carriers: numbers of the caches that have it, ascending.
        chosen: whether its labels of hypotheses become those of the new targets.
    """

    name: str
    record: SignalRecord
    carriers: tuple[int, ...]
    chosen: bool = False

    @property
    def inputs(self) -> list[str]:
        """Signals of the output that it is made from, by the names of the caches."""
        return [] if self.chosen else self.record.inputs


def check_manifests(sources: Sequence[Source]) -> None:
    """Refuse caches whose samples cannot stand in one cache.

    Raises:
        IdentityError: with both sides.
    """
    first = sources[0]
    for other in sources[1:]:
        faults = differences(_shape(first.cache.manifest), _shape(other.cache.manifest))
        if faults:
            shown = "; ".join(between(fault, first, other) for fault in faults[:3])
            raise IdentityError(
                f"{other.name}: its samples cannot stand in one cache with those of {first.name}: "
                f"{shown}: compile caches of the same fields, streams and tokenizers"
            )


def between(fault: str, first: Source, other: Source) -> str:
    """A line of `differences` that names both caches."""
    fault = fault.removesuffix(" given") + f" in {other.name}"
    return fault.replace(" in the cache, ", f" in {first.name}, ")


def _shape(manifest: Manifest) -> dict[str, Any]:
    """What of a manifest says how its samples are made."""
    streams = {
        name: stream.model_dump(include={"field", "pair", "template", "tokenizer", "target"})
        for name, stream in manifest.streams.items()
    }
    tokenizers = {
        name: tokenizer.model_dump(exclude={"files"})
        for name, tokenizer in manifest.tokenizers.items()
    }
    corpus = manifest.corpus
    return {
        "fields": {"corpus": corpus.fields, "label": corpus.label},
        "has_tasks": bool(corpus.tasks),
        "streams": streams,
        "tokenizers": tokenizers,
    }


def planned_signals(sources: Sequence[Source], options: CompileOptions) -> list[PlannedSignal]:
    """Signals that are kept, those that others are made from first.

    Raises:
        IdentityError: two caches have different signals of one name.
        RecipeError: a signal that is asked for is in no cache, or cannot be kept alone.
        FormatError: a signal that is kept is unfinished.
    """
    found: dict[str, list[int]] = {}
    for source in sources:
        for name in source.cache.signals:
            found.setdefault(name, []).append(source.number)
    names = list(found)
    if options.signals is not None:
        for name in options.signals:
            require_signal(sources, name, "signals")
        names = [name for name in names if name in options.signals]
    planned = []
    for name in names:
        record = _same_record(sources, name, found[name])
        planned.append(PlannedSignal(name, record, tuple(found[name])))
    targets = options.chosen_targets
    if targets is not None:
        planned = _on_new_targets(sources, planned, targets)
    _check_inputs(planned)
    for signal in planned:
        for s in signal.carriers:
            sources[s].cache.require_complete(signal.name)
    return sorted(planned, key=lambda signal: (bool(signal.inputs), signal.name))


def require_signal(sources: Sequence[Source], name: str, option: str) -> list[int]:
    """Numbers of the caches that have a signal.

    Raises:
        RecipeError: none has.
    """
    carriers = [source.number for source in sources if name in source.cache.signals]
    if not carriers:
        known = sorted({signal for source in sources for signal in source.cache.signals})
        raise RecipeError(f"{option}: no cache has a signal {name!r}; they have {known}")
    return carriers


def replaced_stream(sources: Sequence[Source], targets: Targets) -> str:
    """The stream whose tokens become those of hypotheses.

    Raises:
        RecipeError: there are no such hypotheses, or they cannot be the stream's.
        IdentityError: two caches have other hypotheses under this name.
    """
    carriers = require_signal(sources, targets.beams, "targets")
    record = _same_record(sources, targets.beams, carriers)
    if not isinstance(record, BeamsRecord):
        raise RecipeError(f"targets: {targets.beams!r} is of kind {record.kind}, expected beams")
    stream = sources[carriers[0]].cache.stream(record.stream)
    if stream.pair is not None or stream.template != "none":
        kind = "a pair of fields" if stream.pair is not None else "a chat"
        raise RecipeError(
            f"targets: stream {record.stream!r} is made of {kind}, which a hypothesis cannot "
            "replace; choose hypotheses over a stream of one field"
        )
    for s in carriers:
        sources[s].cache.require_complete(targets.beams)
    return record.stream


def _same_record(sources: Sequence[Source], name: str, carriers: Sequence[int]) -> SignalRecord:
    """The first record of a signal, which all caches that have it agree on."""
    first = sources[carriers[0]]
    record = first.cache.signal(name)
    for s in carriers[1:]:
        other = sources[s]
        a, b = (r.model_dump(mode="json") for r in (record, other.cache.signal(name)))
        faults = differences(a, b, _MAY_DIFFER)
        if faults:
            shown = "; ".join(between(fault, first, other) for fault in faults[:3])
            raise IdentityError(
                f"{other.name}: signal {name!r} is another: {shown}: leave it out with --signals, "
                "or dump it again"
            )
    return record


def _on_new_targets(
    sources: Sequence[Source], planned: list[PlannedSignal], targets: Targets
) -> list[PlannedSignal]:
    """Signals that still describe something once hypotheses are the targets."""
    stream = replaced_stream(sources, targets)
    gone = dropped_streams(sources[0].cache.manifest, stream) | {stream}
    kept = []
    for signal in planned:
        record = signal.record
        on_hypotheses = (
            isinstance(record, LogitsRecord)
            and record.hypotheses == targets.beams
            and (record.hypothesis in ("all", 0) if targets.choice == "best" else _all(record))
        )
        if on_hypotheses:
            kept.append(PlannedSignal(signal.name, record, signal.carriers, chosen=True))
        elif not gone & {record.stream, record.source}:
            kept.append(signal)
    return kept


def _all(record: LogitsRecord) -> bool:
    return record.hypothesis == "all"


def dropped_streams(manifest: Manifest, replaced: str) -> set[str]:
    """Other streams of the field whose text is replaced: their tokens would be another text's."""
    field = manifest.streams[replaced].field
    return {
        name
        for name, stream in manifest.streams.items()
        if name != replaced and field in (stream.field, stream.pair)
    }


def _check_inputs(planned: Sequence[PlannedSignal]) -> None:
    """What a kept signal is made from must be kept."""
    names = {signal.name for signal in planned}
    for signal in planned:
        missing = [name for name in signal.inputs if name not in names]
        if missing:
            raise RecipeError(
                f"signals: {signal.name!r} is made from {missing[0]!r}, which is left out: keep "
                "both or neither"
            )
