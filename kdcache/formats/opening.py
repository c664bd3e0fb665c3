"""What is read when a cache is opened: its manifest, and the records of its signals."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.listing import list_commits, list_signals, read_signal
from kdcache.formats.manifest import MANIFEST_NAME, SAMPLES, Manifest, signal_path
from kdcache.formats.record import read_record
from kdcache.formats.signals import BeamsRecord, MasksRecord, SignalRecord
from kdcache.formats.stores.store import Store


def read_manifest(store: Store) -> Manifest:
    """The manifest of a cache.

    Args:
        store: where the cache lies.

    Raises:
        FormatError: there is no cache whose samples are all there, or the manifest is damaged.
        StorageError: it cannot be read.
    """
    try:
        return read_record(Manifest, store, MANIFEST_NAME)
    except FileNotFoundError:
        pass
    if not store.exists():
        raise FormatError(f"{store.name}: nothing there; a cache is what `kdcache dump` made")
    have = len(list_commits(store).get(SAMPLES, set()))
    if have:
        raise FormatError(
            f"{store.name}: dump is unfinished: {have} shards of 'samples' are committed and there "
            f"is no {MANIFEST_NAME}; run the same `kdcache dump` again to finish"
        )
    raise FormatError(f"{store.name}: not a cache: it has no {MANIFEST_NAME}")


def read_signals(store: Store, manifest: Manifest, skip_broken: bool) -> dict[str, SignalRecord]:
    """The records of all signals by name, each fit for the manifest and for what it is made from.

    Args:
        store: where the cache lies.
        manifest: its manifest.
        skip_broken: leave out what is damaged or does not fit, for a repair.

    Raises:
        FormatError: a record is damaged or does not fit.
        StorageError: a record cannot be read.
    """
    found: dict[str, SignalRecord] = {}
    for name in list_signals(store):
        with contextlib.suppress(*([FormatError] if skip_broken else [])):
            found[name] = _checked_signal(store, manifest, name)
    for name, record in list(found.items()):
        try:
            _check_inputs(store, found, record)
        except FormatError:
            if not skip_broken:
                raise
            del found[name]
    return found


def _checked_signal(store: Store, manifest: Manifest, name: str) -> SignalRecord:
    """A signal's record whose streams are the manifest's."""
    record, where = read_signal(store, name), store.at(signal_path(name))
    sides: Mapping[str, tuple[str | None, str | None]] = {
        "stream": (record.stream, record.stream_digest),
        "source": (record.source, record.source_digest),
    }
    for role, (stream, digest) in sides.items():
        if stream is None:
            continue
        if stream not in manifest.streams:
            raise FormatError(
                f"{where}: signal {name!r}: its {role} {stream!r} is no stream of the cache; "
                f"{MANIFEST_NAME} has {sorted(manifest.streams)}"
            )
        found = manifest.streams[stream].digest
        if found != digest:
            raise IntegrityError(
                f"{where}: signal {name!r} was made for {role} {stream!r} of digest {digest}, "
                f"{MANIFEST_NAME} has {found}: its labels belong to other tokens"
            )
    return record


def _check_inputs(store: Store, signals: Mapping[str, SignalRecord], record: SignalRecord) -> None:
    """What a signal was made from must be there, of the right kind and over the same tokens."""
    for role, name, kind in (
        ("masks", record.masks, MasksRecord),
        ("hypotheses", record.hypotheses, BeamsRecord),
    ):
        if name is None:
            continue
        found = signals.get(name)
        if not isinstance(found, kind) or found.stream != record.stream:
            what = f"of kind {found.kind} over stream {found.stream!r}" if found else "missing"
            raise FormatError(
                f"{store.at(signal_path(record.name))}: made from the {role} {name!r} over "
                f"stream {record.stream!r}; that signal is {what}"
            )
