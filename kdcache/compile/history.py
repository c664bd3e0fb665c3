"""The lineage of a compiled cache: what was done, and to which caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xxhash

from kdcache.compile.compatible import PlannedSignal
from kdcache.compile.id_list import IdList
from kdcache.compile.options import CompileOptions
from kdcache.compile.source import Source
from kdcache.errors import IdentityError
from kdcache.formats.identity import differences
from kdcache.formats.manifest import Lineage, SourceRecord
from kdcache.formats.record import encode_record


def lineage_of(
    sources: Sequence[Source], signals: Sequence[PlannedSignal], options: CompileOptions
) -> Lineage:
    """What fixes a compiled cache: the operations in their order, and digests of its sources.

    Args:
        sources: the caches.
        signals: of the output.
        options: what is done.
    """
    used = {signal.name for signal in signals}
    used |= {c.name for c in options.conditions if c.quantity != "length"}
    targets = options.chosen_targets
    if targets is not None:
        used.add(targets.beams)
    used |= {name for s in signals for name in s.record.inputs}
    return Lineage(
        operations=operations_of(len(sources), signals, options),
        sources=[_source(source, used) for source in sources],
    )


def operations_of(
    num_sources: int, signals: Sequence[PlannedSignal], options: CompileOptions
) -> list[dict[str, Any]]:
    """Each operation with its parameters, as plain values, in the order they are applied.

    Args:
        num_sources: caches that are compiled.
        signals: of the output.
        options: what is done.
    """
    found: list[dict[str, Any]] = []

    def add(operation: str, **parameters: object) -> None:
        found.append({"operation": operation, **parameters})

    if num_sources > 1 and options.mix is None:
        add("merge")
    for condition in options.conditions:
        bleu = {"tokenizer": options.bleu_tokenizer} if condition.quantity == "bleu" else {}
        add("filter", condition=str(condition), **bleu)
    if options.ids is not None:
        listed = IdList.read(options.ids)
        add("ids", listed=len(listed), digest=listed.digest)
    add("signals", kept=[signal.name for signal in signals], missing=options.missing)
    if options.fraction is not None:
        add("subset", fraction=float(options.fraction), seed=options.seed)
    if options.count is not None:
        add("subset", count=options.count, seed=options.seed)
    if options.mix is not None:
        add("mix", weights=[float(w) for w in options.mix], seed=options.seed)
    targets = options.chosen_targets
    if targets is not None:
        how: dict[str, object] = {"seed": options.seed} if targets.choice == "sampled" else {}
        if targets.choice == "reference":
            how = {"tokenizer": options.bleu_tokenizer}
        add("targets", beams=targets.beams, choice=targets.choice, **how)
    for name, codec in sorted(options.parsed_codecs.items()):
        add("encode", signal=name, codec=codec.model_dump(mode="json"))
    for name, other in sorted(options.rename.items()):
        add("rename", signal=name, to=other)
    if options.shard_tokens is not None:
        add("shards", shard_tokens=options.shard_tokens)
    return found


def check_lineage(standing: Lineage | None, given: Lineage, path: str) -> None:
    """Refuse to go on with another compilation than the one that stands.

    Caches may have moved; what they hold may not differ.

    Args:
        standing: of the manifest in the output; None where it was dumped.
        given: of this compilation.
        path: of the output, for the message.

    Raises:
        IdentityError: with both sides.
    """
    if standing is None:
        raise IdentityError(f"{path}: it holds a dumped cache; choose another output")
    names = [f"sources.{number}.name" for number in range(len(given.sources))]
    stands, asked = (lineage.model_dump(mode="json") for lineage in (standing, given))
    faults = differences(stands, asked, names)
    if faults:
        shown = "; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")
        raise IdentityError(
            f"{path}: it was compiled in another way: {shown}: give the same caches and options, "
            "or choose another output"
        )


def _source(source: Source, used: set[str]) -> SourceRecord:
    """What identifies a cache, and those of its signals that are used."""
    cache, manifest = source.cache, source.cache.manifest
    return SourceRecord(
        name=source.name,
        corpus=manifest.corpus.digest,
        num_samples=manifest.corpus.num_samples,
        streams={name: stream.digest for name, stream in manifest.streams.items()},
        signals={name: signal_digest(source, name) for name in sorted(used & set(cache.signals))},
        lineage=manifest.lineage,
    )


def signal_digest(source: Source, name: str) -> str:
    """32 hex digits over a signal's record and its commits."""
    hasher = xxhash.xxh3_128(encode_record(source.cache.signal(name)))
    for shard, _, _ in source.shards():
        hasher.update(source.cache.commit_record(name, shard).digest.encode())
    return hasher.hexdigest()
