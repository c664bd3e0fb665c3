"""One Zarr array of a dense signal, its only shard file mapped; chunks are checked when first read.

# R rows, L layers, C chunks of rows
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from kdcache.errors import IntegrityError
from kdcache.formats.stores.store import REPAIR
from kdcache.formats.zarr_layout import (
    CHUNK_ROWS,
    CRC_BYTES,
    chunk_bytes,
    crc_bytes,
    decode_index,
    num_row_chunks,
)

#: Bytes that the system is asked to read at once; pages are a divisor of it.
AHEAD_BYTES = 1 << 22


class MappedArray:
    """One Zarr array [R, L, ...] of a part: its only shard file, mapped.

    Attributes:
        file: path or URL of the shard file; there is none where R is 0.
        shape: [R, L, ...].
        dtype: as stored.
    """

    def __init__(
        self,
        data: memoryview,
        file: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        checksums: np.ndarray | None = None,
    ) -> None:
        """Read the chunk index of the file.

        Args:
            data: all bytes of the shard file, mapped; none where R is 0.
            file: how messages call it.
            shape: [R, L, ...].
            dtype: as stored.
            checksums: [C, L] uint32 that the chunks must have; those that stand behind them
                without it, which a chunk from elsewhere has too.

        Raises:
            IntegrityError: it is short, or its index is damaged or lacks a chunk.
        """
        self.file, self.shape, self.dtype = file, shape, dtype
        self._size = chunk_bytes(shape, dtype)
        grid = num_row_chunks(shape[0]), shape[1]
        self._checked = np.zeros(grid, dtype=bool)
        self._checksums = checksums
        self._data = np.frombuffer(data, dtype=np.uint8)
        self._map = data.obj if isinstance(data.obj, mmap.mmap) else None
        self._offsets = np.zeros(grid, dtype=np.int64)
        self._begin_lists: dict[int, list[int]] = {}
        if shape[0]:
            if not len(data):
                raise IntegrityError(f"{file}: empty; {REPAIR}")
            try:
                self._offsets = decode_index(self._data, *grid, self._size)
            except IntegrityError as error:
                raise IntegrityError(f"{file}: {error}; {REPAIR}") from None

    @property
    def chunks_read(self) -> int:
        """Chunks that were read so far, each counted once."""
        return int(self._checked.sum())

    def read(self, start: int, stop: int, layer: int) -> np.ndarray:
        """[stop - start, ...] values of one layer, copied.

        Args:
            start: first row.
            stop: row after the last.
            layer: layer index.

        Raises:
            IndexError: there are no such rows or layer.
            IntegrityError: a chunk is not what its crc32c says.
        """
        if not (0 <= start <= stop <= self.shape[0] and 0 <= layer < self.shape[1]):
            raise IndexError(f"rows {start} to {stop} of layer index {layer} in {self.shape}")
        out = np.empty((stop - start, *self.shape[2:]), dtype=self.dtype)
        at = start
        while at < stop:
            number, first = divmod(at, CHUNK_ROWS)
            end = min(stop, (number + 1) * CHUNK_ROWS)
            chunk = self._chunk(number, layer)
            out[at - start : end - start] = chunk[first : first + end - at]
            at = end
        return out

    def copy_runs(
        self,
        starts: np.ndarray,
        counts: np.ndarray,
        layer: int,
        out: np.ndarray,
        places: np.ndarray,
    ) -> None:
        """Copy runs of rows of one layer, each at the speed of memory.

        Args:
            starts: [S] int64 first row of each run.
            counts: [S] int64 its rows, 0 allowed.
            layer: layer index.
            out: [R] items of `row_dtype`, to be filled.
            places: [S] int64 where each run begins in it.

        Raises:
            IndexError: there are no such rows.
            IntegrityError: a chunk is not what its crc32c says.
        """
        filled = counts > 0
        starts, counts, places = starts[filled], counts[filled], places[filled]
        if not len(starts):
            return
        ends = starts + counts
        if starts.min() < 0 or ends.max() > self.shape[0]:
            raise IndexError(f"rows {starts.min()} to {ends.max()} in {self.shape}")
        offsets, checked = self._begins(layer), self._checked[:, layer]
        step, rows = self.row_dtype.itemsize, self._every_row
        for row, left, to in zip(starts.tolist(), counts.tolist(), places.tolist(), strict=True):
            while left:
                number, inner = divmod(row, CHUNK_ROWS)
                if not checked[number]:
                    self._chunk(number, layer)
                num = min(left, CHUNK_ROWS - inner)
                begin = offsets[number] + inner * step
                out[to : to + num] = rows[begin : begin + num * step : step]
                row, left, to = row + num, left - num, to + num

    def will_need(self, layers: Sequence[int]) -> None:
        """Ask the system to read some layers from the disk ahead of their use."""
        if self._map is None:
            return
        for layer in layers:
            offsets = self._offsets[:, layer]
            start, stop = int(offsets.min()), int(offsets.max()) + self._size
            # In pieces: a call holds up other threads of this process.
            for at in range(start - start % AHEAD_BYTES, stop, AHEAD_BYTES):
                self._map.madvise(mmap.MADV_WILLNEED, at, min(AHEAD_BYTES, stop - at))

    @cached_property
    def row_dtype(self) -> np.dtype:
        """A row of one layer as so many bytes."""
        return np.dtype(f"V{self._size // CHUNK_ROWS}")

    @cached_property
    def _every_row(self) -> np.ndarray:
        """As many bytes as a row has, from every byte of the file on."""
        count = len(self._data) - self.row_dtype.itemsize + 1
        return np.ndarray((count,), dtype=self.row_dtype, buffer=self._data, strides=(1,))

    def _begins(self, layer: int) -> list[int]:
        """Where the chunks of a layer begin."""
        if layer not in self._begin_lists:
            self._begin_lists[layer] = self._offsets[:, layer].tolist()
        return self._begin_lists[layer]

    def _chunk(self, number: int, layer: int) -> np.ndarray:
        """[512, ...] one chunk in the map, checked the first time."""
        begin = int(self._offsets[number, layer])
        flat = self._data[begin : begin + self._size]
        if not self._checked[number, layer]:
            found = crc_bytes(flat)
            right = [self._data[begin + self._size : begin + self._size + CRC_BYTES]]
            if self._checksums is not None:
                own = self._checksums[number, layer : layer + 1]
                right.append(own.astype("<u4").view(np.uint8))
            if not all(np.array_equal(found, crc) for crc in right):
                raise IntegrityError(
                    f"{self.file}: the crc32c of chunk {number} of layer index {layer} is "
                    f"another; {REPAIR}"
                )
            self._checked[number, layer] = True
        return flat.view(self.dtype).reshape(CHUNK_ROWS, *self.shape[2:])
