"""Data files written and digested in one pass: Arrow IPC files and Zarr groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from kdcache.formats.integrity import Digester
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores.commit import write_file
from kdcache.formats.zarr_layout import group_files


class DigestingSink:
    """A file object that passes on what Arrow writes and digests it on the way."""

    closed = False

    def __init__(self, stream: BinaryIO | None) -> None:
        """Start with no bytes.

        Args:
            stream: where they go; None digests alone.
        """
        self._stream = stream
        self.digester = Digester()

    def write(self, data: Any) -> int:
        """Take in a buffer of Arrow's, or bytes."""
        piece = memoryview(data)
        if self._stream is not None:
            self._stream.write(piece)
        self.digester.update(piece)
        return piece.nbytes

    def writable(self) -> bool:
        """Arrow asks."""
        return True

    def flush(self) -> None:
        """The owner of the stream flushes it."""

    def close(self) -> None:
        """The owner of the stream closes it."""


def write_ipc(batch: pa.RecordBatch, stream: BinaryIO | None) -> FileRecord:
    """Digest a batch as an Arrow IPC file, and write it where a stream is given.

    Returns:
        Its record, under no path of a cache.
    """
    sink = DigestingSink(stream)
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), batch.schema) as writer:
        writer.write_batch(batch)
    return sink.digester.record("unnamed")


def write_group(folder: Path | None, arrays: Mapping[str, np.ndarray]) -> list[FileRecord]:
    """Digest arrays as a Zarr group, and write it where a folder is given.

    Args:
        folder: of the group; its files are made durable, the names in it are not.
        arrays: name to [rows, layers, ...] array.

    Returns:
        Records of all files in order of path, their paths those inside the group.
    """
    records = []
    for path, pieces in group_files(arrays):
        digester = Digester()
        passing = _digested(pieces, digester)
        if folder is None:
            for _ in passing:
                pass
        else:
            write_file(folder / path, passing)
        records.append(digester.record(path))
    return records


def _digested(pieces: Iterable[memoryview], digester: Digester) -> Iterator[memoryview]:
    """The same pieces, digested as they pass."""
    for piece in pieces:
        digester.update(piece)
        yield piece
