"""Zstandard streams: bytes in pieces to compressed ones and back, with bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import pyarrow as pa

from kdcache.errors import IntegrityError
from kdcache.formats.stores.store import CHUNK_BYTES, REPAIR

#: Bytes compressed at a time, each a frame of its own; `zstd -d` takes frames one after another.
FRAME_BYTES = 1 << 22

DEFAULT_LEVEL = 3
#: Levels from fast to small.
MIN_LEVEL, MAX_LEVEL = 1, 22


def compressed(pieces: Iterable[bytes | memoryview], level: int) -> Iterator[bytes]:
    """Frames that hold all bytes of some pieces; nothing gives one empty frame.

    Args:
        pieces: the bytes, in order.
        level: of Zstandard.
    """
    codec = pa.Codec("zstd", compression_level=level)
    held, empty = bytearray(), True
    for piece in pieces:
        held += piece
        while len(held) >= FRAME_BYTES:
            yield codec.compress(bytes(held[:FRAME_BYTES]), asbytes=True)
            del held[:FRAME_BYTES]
            empty = False
    if held or empty:
        yield codec.compress(bytes(held), asbytes=True)


def decompressed(pieces: Iterable[bytes], where: str) -> Iterator[bytes]:
    """All bytes that frames hold.

    Args:
        pieces: the frames, in order, cut anywhere.
        where: how messages call the file.

    Raises:
        IntegrityError: they are no such frames, or end too early.
    """
    source = _Pieces(pieces)
    stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
    while True:
        try:
            piece = stream.read(CHUNK_BYTES)
        except OSError as error:
            if source.error is not None:
                raise source.error from None
            raise IntegrityError(f"{where}: not what was compressed: {error}; {REPAIR}") from None
        if not piece:
            return
        yield piece


class _Pieces(io.RawIOBase):
    """Pieces as a file that is read from the beginning.

    Attributes:
        error: that the source of the pieces raised.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = b""
        self.error: Exception | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            while not self._held:
                piece = next(self._pieces, None)
                if piece is None:
                    return b""
                self._held = piece
        except Exception as error:
            self.error = error
            raise
        taken, self._held = self._held[:size], self._held[size:]
        return taken
