"""Checksums of files: crc32c and xxh3 in one pass, and the check against a record."""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import xxhash

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.manifest import FileRecord

CHUNK_BYTES = 1 << 20

REPAIR = "restore the file, or delete the cache and dump again"


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


def digest_file(root: Path, path: str) -> FileRecord:
    """Record of a file of a cache.

    Args:
        root: the cache.
        path: path inside the cache.
    """
    return _digest(root / path, crc32c=True).record(path)


def _digest(file: Path, crc32c: bool) -> Digester:
    digester = Digester(crc32c)
    try:
        with file.open("rb", buffering=0) as stream:
            while piece := stream.read(CHUNK_BYTES):
                digester.update(piece)
    except FileNotFoundError:
        raise IntegrityError(f"{file}: missing; {REPAIR}") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from None
    return digester


def check_size(root: Path, record: FileRecord) -> None:
    """Compare the size of a file with its record.

    Args:
        root: the cache.
        record: what was committed.

    Raises:
        IntegrityError: it is missing or has another size.
        StorageError: it cannot be read.
    """
    file = root / record.path
    try:
        size = file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        raise IntegrityError(f"{file}: missing; {REPAIR}") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from None
    if size != record.bytes:
        raise IntegrityError(f"{file}: {size} bytes, expected {record.bytes}; {REPAIR}")


def check_file(root: Path, record: FileRecord, full: bool = False) -> None:
    """Compare a file with its record: its size, then its xxh3.

    Args:
        root: the cache.
        record: what was committed.
        full: compare the crc32c too.

    Raises:
        IntegrityError: it is missing or its bytes are not those of the record.
        StorageError: it cannot be read.
    """
    check_size(root, record)
    file = root / record.path
    found = _digest(file, crc32c=full)
    if found.xxh3 != record.xxh3:
        raise IntegrityError(f"{file}: xxh3 {found.xxh3}, expected {record.xxh3}; {REPAIR}")
    if full and found.crc32c != record.crc32c:
        raise IntegrityError(f"{file}: crc32c {found.crc32c}, expected {record.crc32c}; {REPAIR}")
