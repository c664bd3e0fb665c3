"""Checksums of files: crc32c and xxh3 in one pass, and the check against a record."""

from __future__ import annotations

import mmap
import os
from typing import BinaryIO

import google_crc32c
import numpy as np
import xxhash

from kdcache.errors import IntegrityError, KDCacheError, StorageError
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores.store import CHUNK_BYTES, REPAIR, Store


class Digester:
    """Size, crc32c and xxh3 of bytes that come in pieces."""

    def __init__(self, crc32c: bool = True) -> None:
        """Start with no bytes.

        Args:
            crc32c: also keep the crc32c, which is twice as dear as xxh3.
        """
        self.bytes = 0
        self._crc32c: int | None = 0 if crc32c else None
        self._xxh3 = xxhash.xxh3_64()

    def update(self, piece: bytes | memoryview) -> None:
        """Take in more bytes."""
        flat = np.frombuffer(piece, dtype=np.uint8)  # crc32c takes no memoryview
        self.bytes += len(flat)
        self._xxh3.update(piece)
        if self._crc32c is not None:
            self._crc32c = google_crc32c.extend(self._crc32c, flat)

    @property
    def has_crc32c(self) -> bool:
        """Whether the crc32c is kept too."""
        return self._crc32c is not None

    @property
    def xxh3(self) -> str:
        """16 hex digits of the bytes so far."""
        return self._xxh3.hexdigest()

    @property
    def crc32c(self) -> str:
        """8 hex digits of the bytes so far."""
        assert self._crc32c is not None
        return f"{self._crc32c:08x}"

    def record(self, path: str) -> FileRecord:
        """The record of a file that holds the bytes so far."""
        return FileRecord(path=path, bytes=self.bytes, crc32c=self.crc32c, xxh3=self.xxh3)


def digest_bytes(data: bytes, path: str) -> FileRecord:
    """Record of a file that holds `data`, under its path inside the cache."""
    digester = Digester()
    digester.update(data)
    return digester.record(path)


def digest_file(store: Store, path: str) -> FileRecord:
    """Record of a file of a cache.

    Args:
        store: where the cache lies.
        path: path inside the cache.
    """
    return _digest(store, path, crc32c=True).record(path)


def _digest(store: Store, path: str, crc32c: bool) -> Digester:
    digester = Digester(crc32c)
    try:
        for piece in store.pieces(path):
            digester.update(piece)
    except FileNotFoundError:
        raise IntegrityError(f"{store.at(path)}: missing; {REPAIR}") from None
    return digester


def check_size(store: Store, record: FileRecord) -> None:
    """Compare the size of a file with its record.

    Args:
        store: where the cache lies.
        record: what was committed.

    Raises:
        IntegrityError: it is missing or has another size.
        StorageError: it cannot be read.
    """
    try:
        found = store.size(record.path)
    except FileNotFoundError:
        raise IntegrityError(f"{store.at(record.path)}: missing; {REPAIR}") from None
    _compare_size(store.at(record.path), found, record)


def check_file(store: Store, record: FileRecord, full: bool = False) -> None:
    """Compare a file with its record: its size, then its xxh3.

    Args:
        store: where the cache lies.
        record: what was committed.
        full: compare the crc32c too.

    Raises:
        IntegrityError: it is missing or its bytes are not those of the record.
        StorageError: it cannot be read.
    """
    check_size(store, record)
    compare(store.at(record.path), _digest(store, record.path, crc32c=full), record)


def check_opened(stream: BinaryIO, where: str, record: FileRecord, full: bool = False) -> None:
    """Compare an open local file with its record; its position ends at the end.

    Args:
        stream: the file, at its beginning.
        where: how messages call it.
        record: what was committed.
        full: compare the crc32c too.

    Raises:
        IntegrityError: its bytes are not those of the record.
        StorageError: it cannot be read.
    """
    digester = Digester(full)
    try:
        check_opened_size(stream, where, record)
        while piece := stream.read(CHUNK_BYTES):
            digester.update(piece)
    except KDCacheError:
        raise
    except OSError as error:
        raise StorageError(f"{where}: cannot be read: {error.strerror}") from None
    compare(where, digester, record)


def check_opened_size(stream: BinaryIO, where: str, record: FileRecord) -> None:
    """Compare the size of an open local file with its record.

    Args:
        stream: the file.
        where: how messages call it.
        record: what was committed.

    Raises:
        IntegrityError: it has another size.
    """
    _compare_size(where, os.fstat(stream.fileno()).st_size, record)


def mapped(stream: BinaryIO) -> memoryview:
    """All bytes of an open local file, mapped for reading; the file may be closed after."""
    if os.fstat(stream.fileno()).st_size == 0:
        return memoryview(b"")  # nothing cannot be mapped
    return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _compare_size(where: str, found: int, record: FileRecord) -> None:
    if found != record.bytes:
        raise IntegrityError(f"{where}: {found} bytes, expected {record.bytes}; {REPAIR}")


def compare(where: str, found: Digester, record: FileRecord) -> None:
    """Compare what was digested with a record.

    Raises:
        IntegrityError: size, xxh3 or (where it was kept) crc32c is another.
    """
    if found.bytes != record.bytes:
        _compare_size(where, found.bytes, record)
    if found.xxh3 != record.xxh3:
        raise IntegrityError(f"{where}: xxh3 {found.xxh3}, expected {record.xxh3}; {REPAIR}")
    if found.has_crc32c and found.crc32c != record.crc32c:
        raise IntegrityError(f"{where}: crc32c {found.crc32c}, expected {record.crc32c}; {REPAIR}")
