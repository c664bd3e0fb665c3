"""One pass over some shards: what their commits name is read once and checked, in threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, TypeVar

from kdcache.errors import FormatError, StorageError
from kdcache.formats.cache import Cache
from kdcache.formats.checks.verify_findings import Findings, Sums
from kdcache.formats.checks.verify_flight import Flight
from kdcache.formats.checks.verify_reading import Buffers
from kdcache.formats.checks.verify_shard import ShardCheck
from kdcache.formats.integrity import check_size
from kdcache.formats.manifest import SAMPLES, CommitRecord, FileRecord, PartRecord, commit_path
from kdcache.formats.stores.local import LocalStore

T = TypeVar("T")

#: Shard to the signals (and "samples") whose commit stands, what others are made from first.
Work = Mapping[int, Sequence[str]]


@dataclass
class Seen:
    """What the commits of some shards named.

    Attributes:
        named: paths of files.
        unread: what the paths of shards begin with whose commit cannot be read.
        bytes: of the files.
    """

    named: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    bytes: int = 0

    def add(self, other: Seen) -> None:
        """Take in what was seen elsewhere."""
        self.named |= other.named
        self.unread |= other.unread
        self.bytes += other.bytes

    def name(self, files: Sequence[FileRecord]) -> None:
        """Take in some files."""
        self.named.update(file.path for file in files)
        self.bytes += sum(file.bytes for file in files)


class Pass:
    """Checks shards, in the order in which they come.

    Attributes:
        seen: what their commits named.
        findings: faults.
    """

    def __init__(self, cache: Cache, flight: Flight, sums: Sums) -> None:
        """Begin before the first shard.

        Args:
            cache: the cache.
            flight: does the tasks.
            sums: get the samples of every shard.
        """
        self.seen, self.findings = Seen(), Findings(cache)
        self._cache, self._flight, self._sums = cache, flight, sums
        self._buffers = Buffers(flight.most_bytes)
        self._lock = Lock()

    def check(self, shard: int, names: Sequence[str], advance: Callable[[int], object]) -> None:
        """Hand over all that is to be done of one shard; waits only while too much is under way.

        Args:
            shard: shard number.
            names: as in `Work`.
            advance: told how many bytes were read, again and again.
        """
        commits, fitting = self._commits(shard, names)
        checkable = {
            name: commit
            for name, commit in fitting.items()
            if SAMPLES in fitting and (name == SAMPLES or self._inputs(name) <= set(fitting))
        }
        check = ShardCheck(self._cache, shard, checkable, self.findings, self._buffers)
        _Submission(self._flight, check, advance, self._sums).submit(shard, commits, checkable)

    def check_sizes(
        self, shard: int, names: Sequence[str], advance: Callable[[int], object]
    ) -> None:
        """Check the commits of one shard, and the sizes of the files that they name.

        On a local disk that is no work for threads, which would wait for each other.

        Args:
            shard: shard number.
            names: as in `Work`.
            advance: told of 1 when it is done.
        """
        if isinstance(self._cache.store, LocalStore):
            self._sizes(shard, names, advance)
        else:
            self._flight.read(self._sizes, shard, names, advance)

    def finish(self) -> None:
        """Wait until all is done."""
        self._flight.finish()

    def _sizes(self, shard: int, names: Sequence[str], advance: Callable[[int], object]) -> None:
        commits, _ = self._commits(shard, names)
        for name, commit in commits.items():
            for number, part in enumerate(commit.parts):
                for file in part.files:
                    try:
                        check_size(self._cache.store, file)
                    except (FormatError, StorageError) as error:
                        line = f"{error} ({commit_path(name, shard)} names it)"
                        self.findings.add(name, shard, number, line)
        advance(1)

    def _commits(
        self, shard: int, names: Sequence[str]
    ) -> tuple[dict[str, CommitRecord], dict[str, CommitRecord]]:
        """Commits of one shard; of them those made under the records and inputs that stand."""
        commits: dict[str, CommitRecord] = {}
        fitting: dict[str, CommitRecord] = {}
        for name in names:
            place = (name, shard, 0)
            if not self.findings.guarded(place, partial(self._read_commit, name, shard, commits)):
                self.seen.unread.add(f"{name}/{shard:05d}.")
                continue
            with self._lock:
                self.seen.name([file for part in commits[name].parts for file in part.files])
            if name == SAMPLES or self.findings.guarded(
                place, partial(self._cache.signal_commit, name, shard)
            ):
                fitting[name] = commits[name]
        return commits, fitting

    def _inputs(self, name: str) -> set[str]:
        return set(self._cache.signals[name].inputs)

    def _read_commit(self, name: str, shard: int, commits: dict[str, CommitRecord]) -> None:
        commits[name] = self._cache.commit_record(name, shard)


@dataclass
class _Submission:
    """The tasks of one shard, in an order in which none waits for one behind it.

    Attributes:
        flight: gets them.
        check: what they do.
        advance: told of bytes that were read.
        sums: over the samples of all shards.
        kept: bytes that stay in memory until the whole shard is checked.
        tasks: so far.
    """

    flight: Flight
    check: ShardCheck
    advance: Callable[[int], object]
    sums: Sums
    kept: int = 0
    tasks: list[Future[Any]] = field(default_factory=list)

    def submit(
        self, shard: int, commits: dict[str, CommitRecord], checkable: dict[str, CommitRecord]
    ) -> None:
        """Hand over all tasks.

        Args:
            shard: shard number.
            commits: of "samples" and signals, what others are made from first.
            checkable: those whose structure is checked; of the others the bytes alone.
        """
        flight, check = self.flight, self.check
        done: dict[str, list[Future[bool]]] = {}
        taken = Future[None]()
        for name, commit in commits.items():
            if name == SAMPLES and name in checkable:
                opened = self._add(flight.check(check.open_samples, self._read(commit, 0, True)))
                self._add(flight.check(check.check_samples, opened, self.sums, taken))
                done[name] = [opened]
            elif name in checkable:
                done[name] = self._signal(name, commit, done)
            else:
                for number in range(len(commit.parts)):
                    self._read(commit, number, False, drop=True)
        if SAMPLES not in checkable:
            self.sums.add(shard, None, taken)
        flight.release_after([*self.tasks, taken], self.kept, check.close)

    def _signal(
        self, name: str, commit: CommitRecord, done: dict[str, list[Future[bool]]]
    ) -> list[Future[bool]]:
        """The tasks of one signal whose structure is checked; the checks of its parts."""
        flight, check = self.flight, self.check
        before = [future for put in [SAMPLES, *check.signal(name).inputs] for future in done[put]]
        demand = self._add(flight.check(check.demand, name, before))
        checks = []
        for number, part in enumerate(commit.parts):
            kept = name in check.inputs
            reading = self._read(commit, number, kept)
            task = self._add(flight.check(check.check_part, name, number, reading, demand))
            if not kept:
                flight.release_after([task], _bytes(part))
            checks.append(task)
        return checks

    def _read(
        self, commit: CommitRecord, number: int, kept: bool, drop: bool = False
    ) -> Future[bool]:
        part = commit.parts[number]
        self.flight.reserve(_bytes(part), self.kept)
        self.kept += kept * _bytes(part)
        arguments = (commit.signal, number, part.files, self.advance, not drop)
        reading = self._add(self.flight.read(self.check.read, *arguments))
        if drop:
            self.flight.release_after([reading], _bytes(part))
        return reading

    def _add(self, task: Future[T]) -> Future[T]:
        self.tasks.append(task)
        return task


def _bytes(part: PartRecord) -> int:
    return sum(file.bytes for file in part.files)
