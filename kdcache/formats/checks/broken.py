"""Which parts of a cache are broken: what the faults that `verify` found are about."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from kdcache.errors import FormatError
from kdcache.formats.cache import Cache
from kdcache.formats.listing import list_commits, list_signals, read_commit, read_signal
from kdcache.formats.manifest import MANIFEST_NAME, SAMPLES
from kdcache.formats.signals import SignalRecord
from kdcache.formats.stores.store import Store

_RECORD = re.compile(r"signals/([a-z][a-z0-9_]*)\.json")
_COMMIT = re.compile(r"commits/([a-z][a-z0-9_]*)\.(\d{5,12})\.json")
_TOKENIZER = re.compile(r"tokenizers/[a-z][a-z0-9_]*/[A-Za-z0-9_.+/-]*[A-Za-z0-9_]")
_DATA = re.compile(r"([a-z][a-z0-9_]*)/(\d{5,12})\.\d{1,6}-[0-9a-f]{16}\.(?:arrow|zarr)")


@dataclass
class Broken:
    """Parts of a cache that are to be had again.

    Attributes:
        manifest: whether kdcache.json is one.
        tokenizers: paths of tokenizer files.
        signals: names of signals whose record is one.
        shards: signal (or "samples") and shard number.
        missing: those of `shards` that are not committed; a dump may be at work on them.
    """

    manifest: bool = False
    tokenizers: set[str] = field(default_factory=set)
    signals: set[str] = field(default_factory=set)
    shards: set[tuple[str, int]] = field(default_factory=set)
    missing: set[tuple[str, int]] = field(default_factory=set)

    def __bool__(self) -> bool:
        """Whether anything is broken."""
        return bool(self.manifest or self.tokenizers or self.signals or self.shards)


def broken_parts(store: Store, faults: Iterable[str]) -> Broken:
    """What some faults are about.

    Args:
        store: where the cache lies.
        faults: as `verify` tells them: each begins with the path of what is wrong.
    """
    broken, signals = Broken(), list_signals(store)
    judged: set[str] = set()
    for fault in faults:
        where = fault.removeprefix(f"{store.name}/")
        if where.startswith(MANIFEST_NAME):
            broken.manifest = True
        elif match := _TOKENIZER.match(where):
            broken.tokenizers.add(match[0])
        elif match := _RECORD.match(where):
            if match[1] not in judged:  # each of its shards may say the same
                judged.add(match[1])
                _judge_signal(store, match[1], broken)
        elif match := _COMMIT.match(where):
            signal, number = match[1], int(match[2])
            if signal == SAMPLES or signal in signals:
                broken.shards.add((signal, number))
            else:
                broken.signals.add(signal)
        elif match := _DATA.match(where):
            broken.shards.add((match[1], int(match[2])))
    return broken


def _judge_signal(store: Store, name: str, broken: Broken) -> None:
    """Record and commits of a signal say something else: the one that stands alone is wrong."""
    record = _readable(store, name)
    if record is None:
        broken.signals.add(name)
        return
    lost = {put for put in record.inputs if _readable(store, put) is None}
    if lost:
        broken.signals |= lost
        return
    fits: list[int] = []
    others: list[int] = []
    for shard in sorted(list_commits(store).get(name, set())):
        try:
            agrees = read_commit(store, name, shard).record == record.digest
        except FormatError:
            continue  # it has a fault of its own
        (fits if agrees else others).append(shard)
    if others and fits:
        broken.shards |= {(name, shard) for shard in others}
    elif others or not fits:
        broken.signals.add(name)
    else:
        broken.manifest = True  # record and commits agree that its streams are others


def _readable(store: Store, name: str) -> SignalRecord | None:
    """The record of a signal; None where there is none that can be read."""
    try:
        return read_signal(store, name)
    except FormatError:
        return None


def missing_shards(cache: Cache) -> set[tuple[str, int]]:
    """Signal (or "samples") and number of the shards whose commit is not there.

    It was lost, or a dump has not come so far.
    """
    plan = set(range(cache.num_shards))
    return {
        (signal, shard)
        for signal in (SAMPLES, *cache.signals)
        for shard in plan - cache.committed(signal)
    }
