"""What lies in a cache's folders: commits, signals and files that nothing names."""

from __future__ import annotations

import os
import re
from collections.abc import Set
from pathlib import Path

from kdcache.errors import FormatError, IntegrityError, StorageError
from kdcache.formats.commit import is_temporary
from kdcache.formats.manifest import (
    CommitRecord,
    commit_path,
    read_record,
    signal_path,
)
from kdcache.formats.signals import SignalRecord, signal_class

_COMMIT_NAME = re.compile(r"([a-z][a-z0-9_]*)\.(\d{5,12})\.json")
_SIGNAL_NAME = re.compile(r"([a-z][a-z0-9_]*)\.json")
_DATA_NAME = re.compile(r"\d{5,12}\.\d{1,6}-[0-9a-f]{16}\.(arrow|zarr)")


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read: {error.strerror}") from None


def list_commits(root: Path) -> dict[str, set[int]]:
    """Signal name (or "samples") to the shards whose commit stands."""
    found: dict[str, set[int]] = {}
    for name in names_in(root / "commits"):
        match = _COMMIT_NAME.fullmatch(name)
        if match:
            found.setdefault(match.group(1), set()).add(int(match.group(2)))
    return found


def list_signals(root: Path) -> list[str]:
    """Names of the signals that have a record."""
    matches = map(_SIGNAL_NAME.fullmatch, names_in(root / "signals"))
    return [match.group(1) for match in matches if match]


def read_commit(root: Path, signal: str, shard: int) -> CommitRecord:
    """The commit of one shard.

    Raises:
        IntegrityError: there is none, or it is damaged.
        FormatError: it is another shard's.
    """
    path = commit_path(signal, shard)
    try:
        record = read_record(CommitRecord, root, path)
    except FileNotFoundError:
        raise IntegrityError(
            f"{root / path}: missing: shard {shard} of {signal!r} is not committed; run the "
            "same `kdcache dump` again to finish"
        ) from None
    if (record.signal, record.shard) != (signal, shard):
        raise FormatError(
            f"{root / path}: the commit of {record.signal!r} shard {record.shard}, "
            f"expected {signal!r} shard {shard}"
        )
    return record


def read_signal(root: Path, name: str) -> SignalRecord:
    """The record of one signal.

    Raises:
        FormatError: there is none, or it is damaged or another signal's.
    """
    path = signal_path(name)
    try:
        record = read_record(signal_class, root, path)
    except FileNotFoundError:
        raise FormatError(f"{root / path}: missing; no signal {name!r} in the cache") from None
    if record.name != name:
        raise FormatError(f"{root / path}: the record of {record.name!r}, expected {name!r}")
    return record


def leftovers(root: Path, named: Set[str]) -> list[str]:
    """Paths of what is temporary, and of parts that are not named, inside a cache.

    Args:
        root: the cache.
        named: paths inside the cache that commits name.

    Returns:
        Files, and folders whose whole content goes with them.
    """
    parts = {part_of(path) for path in named}
    found = []
    for folder in ["", *(name for name in names_in(root) if (root / name).is_dir())]:
        # Tokenizers lie one folder deeper and have no data files.
        deeper = folder == "tokenizers"
        inner = [f"{folder}/{name}" for name in names_in(root / folder)] if deeper else [folder]
        for place in inner:
            for name in names_in(root / place):
                path = f"{place}/{name}" if place else name
                loose = _DATA_NAME.fullmatch(name) and path not in parts
                # A Zarr group is a folder, everything else of ours a file.
                ours = (root / path).is_dir() if name.endswith(".zarr") else (root / path).is_file()
                if ours and (is_temporary(name) or loose):
                    found.append(path)
    return found


def part_of(path: str) -> str:
    """The part that a data file belongs to: itself, or its Zarr group's folder.

    Args:
        path: inside the cache.
    """
    return "/".join(path.split("/")[:2])


def unnamed_in(root: Path, folder: Path, named: Set[str]) -> list[str]:
    """Paths inside the cache of what lies in a Zarr group and is not named.

    Args:
        root: the cache.
        folder: of the group.
        named: paths inside the cache that commits name.
    """
    found = []
    for item in sorted(folder.rglob("*")):
        path = item.relative_to(root).as_posix()
        if not item.is_dir() and path not in named:
            found.append(path)
    return found
