"""What lies in a cache's folders: commits, signals and files that nothing names."""

from __future__ import annotations

import re
from collections.abc import Set

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.manifest import CommitRecord, commit_path, signal_path
from kdcache.formats.record import read_record
from kdcache.formats.signals import SignalRecord, signal_class
from kdcache.formats.stores.commit import is_temporary, temporary_of
from kdcache.formats.stores.store import Store

_COMMIT_NAME = re.compile(r"([a-z][a-z0-9_]*)\.(\d{5,12})\.json")
_SIGNAL_NAME = re.compile(r"([a-z][a-z0-9_]*)\.json")
_DATA_NAME = re.compile(r"\d{5,12}\.\d{1,6}-[0-9a-f]{16}\.(arrow|zarr)")


def list_commits(store: Store) -> dict[str, set[int]]:
    """Signal name (or "samples") to the shards whose commit stands."""
    found: dict[str, set[int]] = {}
    for name in store.names("commits"):
        match = _COMMIT_NAME.fullmatch(name)
        if match:
            found.setdefault(match.group(1), set()).add(int(match.group(2)))
    return found


def list_signals(store: Store) -> list[str]:
    """Names of the signals that have a record."""
    matches = map(_SIGNAL_NAME.fullmatch, store.names("signals"))
    return [match.group(1) for match in matches if match]


def read_commit(store: Store, signal: str, shard: int) -> CommitRecord:
    """The commit of one shard.

    Raises:
        IntegrityError: there is none, or it is damaged.
        FormatError: it is another shard's.
    """
    path = commit_path(signal, shard)
    try:
        record = read_record(CommitRecord, store, path)
    except FileNotFoundError:
        raise IntegrityError(
            f"{store.at(path)}: missing: shard {shard} of {signal!r} is not committed; run the "
            "same `kdcache dump` again to finish"
        ) from None
    if (record.signal, record.shard) != (signal, shard):
        raise FormatError(
            f"{store.at(path)}: the commit of {record.signal!r} shard {record.shard}, "
            f"expected {signal!r} shard {shard}"
        )
    return record


def read_signal(store: Store, name: str) -> SignalRecord:
    """The record of one signal.

    Raises:
        FormatError: there is none, or it is damaged or another signal's.
    """
    path = signal_path(name)
    try:
        record = read_record(signal_class, store, path)
    except FileNotFoundError:
        raise FormatError(f"{store.at(path)}: missing; no signal {name!r} in the cache") from None
    if record.name != name:
        raise FormatError(f"{store.at(path)}: the record of {record.name!r}, expected {name!r}")
    return record


def leftovers(store: Store, named: Set[str]) -> list[str]:
    """Paths of what is temporary, and of parts that are not named, inside a cache.

    Args:
        store: where the cache lies.
        named: paths inside the cache that commits name.

    Returns:
        Files, and folders whose whole content goes with them.
    """
    parts = {part_of(path) for path in named}
    found = []
    for folder in ["", *(name for name in store.names("") if not name.startswith("."))]:
        # Tokenizers lie one folder deeper and have no data files.
        deeper = folder == "tokenizers"
        inner = [f"{folder}/{name}" for name in store.names(folder)] if deeper else [folder]
        for place in inner:
            for name in store.names(place):
                path = f"{place}/{name}" if place else name
                if is_temporary(name) or (_DATA_NAME.fullmatch(name) and path not in parts):
                    found.append(path)
    return found


def leftovers_of(store: Store, signal: str, shard: int, named: Set[str]) -> list[str]:
    """Paths of what is temporary or unnamed of one shard of a signal.

    Args:
        store: where the cache lies.
        signal: signal name, or "samples".
        shard: shard number.
        named: paths inside the cache that the shard's commit names; none before it stands.
    """
    parts = {part_of(path) for path in named}
    own = f"{shard:05d}."
    found = []
    for name in store.names(signal):
        path = f"{signal}/{name}"
        loose = _DATA_NAME.fullmatch(name) and name.startswith(own) and path not in parts
        if loose or (temporary_of(name) or "").startswith(own):
            found.append(path)
    record = commit_path(signal, shard).removeprefix("commits/")
    found += [f"commits/{name}" for name in store.names("commits") if temporary_of(name) == record]
    return found


def part_of(path: str) -> str:
    """The part that a data file belongs to: itself, or its Zarr group's folder.

    Args:
        path: inside the cache.
    """
    return "/".join(path.split("/")[:2])


def unnamed_in(store: Store, folder: str, named: Set[str]) -> list[str]:
    """Paths inside the cache of what lies in a Zarr group and is not named.

    Args:
        store: where the cache lies.
        folder: of the group.
        named: paths inside the cache that commits name.
    """
    return [path for path in store.walk(folder) if path not in named]
