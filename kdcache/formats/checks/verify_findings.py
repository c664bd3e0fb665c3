"""What `verify` finds out over all shards, whose checks end in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

import numpy as np

from kdcache.errors import FormatError, StorageError
from kdcache.formats.cache import Cache
from kdcache.formats.identity import CorpusDigest, StreamDigest
from kdcache.formats.manifest import MANIFEST_NAME, SAMPLES
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import extra_fields, join_ids
from kdcache.formats.shard import SampleShard

#: Tokens whose digest is taken together.
_TOKENS_AT_ONCE = 1 << 18


#: Rank of the signal, shard, part, and the line.
Fault = tuple[int, int, int, str]


class Findings:
    """Faults as they are found, in any order; told in the order of signals, shards and parts."""

    def __init__(self, cache: Cache) -> None:
        """Start with none.

        Args:
            cache: the cache.
        """
        self._store = cache.store
        self._rank = {name: n for n, name in enumerate([SAMPLES, *cache.signals])}
        self._lock = Lock()
        self._faults: list[Fault] = []

    def add(self, signal: str, shard: int, part: int, line: str) -> None:
        """A fault in one line."""
        with self._lock:
            self._faults.append((self._rank[signal], shard, part, line))

    def guarded(self, place: tuple[str, int, int], check: Callable[[], object]) -> bool:
        """Run a check that raises; its error is a fault."""
        try:
            check()
        except (FormatError, StorageError) as error:
            self.add(*place, str(error))
            return False
        return True

    def compare(
        self, place: tuple[str, int, int], what: str, found: object, expected: object, path: str
    ) -> None:
        """What the data say must be what the record at a path says of them."""
        if found != expected:
            self.add(*place, f"{self._store.at(path)}: {what}: {found}, expected {expected}")

    def add_all(self, faults: Iterable[Fault]) -> None:
        """Those of others."""
        with self._lock:
            self._faults += faults

    def all(self) -> list[Fault]:
        """All of them, samples first."""
        return sorted(self._faults, key=lambda fault: fault[:3])


@dataclass(frozen=True)
class Piece:
    """What of a shard of samples enters the digests over all of them.

    Attributes:
        sample_id: [M, 16] uint8.
        row: [M] int64.
        streams: name to stored token ids.
    """

    sample_id: np.ndarray
    row: np.ndarray
    streams: dict[str, Ragged]


class Sums(Protocol):
    """Takes the samples of shards."""

    def add(self, shard: int, samples: SampleShard | None, taken: Future[None]) -> None:
        """Take the samples of a shard.

        Args:
            shard: shard number, in any order.
            samples: None where they cannot be relied on.
            taken: is done when they are no longer needed.
        """


class Copies:
    """Copies what is needed of samples, so that none of them must wait in memory."""

    def __init__(self, then: Callable[[int, Piece | None], object]) -> None:
        """Say where copies go.

        Args:
            then: gets shards and their pieces; None where samples cannot be relied on.
        """
        self._then = then

    def add(self, shard: int, samples: SampleShard | None, taken: Future[None]) -> None:
        """Copy what is needed."""
        piece = None
        if samples is not None:
            streams = {
                name: Ragged(column.offsets.copy(), {k: v.copy() for k, v in column.fields.items()})
                for name, column in samples.streams.items()
            }
            piece = Piece(samples.sample_id.copy(), samples.row.copy(), streams)
        self._then(shard, piece)
        taken.set_result(None)


class CorpusSums:
    """Digests and counts over all samples, which must be taken in order."""

    def __init__(self, cache: Cache) -> None:
        """Start before the first shard.

        Args:
            cache: the cache.
        """
        manifest = cache.manifest
        self._manifest = manifest
        self._corpus = CorpusDigest()
        self._streams = {
            name: StreamDigest(manifest.tokenizers[stream.tokenizer].digest)
            for name, stream in manifest.streams.items()
        }
        self._totals = dict.fromkeys(manifest.streams, 0)
        self._lock = Lock()
        self._next = 0
        self._ready: dict[int, tuple[SampleShard | Piece | None, Future[None]]] = {}
        self._whole = True

    def add(self, shard: int, samples: SampleShard | Piece | None, taken: Future[None]) -> None:
        """As in `Sums`; they wait for those of all shards before them."""
        with self._lock:
            self._ready[shard] = samples, taken
            while self._next in self._ready:
                samples, taken = self._ready.pop(self._next)
                self._next += 1
                self._whole &= samples is not None
                if samples is not None and self._whole:
                    self._take(samples)
                taken.set_result(None)

    def _take(self, samples: SampleShard | Piece) -> None:
        self._corpus.update(samples.sample_id, samples.row)
        for name, column in samples.streams.items():
            self._totals[name] += num_records(column)
            lengths = column.lengths
            for start in range(0, max(1, num_records(column)), _TOKENS_AT_ONCE):
                some = slice(start, start + _TOKENS_AT_ONCE)
                fields = {key: values[some] for key, values in column.fields.items()}
                self._streams[name].update(lengths, join_ids(fields), extra_fields(fields))
                lengths = lengths[:0]

    def compare(self, findings: Findings) -> None:
        """With what the manifest says, if all shards came and could be relied on."""
        manifest = self._manifest
        if not self._whole or self._next != len(manifest.shards):
            return
        last = (SAMPLES, len(manifest.shards), 0)
        compare = partial(findings.compare, last, path=MANIFEST_NAME)
        compare("corpus digest", self._corpus.hexdigest(), manifest.corpus.digest)
        for name, stream in manifest.streams.items():
            found = self._streams[name].hexdigest()
            compare(f"digest of stream {name!r}", found, stream.digest)
            compare(f"tokens of stream {name!r}", self._totals[name], stream.num_tokens)


def num_records(column: Ragged) -> int:
    """Records of all samples of a column."""
    return int(column.offsets[-1])
