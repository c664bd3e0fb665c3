"""Verification in several processes, since only one thread of a process runs Python at a time.

A process checks whole shards. What the digests over the corpus need of them, which must be taken
in order, comes back to the first process; it is a tenth of the bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from kdcache.errors import FormatError, StorageError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.checks.verify_findings import Copies, CorpusSums, Fault, Piece
from kdcache.formats.checks.verify_flight import Flight
from kdcache.formats.checks.verify_pass import Pass, Seen, Work
from kdcache.processes import worker_pool

#: A cache of fewer bytes is checked before other processes have started.
FEW_BYTES = 1 << 28

#: Bytes of the shards that a process is given at a time.
TASK_BYTES = 1 << 26


@dataclass(frozen=True)
class _Found:
    """What one process found out about some shards."""

    seen: Seen
    faults: list[Fault]
    pieces: dict[int, Piece | None]


def shard_bytes(cache: Cache, work: Work) -> int:
    """Bytes of one shard, reckoned from the first whose commits can be read; 0 without any."""
    for shard, names in work.items():
        try:
            commits = [cache.commit_record(name, shard) for name in names]
        except (FormatError, StorageError):
            continue
        return sum(f.bytes for commit in commits for part in commit.parts for f in part.files)
    return 0


def check_in_processes(
    cache: Cache,
    work: Work,
    processes: int,
    sums: CorpusSums,
    into: Pass,
    advance: Callable[[int], object],
) -> None:
    """Check shards in this process and others.

    Args:
        cache: the cache.
        work: the shards.
        processes: how many, this one counted.
        sums: get the samples.
        into: checks what this process does, and gets what the others found.
        advance: told how many bytes were read.

    Raises:
        StorageError: a process was killed.
    """
    at_once = max(1, TASK_BYTES // max(1, shard_bytes(cache, work)))
    shards = deque(work.items())
    others = processes - 1
    pool = worker_pool(others, _begin, (cache.store.name, processes))
    waiting: deque[Future[_Found]] = deque()
    try:
        while shards or waiting:
            while shards and len(waiting) < 2 * others:
                task = dict(shards.popleft() for _ in range(min(at_once, len(shards))))
                waiting.append(pool.submit(_check, task))
            if shards and not waiting[0].done():
                into.check(*shards.popleft(), advance)
            else:
                _take(waiting.popleft().result(), sums, into, advance)
        into.finish()
    except BrokenProcessPool:
        raise StorageError(
            f"{cache.path}: a process of this check was killed, out of memory perhaps; "
            "use --processes 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _take(found: _Found, sums: CorpusSums, into: Pass, advance: Callable[[int], object]) -> None:
    into.seen.add(found.seen)
    into.findings.add_all(found.faults)
    for shard, piece in found.pieces.items():
        sums.add(shard, piece, Future())
    advance(found.seen.bytes)


_opened: list[tuple[Cache, int]] = []  # what this process works on


def _begin(location: str, processes: int) -> None:
    """Open the cache, once for all tasks of another process."""
    _opened[:] = [(open_cache(location), processes)]


def _check(work: Work) -> _Found:
    """What another process does."""
    cache, processes = _opened[0]
    pieces: dict[int, Piece | None] = {}
    with Flight(cache.store, share=processes) as flight:
        checking = Pass(cache, flight, Copies(pieces.__setitem__))
        for shard, names in work.items():
            checking.check(shard, names, _nobody)
        flight.finish()
    return _Found(checking.seen, checking.findings.all(), pieces)


def _nobody(num_bytes: int) -> None:
    """Progress is told by the first process."""
