"""Repair: what `verify` finds broken is had again, from a mirror or from the teacher.

Replacements are had before anything is taken away: a mirror's bytes are checked against the commits
as they are copied, and what is made again lies in a folder of its own until it is whole. What is
sound is not touched. A shard that was made again with other bytes (on other hardware, say) takes
with it the signals that were made from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kdcache.errors import FormatError, IntegrityError, KDCacheError, StoppedError, StorageError
from kdcache.formats.cache import Cache
from kdcache.formats.checks.broken import Broken, broken_parts, missing_shards
from kdcache.formats.checks.mending import (
    Mirror,
    Source,
    exclusive,
    install_shard,
    is_sound,
    put_record,
    same_cache,
    standing_commit,
)
from kdcache.formats.checks.verify import VerifyReport, verify_cache
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.listing import (
    leftovers_of,
    part_of,
    read_commit,
    read_signal,
    unnamed_in,
)
from kdcache.formats.manifest import (
    MANIFEST_NAME,
    SAMPLES,
    CommitRecord,
    Manifest,
    commit_path,
    signal_path,
)
from kdcache.formats.record import read_record
from kdcache.formats.stores.store import Store, open_store

#: A record that is put back may show what was hidden behind it; this is deep enough.
MOST_ROUNDS = 4


@dataclass
class RepairReport:
    """What a repair did.

    Attributes:
        verified: what `verify` says afterwards.
        faults: what it said before.
        repaired: one line for each thing that was put back.
        failed: one line for each that could not be, with what to do.
    """

    verified: VerifyReport
    faults: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def repair_cache(
    location: str | Path,
    mirror: str | Path | None = None,
    recipe: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> RepairReport:
    """Verify a cache and put back what is broken or missing.

    Args:
        location: directory or URL of the cache.
        mirror: directory or URL of a copy of it, from which things are fetched; without it they
            are made again from the corpus and by the teacher.
        recipe: how they are made, a file or a built-in name; what the cache's own records say
            without it.
        overrides: (dotted path, YAML text) pairs for either.

    Raises:
        FormatError: there is no cache there.
        StorageError: a store refused.
    """
    store = open_store(location)
    with _source(store, mirror, recipe, overrides) as source:
        report = RepairReport(_verified(location))
        report.faults = [*report.verified.faults, *report.verified.unfinished]
        for _ in range(MOST_ROUNDS):
            broken = _broken(store, source, report.verified)
            if not broken:
                break
            repair = _Round(store, source, report)
            if not repair.run(broken):
                break
            report.verified = _verified(location)
    store.discard(root=False)  # the folder of claims, if nobody else has one there
    if not (report.verified.faults or report.verified.unfinished):
        report.failed.clear()  # a later round did what an earlier one could not
    return report


@contextlib.contextmanager
def _source(
    store: Store,
    mirror: str | Path | None,
    recipe: str | None,
    overrides: Sequence[tuple[str, str]],
) -> Iterator[Source]:
    """Where replacements come from."""
    if mirror is not None:
        if open_store(mirror).name == store.name:
            raise StorageError(f"{store.name}: --mirror names the cache itself; name a copy of it")
        yield Mirror(mirror)
        return
    from kdcache.dump.redo import Redo  # a mirror needs no teacher, and so no torch

    with Redo(store, recipe, overrides) as redo:
        yield redo


def _verified(location: str | Path) -> VerifyReport:
    """What `verify` says; a manifest that is missing is a fault like another."""
    try:
        return verify_cache(location)
    except FormatError as error:
        store = open_store(location)
        if "commits" not in store.names(""):
            raise
        where = store.at(MANIFEST_NAME)
        return VerifyReport(faults=[f"{where}: missing: {error}"])


def _broken(store: Store, source: Source, report: VerifyReport) -> Broken:
    """What is to be put back."""
    broken = broken_parts(store, report.faults)
    missing: set[tuple[str, int]] = set()
    with contextlib.suppress(FormatError):
        missing = missing_shards(Cache(store, skip_broken=True))
    for signal, number in missing - broken.shards:
        data = leftovers_of(store, signal, number, set())
        if source.offers(signal, number, bool(data)):
            broken.missing.add((signal, number))
    broken.shards |= broken.missing
    return broken


class _Round:
    """One pass over what is broken: the manifest, then what it names, then the data."""

    def __init__(self, store: Store, source: Source, report: RepairReport) -> None:
        self._store, self._source, self._report = store, source, report
        self._did = False

    def run(self, broken: Broken) -> bool:
        """Put back what can be; whether anything was."""
        self._report.failed.clear()
        if broken.manifest:
            self._try(MANIFEST_NAME, self._manifest)
        if not self._try(MANIFEST_NAME, self._same_cache):
            return self._did
        for path in sorted(broken.tokenizers):
            self._try(path, partial(self._tokenizer, path))
        for name in sorted(broken.signals):
            self._try(signal_path(name), partial(self._signal, name))
        self._shards(broken)
        return self._did

    def _standing(self) -> Manifest:
        return read_record(Manifest, self._store, MANIFEST_NAME)

    def _same_cache(self) -> None:
        """Without a manifest nothing else can be done, nor with a mirror of something else."""
        if isinstance(self._source, Mirror):
            same_cache(self._source, self._standing(), self._store.name)
        else:
            self._standing()

    def _try(self, what: str, act: Callable[[], object]) -> bool:
        """Do something; what went wrong is kept as one line."""
        try:
            act()
        except StoppedError:
            raise
        except (KDCacheError, FileNotFoundError) as error:
            line = " ".join(str(error).split())
            self._report.failed.append(f"{self._store.at(what)}: not repaired: {line}")
            return False
        return True

    def _told(self, what: str) -> None:
        self._did = True
        self._report.repaired.append(f"{what}: {self._source.how}")

    def _manifest(self) -> None:
        found = self._source.manifest()
        if not _stands(self._standing, found):
            put_record(self._store, MANIFEST_NAME, found)
            self._told(MANIFEST_NAME)

    def _signal(self, name: str) -> None:
        found = self._source.signal(name)
        if not _stands(partial(read_signal, self._store, name), found):
            put_record(self._store, signal_path(name), found)
            self._told(signal_path(name))

    def _tokenizer(self, path: str) -> None:
        name = path.split("/")[1]
        files = {file.path: file for file in self._standing().tokenizers[name].files}
        data = self._source.tokenizer_file(name, files[path])
        if digest_bytes(data, path) != files[path]:
            raise IntegrityError(
                f"what {self._source.how} has other bytes (another version of transformers?); name "
                "a copy of the cache by --mirror"
            )
        self._store.replace(path, data)
        self._told(path)

    def _shards(self, broken: Broken) -> None:
        """Samples, then signals; those made from others after these."""
        cache = Cache(self._store, skip_broken=True)
        order = sorted(cache.signals, key=lambda name: (bool(cache.signals[name].inputs), name))
        todo = {place for place in broken.shards if not self._tidied(cache, *place)}
        for signal in [SAMPLES, *order]:
            numbers = sorted(number for name, number in todo if name == signal)
            what = f"{signal} shards {', '.join(map(str, numbers))}"
            if not numbers or not self._try(what, partial(self._source.prepare, signal, numbers)):
                continue
            for number in numbers:
                told = (signal, number) not in broken.missing
                self._try(f"{signal} shard {number}", partial(self._shard, signal, number, told))
                todo |= self._made_from(cache, signal, number)
        for name, number in sorted(todo):
            if name not in (SAMPLES, *order):
                what = f"{self._store.name}: {name} shard {number}"
                self._report.failed.append(f"{what}: not repaired: its signal has no sound record")

    def _tidied(self, cache: Cache, signal: str, number: int) -> bool:
        """Whether strange files were all that was wrong with a shard; they are removed."""
        if number >= cache.num_shards:
            self._removed([commit_path(signal, number)])
            return True
        commit = standing_commit(self._store, signal, number)
        files = [file for part in commit.parts for file in part.files] if commit else []
        if commit is None or not all(is_sound(self._store, file) for file in files):
            return False
        named = {file.path for file in files}
        groups = sorted({part_of(path) for path in named if part_of(path) != path})
        strangers = [path for group in groups for path in unnamed_in(self._store, group, named)]
        self._removed(strangers)
        return bool(strangers)

    def _removed(self, paths: Sequence[str]) -> None:
        for path in paths:
            self._store.remove(path)
            self._did = True
            self._report.repaired.append(f"{path}: removed, it belongs to nothing")

    def _shard(self, signal: str, number: int, told: bool) -> None:
        """Have one shard again, unless another process writes it, which is told or not."""
        with exclusive(self._store, signal, number) as mine:
            if not mine:
                if told:
                    raise StorageError("another process writes it; wait for it to end")
                return
            source = self._source.shard(signal, number)
            try:
                commit = read_commit(source, signal, number)
                self._check_fit(commit)
                written = install_shard(source, self._store, commit)
            finally:
                self._source.done(signal, number)
        for path in written:
            self._told(path)

    def _check_fit(self, commit: CommitRecord) -> None:
        """A replacement must be of this cache's samples, signal and inputs."""
        cache = Cache(self._store, skip_broken=True)
        plan = cache.manifest.shards[commit.shard]
        if (commit.start, commit.stop) != (plan.start, plan.stop):
            raise IntegrityError("the replacement is of other samples")
        if commit.signal == SAMPLES:
            return
        record = cache.signal(commit.signal)
        if commit.record != record.digest:
            raise IntegrityError("the replacement is of a signal with another record")
        stands = {name: standing_commit(self._store, name, commit.shard) for name in record.inputs}
        for name, found in stands.items():
            if found is None or commit.inputs.get(name) != found.digest:
                raise IntegrityError(
                    f"the replacement was made from another {name!r}; repair without --mirror"
                )

    def _made_from(self, cache: Cache, signal: str, number: int) -> set[tuple[str, int]]:
        """Shards of other signals that were made from another form of this one."""
        stands = standing_commit(self._store, signal, number)
        found = set()
        for name, record in cache.signals.items():
            if signal not in record.inputs or stands is None:
                continue
            theirs = standing_commit(self._store, name, number)
            if theirs is not None and theirs.inputs.get(signal) != stands.digest:
                found.add((name, number))
        return found


def _stands(read: Callable[[], object], record: object) -> bool:
    """Whether a record stands already."""
    try:
        return read() == record
    except (KDCacheError, FileNotFoundError):
        return False
