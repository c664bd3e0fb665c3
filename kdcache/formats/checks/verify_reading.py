"""Files that are read exactly once: digested as they come, and held until they are checked."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from threading import Lock
from typing import BinaryIO, cast

import numpy as np

from kdcache.errors import StorageError
from kdcache.formats.integrity import Digester, check_opened_size, check_size, compare
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import Store

#: Bytes that are read and digested at a time.
_CHUNK_BYTES = 1 << 22


class Buffers:
    """Memory for files, used again and again: fresh memory costs as much as reading into it.

    Attributes:
        most_bytes: of all buffers; those that wait are given up for new ones beyond it.
    """

    def __init__(self, most_bytes: int) -> None:
        """Start with none.

        Args:
            most_bytes: of all buffers.
        """
        self.most_bytes = most_bytes
        self._waiting: list[np.ndarray] = []
        self._bytes = 0
        self._lock = Lock()

    def take(self, num_bytes: int) -> memoryview:
        """Memory of some bytes, whatever stands in it."""
        with self._lock:
            fit = [b for b in self._waiting if num_bytes <= len(b) <= 2 * num_bytes]
            if fit:
                buffer = min(fit, key=len)
                self._waiting = [other for other in self._waiting if other is not buffer]
            else:
                step = 1 << max(0, num_bytes.bit_length() - 4)  # files of about one size fit too
                buffer = np.empty(-(-num_bytes // step) * step, dtype=np.uint8)
                self._bytes += len(buffer)
                while self._waiting and self._bytes > self.most_bytes:
                    self._bytes -= len(self._waiting.pop(0))
        return buffer.data[:num_bytes]

    def give(self, data: memoryview) -> None:
        """Give back what was taken; nobody may look at it any more."""
        buffer = data.obj
        assert isinstance(buffer, np.ndarray)
        with self._lock:
            self._waiting.append(buffer)


def read_checked(
    store: Store,
    record: FileRecord,
    buffers: Buffers,
    advance: Callable[[int], object] | None = None,
) -> memoryview:
    """All bytes of a file, straight from the store, if they are those of its record.

    Args:
        store: where the cache lies.
        record: of the file.
        buffers: whose memory they are in, to be given back.
        advance: told how many bytes came, again and again.

    Raises:
        IntegrityError: it is missing, or its size, xxh3 or crc32c is another.
        StorageError: it cannot be read.
    """
    if not isinstance(store, LocalStore):
        check_size(store, record)  # a size that is wrong in the record would be allocated
        data = buffers.take(record.bytes)
        pieces = _copied_into(data, store.pieces(record.path))
        return _digested(pieces, data, store, record, buffers, advance)
    with store.open(record) as stream:
        check_opened_size(stream, store.at(record.path), record)
        data = buffers.take(record.bytes)
        pieces = _read_into(data, stream, store.at(record.path))
        return _digested(pieces, data, store, record, buffers, advance)


def _digested(
    pieces: Iterator[memoryview],
    data: memoryview,
    store: Store,
    record: FileRecord,
    buffers: Buffers,
    advance: Callable[[int], object] | None,
) -> memoryview:
    """The data if the pieces that fill it are what the record says."""
    digester = Digester()
    try:
        for piece in pieces:
            digester.update(piece)
            if advance is not None:
                advance(len(piece))
        compare(store.at(record.path), digester, record)
    except BaseException:
        buffers.give(data)
        raise
    return data


def _read_into(data: memoryview, stream: BinaryIO, where: str) -> Iterator[memoryview]:
    """The pieces of a local file, each where it belongs in `data`."""
    raw = cast(io.FileIO, stream)
    os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    at = 0
    while at < len(data):
        try:
            count = raw.readinto(data[at : at + _CHUNK_BYTES])
        except OSError as error:
            raise StorageError(f"{where}: cannot be read: {error.strerror}") from None
        if not count:
            return
        yield data[at : at + count]
        at += count


def _copied_into(data: memoryview, pieces: Iterator[bytes]) -> Iterator[memoryview]:
    """Pieces of a file of a remote store, copied to where they belong; those too many uncopied."""
    at = 0
    for piece in pieces:
        stop = at + len(piece)
        if stop > len(data):
            yield memoryview(piece)
            return
        data[at:stop] = piece
        yield data[at:stop]
        at = stop
