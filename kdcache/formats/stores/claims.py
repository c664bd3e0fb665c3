"""Claims: which of the processes that write a cache writes what, and what dead ones left behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdcache.formats.listing import leftovers, leftovers_of, list_commits, read_commit
from kdcache.formats.manifest import MANIFEST_NAME, SAMPLES, CommitRecord, Manifest, commit_path
from kdcache.formats.record import read_record
from kdcache.formats.stores.commit import is_temporary, temporary_of
from kdcache.formats.stores.store import STATUS, Claim, Store

#: How often a process looks whether another has finished what it waits for.
POLL_SECONDS = 0.2


class Claims:
    """The right to write parts of a cache, shared out among any number of processes.

    Attributes:
        store: where the cache lies.
        manifest: once it is written.
    """

    def __init__(self, store: Store) -> None:
        """Claim nothing yet.

        Args:
            store: where the cache lies.
        """
        self.store = store
        self.manifest: Manifest | None = None

    def tidy(self) -> None:
        """Sweep what writers that died have left behind."""
        for name in self.store.stale_claims():
            claim = self.store.claim(name)
            if claim is not None:
                self._released(claim, name)
        for name in self.store.names(STATUS):
            if is_temporary(name) and self.store.exclusive:
                self.store.remove(f"{STATUS}/{name}")  # if it is of one that lives, no harm is done

    @contextmanager
    def claimed(self, signal: str, shard: int | None = None) -> Iterator[bool]:
        """Hold the right to write one shard of a signal; what it leaves uncommitted is removed.

        Args:
            signal: signal name, or "samples".
            shard: shard number; None for all that concerns the signal as a whole.

        Yields:
            Whether it was got; another process writes it otherwise.

        Raises:
            StorageError: the store refused.
        """
        claim, clean = self.claim(signal, shard), False
        try:
            yield claim is not None
            clean = True
        finally:
            if claim is not None:
                self.release(claim, signal, shard, clean)

    def claim(self, signal: str, shard: int | None = None) -> Claim | None:
        """As `claimed`, to be given back with `release`."""
        name = claim_name(signal, shard)
        claim = self.store.claim(name)
        if claim is not None and claim.stale:
            self._swept(claim, name)
        return claim

    def release(
        self, claim: Claim, signal: str, shard: int | None = None, clean: bool = True
    ) -> None:
        """Give a claim back; what was not committed under it is removed.

        Args:
            claim: what `claim` gave.
            signal: as there.
            shard: as there.
            clean: whether nothing went wrong under it.
        """
        if clean and shard is not None and self.is_committed(signal, shard):
            claim.release()  # a commit names all that was written
        else:
            self._released(claim, claim_name(signal, shard))

    def wait(
        self,
        signal: str,
        waiting: Callable[[], object] = lambda: None,
        until: Callable[[], bool] = lambda: False,
    ) -> Claim | None:
        """Claim what concerns a whole signal, as soon as nobody else has it.

        Args:
            signal: signal name, or "samples".
            waiting: called before every look but the first.
            until: ends the wait when its holder has done what was to be done.

        Returns:
            The claim; None where `until` said so.
        """
        while (claim := self.claim(signal)) is None and not until():
            waiting()
            time.sleep(POLL_SECONDS)
        return claim

    def reread(self) -> Manifest | None:
        """The manifest, if some process has written it by now."""
        if self.manifest is None:
            self.manifest = standing_manifest(self.store)
        return self.manifest

    def _released(self, claim: Claim, name: str) -> None:
        self._swept(claim, name)
        claim.release()

    def _swept(self, claim: Claim, name: str) -> None:
        """Sweep under a claim; where that fails, the next to claim it must try again."""
        try:
            self._sweep(name)
        except BaseException:
            claim.release(tidy=False)
            raise

    def _sweep(self, name: str) -> None:
        """Remove what is not committed of a shard, or of the samples, whose claim is held."""
        signal, _, number = name.partition(".")
        if number.isdecimal():
            self._sweep_shard(signal, int(number))
        elif signal == SAMPLES:
            self._sweep_samples()
        else:
            self._sweep_record(signal)

    def _sweep_shard(self, signal: str, shard: int) -> None:
        if not self.store.exclusive:
            return  # somebody else may be writing it
        named: set[str] = set()
        if self.is_committed(signal, shard):
            commit = self.commit_record(signal, shard)
            named = {file.path for part in commit.parts for file in part.files}
        for path in leftovers_of(self.store, signal, shard, named):
            self.store.remove(path)

    def _sweep_samples(self) -> None:
        """Remove what a dump left before its manifest: without any commit, all of it."""
        if not self.store.exclusive:
            return
        committed = sorted(self.committed(SAMPLES))
        parts = [part for n in committed for part in self.commit_record(SAMPLES, n).parts]
        named = {file.path for part in parts for file in part.files}
        for path in leftovers(self.store, named):
            folder, _, file = path.rpartition("/")
            mine = folder == "commits" and (temporary_of(file) or "").startswith(f"{SAMPLES}.")
            if mine or folder.partition("/")[0] in ("", SAMPLES, "tokenizers"):
                self.store.remove(path)
        if self.reread() is None and not committed:
            for folder in (SAMPLES, "tokenizers", "commits", "signals"):
                self.store.remove(folder)

    def _sweep_record(self, signal: str) -> None:
        """Remove what an interrupted write left of a signal's own record."""
        for name in self.store.names("signals"):
            if temporary_of(name) == f"{signal}.json" and self.store.exclusive:
                self.store.remove(f"signals/{name}")

    def committed(self, signal: str) -> set[int]:
        """Shards of a signal (or of "samples") whose commit stands."""
        return list_commits(self.store).get(signal, set())

    def is_committed(self, signal: str, shard: int) -> bool:
        """Whether the commit of one shard stands."""
        try:
            return self.store.size(commit_path(signal, shard)) > 0
        except FileNotFoundError:
            return False

    def commit_record(self, signal: str, shard: int) -> CommitRecord:
        """The commit of one shard.

        Raises:
            FormatError: there is none, or it is damaged or another shard's.
        """
        return read_commit(self.store, signal, shard)


def standing_manifest(store: Store) -> Manifest | None:
    """The manifest of a cache, if it has one yet.

    Raises:
        FormatError: it is damaged.
    """
    try:
        return read_record(Manifest, store, MANIFEST_NAME)
    except FileNotFoundError:
        return None


def claim_name(signal: str, shard: int | None) -> str:
    """What a claim is called."""
    return signal if shard is None else f"{signal}.{shard:05d}"
