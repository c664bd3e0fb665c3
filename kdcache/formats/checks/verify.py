"""Verification: every checksum and every structural promise of a cache, each byte read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from kdcache.errors import FormatError, StorageError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.checks.verify_findings import Copies, CorpusSums
from kdcache.formats.checks.verify_flight import Flight
from kdcache.formats.checks.verify_pass import Pass, Seen, Work
from kdcache.formats.checks.verify_processes import FEW_BYTES, check_in_processes, shard_bytes
from kdcache.formats.checks.verify_reading import Buffers, read_checked
from kdcache.formats.integrity import check_size
from kdcache.formats.listing import leftovers, list_commits, list_signals, read_signal
from kdcache.formats.manifest import MANIFEST_NAME, SAMPLES, Manifest, commit_path, signal_path
from kdcache.formats.record import read_record
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import Store, open_store
from kdcache.formats.vocabulary import decode_tokens
from kdcache.progress import progress

T = TypeVar("T")

#: Files whose sizes are asked for by one task.
_SIZES_AT_ONCE = 64


@dataclass
class VerifyReport:
    """What `verify_cache` found.

    Attributes:
        files: files checked.
        bytes: their bytes.
        faults: one line each; none where the cache is whole.
        unfinished: one line for each signal that lacks shards, which a dump that goes on will add;
            no fault.
        leftovers: files that no record names: what an interrupted dump left, no fault.
    """

    files: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)


def verify_cache(path: str | Path, quick: bool = False, processes: int = 1) -> VerifyReport:
    """Check a whole cache: crc32c, xxh3, sizes, schemas, structure, digests and coverage.

    Every byte is read once and straight from where the cache lies, in threads; a few parts are in
    memory at a time (`verify_flight.MOST_BYTES`). A cache whose records cannot be read at all is a
    report of what is wrong with them.

    Processes are started as multiprocessing does it, so a script that asks for them must do its
    work under `if __name__ == "__main__":`.

    Args:
        path: directory or URL of the cache.
        quick: check records, and the sizes of the files that they name, and read no data.
        processes: that work on a large cache.

    Raises:
        FormatError: there is no cache there, or one whose samples are not finished.
        StorageError: a process was killed.
    """
    report = VerifyReport()
    try:
        cache = open_cache(path)
    except FormatError as error:
        store = open_store(path)
        if MANIFEST_NAME not in store.names(""):
            raise  # what is missing is no cache with a fault
        found = list(_unreadable(store))
        report.faults += found if str(error) in found else [str(error), *found]
        return report
    _Verifier(cache, report, quick).run(processes)
    return report


def _unreadable(store: Store) -> Iterator[str]:
    """What is wrong with each record that must be read before anything else, one by one."""
    reads: list[Callable[[], object]] = [partial(read_record, Manifest, store, MANIFEST_NAME)]
    reads += [partial(read_signal, store, name) for name in list_signals(store)]
    for read in reads:
        try:
            read()
        except (FormatError, StorageError, FileNotFoundError) as error:
            yield str(error)


class _Verifier:
    """One pass over a cache, shard after shard: its samples, then each signal against them."""

    def __init__(self, cache: Cache, report: VerifyReport, quick: bool) -> None:
        self.cache, self.report, self.quick = cache, report, quick
        self.sums = CorpusSums(cache)
        self.seen = Seen()
        self.lock = Lock()
        # What others are made from comes first, so that no check waits for one behind it.
        names = list(cache.signals)
        self.order = [SAMPLES, *sorted(names, key=lambda name: bool(cache.signals[name].inputs))]

    def run(self, processes: int) -> None:
        """Fill the report."""
        cache, report = self.cache, self.report
        commits = list_commits(cache.store)
        work = {
            shard: [name for name in self.order if shard in commits.get(name, set())]
            for shard in range(cache.num_shards)
        }
        total = 0 if self.quick else shard_bytes(cache, work) * len(work)
        if total < FEW_BYTES:
            processes = 1
        with Flight(cache.store, share=processes) as flight:
            self._records(commits, flight)
            self._tokenizers()
            self._coverage(commits)
            # What comes out of order, from other processes, must not be waited for in memory.
            copies = Copies(lambda shard, piece: self.sums.add(shard, piece, Future()))
            checking = Pass(cache, flight, copies if processes > 1 else self.sums)
            if self.quick:
                self._quick(checking, work)
            else:
                self._full(checking, work, total, processes)
        self.seen.add(checking.seen)
        report.files += len(self.seen.named)
        report.bytes += self.seen.bytes
        report.faults += [line for *_, line in checking.findings.all()]
        # What a damaged commit named is not known, so nothing of its shard is called left over.
        unread = tuple(self.seen.unread)
        found = leftovers(cache.store, self.seen.named)
        report.leftovers = [path for path in found if not path.startswith(unread)]

    def _quick(self, checking: Pass, work: Work) -> None:
        """Commits and sizes."""
        with progress(len(work), "verify", "shard") as bar:
            for shard, names in work.items():
                checking.check_sizes(shard, names, self._advance(bar.update))
            checking.finish()

    def _full(self, checking: Pass, work: Work, total: int, processes: int) -> None:
        """Every byte; `total` are about how many."""
        with progress(total, "verify", "B") as bar:
            advance = self._advance(bar.update)
            if processes > 1 and len(work) > 1:
                check_in_processes(self.cache, work, processes, self.sums, checking, advance)
            else:
                for number, (shard, names) in enumerate(work.items()):
                    checking.check(shard, names, advance)
                    bar.total = checking.seen.bytes * len(work) // (number + 1)
                checking.finish()
        self.sums.compare(checking.findings)

    def _advance(self, update: Callable[[int], object]) -> Callable[[int], object]:
        """The bar's update, for one thread at a time."""

        def advance(num_bytes: int) -> None:
            with self.lock:
                update(num_bytes)

        return advance

    def _records(self, commits: dict[str, set[int]], flight: Flight) -> None:
        """JSON files: those read when the cache was opened, and commits that belong to nothing."""
        known = {SAMPLES, *self.cache.signals}
        files = [MANIFEST_NAME, *map(signal_path, list_signals(self.cache.store))]
        for signal, shards in sorted(commits.items()):
            for shard in sorted(shards):
                path = commit_path(signal, shard)
                files.append(path)
                where = self.cache.store.at(path)
                if signal not in known:
                    what = f"a commit of {signal!r}, which has no record in signals/"
                    self.report.faults.append(f"{where}: {what}")
                elif shard >= self.cache.num_shards:
                    what = f"beyond the plan of {self.cache.num_shards} shards"
                    self.report.faults.append(f"{where}: {what}")
        self.report.files += len(files)
        if isinstance(self.cache.store, LocalStore):
            self._count(files)
            return
        for start in range(0, len(files), _SIZES_AT_ONCE):
            flight.read(self._count, files[start : start + _SIZES_AT_ONCE])
        flight.finish()

    def _count(self, paths: Sequence[str]) -> None:
        """Add up the sizes of records."""
        for path in paths:
            fault, size = None, 0
            try:
                size = self.cache.store.size(path)
            except FileNotFoundError:
                fault = f"{self.cache.store.at(path)}: it has gone"
            except (FormatError, StorageError) as error:
                fault = str(error)
            with self.lock:
                self.report.bytes += size
                if fault is not None:
                    self.report.faults.append(fault)

    def _tokenizers(self) -> None:
        for name, tokenizer in self.cache.manifest.tokenizers.items():
            path = f"tokenizers/{name}/tokens.json"
            self.seen.name(tokenizer.files)
            for file in tokenizer.files:
                try:
                    if self.quick:
                        check_size(self.cache.store, file)
                        continue
                    data = bytes(read_checked(self.cache.store, file, Buffers(0)))
                except (FormatError, StorageError) as error:
                    self.report.faults.append(f"{error} ({MANIFEST_NAME} names it)")
                    continue
                if file.path == path:
                    self._tokens(data, path, tokenizer.vocab_size)
            if path not in {file.path for file in tokenizer.files}:
                where = self.cache.store.at(MANIFEST_NAME)
                self.report.faults.append(f"{where}: tokenizer {name!r} has no tokens.json")

    def _tokens(self, data: bytes, path: str, vocab_size: int) -> None:
        try:
            decode_tokens(data, self.cache.store.at(path), vocab_size)
        except FormatError as error:
            self.report.faults.append(str(error))

    def _coverage(self, commits: dict[str, set[int]]) -> None:
        """Whether every shard of the plan is committed."""
        total = self.cache.num_shards
        for name in [SAMPLES, *self.cache.signals]:
            missing = sorted(set(range(total)) - commits.get(name, set()))
            if not missing:
                continue
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            if name == SAMPLES:  # the manifest is written after the last of them
                for shard in missing:
                    where = self.cache.store.at(commit_path(name, shard))
                    self.report.faults.append(f"{where}: missing: it was there once")
                    self.seen.unread.add(f"{name}/{shard:05d}.")
            else:
                self.report.unfinished.append(
                    f"{self.cache.path}: {name!r} is unfinished: {len(missing)} of {total} shards "
                    f"are not committed ({shown}); run the same `kdcache dump` again to finish"
                )
