"""What the commits of a signal add up to; where there are many, reckoned from some of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

from kdcache.formats.cache import Cache
from kdcache.formats.listing import list_commits
from kdcache.formats.manifest import SAMPLES, CommitRecord
from kdcache.formats.schema import STREAM_PREFIX

#: Commits of one signal that are read, spread over the cache, where there are more.
READ_COMMITS = 128
#: What needs data files is measured over at most this many shards of a signal, spread over the
#: cache, and over so many bytes (but one shard at least).
MEASURED_SHARDS = 16
MEASURED_BYTES = 64 << 20
#: A store over a network answers slowly but many at once.
_READERS = 8


@dataclass(frozen=True)
class Commits:
    """The shards of a signal (or of "samples") that are committed, and what they come to.

    Where only some of the records are read, sums are theirs times the tokens of all shards over
    the tokens of those: shards are cut by tokens, so this is close.

    Attributes:
        cache: the cache.
        signal: name of the signal.
        shards: numbers of its committed shards, ascending.
    """

    cache: Cache
    signal: str
    shards: list[int]

    @cached_property
    def read(self) -> list[int]:
        """The shards whose commits are read: all of them, or some, spread evenly."""
        return spread(self.shards, READ_COMMITS)

    @cached_property
    def complete(self) -> bool:
        """Whether every shard of the plan is committed."""
        return len(self.shards) == self.cache.num_shards

    @property
    def num_from_first(self) -> int:
        """Shards from the first on without a gap, which a run that goes on meanwhile can use."""
        return next((n for n, shard in enumerate(self.shards) if n != shard), len(self.shards))

    @property
    def num_samples(self) -> int:
        """Samples of the shards."""
        return sum(self.cache.manifest.shards[n].num_samples for n in self.shards)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the data files."""
        found = sum(f.bytes for record in self._records for p in record.parts for f in p.files)
        return round(found * self._scale)

    @cached_property
    def num_labels(self) -> int:
        """What the signal describes, one by one."""
        return round(sum(record.tokens for record in self._records) * self._scale)

    @cached_property
    def entries(self) -> dict[str, int]:
        """Column to its records."""
        counts = Counter[str]()
        for record in self._records:
            counts.update(record.entries)
        return {column: round(count * self._scale) for column, count in counts.items()}

    def num_tokens(self, stream: str) -> int:
        """Tokens of a stream in the shards.

        Args:
            stream: name of the stream.
        """
        if self.complete:
            return self.cache.stream(stream).num_tokens
        return round(stream_tokens(self.cache, stream, self.read) * self._scale)

    @cached_property
    def measured(self) -> list[int]:
        """Shards whose data files are looked into."""
        fit = MEASURED_BYTES * len(self.shards) // max(1, self.num_bytes)
        return spread(self.read, max(1, min(MEASURED_SHARDS, fit)))

    @cached_property
    def _records(self) -> list[CommitRecord]:
        return read_commits(self.cache, self.signal, self.read)

    @cached_property
    def _scale(self) -> float:
        """Tokens of all shards over those of the shards that are read."""
        plan = self.cache.manifest.shards
        some = sum(plan[n].tokens for n in self.read)
        return sum(plan[n].tokens for n in self.shards) / some if some else 1.0


def committed(cache: Cache) -> dict[str, Commits]:
    """The commits of the samples and of every signal as they stand now.

    Args:
        cache: the cache; its folder of commits is listed once.
    """
    found, plan = list_commits(cache.store), set(range(cache.num_shards))
    return {
        name: Commits(cache, name, sorted(found.get(name, set()) & plan))
        for name in [SAMPLES, *cache.signals]
    }


def stream_tokens(cache: Cache, stream: str, shards: Sequence[int]) -> int:
    """Tokens of a stream in some shards.

    Args:
        cache: the cache.
        stream: name of the stream.
        shards: their numbers.
    """
    records = read_commits(cache, SAMPLES, shards)
    return sum(record.entries[STREAM_PREFIX + stream] for record in records)


def read_commits(cache: Cache, signal: str, shards: Sequence[int]) -> list[CommitRecord]:
    """Commits of some shards, several at a time.

    Args:
        cache: the cache.
        signal: name of the signal, or "samples".
        shards: their numbers.

    Raises:
        FormatError: one is damaged or gone.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(partial(cache.commit_record, signal), shards))


def spread(shards: Sequence[int], most: int) -> list[int]:
    """At most so many of them, spread evenly.

    Args:
        shards: numbers of shards.
        most: at least 1.
    """
    return list(shards[:: max(1, math.ceil(len(shards) / most))])
