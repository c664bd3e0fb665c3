"""Buffers that are used again: memory that the system has given once need not be cleared again.

A block of batches is some megabytes, the tables of a window are some more, which the allocator
gives back to the system when the last array is gone; fresh pages cost as much as what is written
into them.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import numpy.typing as npt

#: Sizes are rounded up to a multiple of this many bytes.
STEP_BYTES = 1 << 20
#: Most bytes that are kept while nobody uses them.
KEPT_BYTES = 1 << 26


class Buffers:
    """Memory of some sizes, given out and kept."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def empty(self, size: int) -> np.ndarray:
        """[size] uint8 of any contents; the memory is used again when no view of it is left.

        Args:
            size: bytes.
        """
        if size < STEP_BYTES // 4:
            return np.empty(size, dtype=np.uint8)
        memory = self._found(size)
        whole = np.frombuffer(memory, dtype=np.uint8)
        # Views of an array refer to it and not to what it is a view of, as that is no array.
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole[:size]

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """An array of any contents, in memory as of `empty`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        return self.empty(size).view(dtype).reshape(shape)

    def _found(self, size: int) -> memoryview:
        """Memory of at least so many bytes, but not of twice as many."""
        for _ in range(len(self._free)):
            try:
                memory = self._free.pop(0)  # another thread may have been quicker
            except IndexError:
                break
            if size <= memory.nbytes <= 2 * size + STEP_BYTES:
                return memory
            self._free.append(memory)
        return np.empty(-(-size // STEP_BYTES) * STEP_BYTES, dtype=np.uint8).data

    def _give_back(self, memory: memoryview) -> None:
        if sum(one.nbytes for one in list(self._free)) + memory.nbytes <= KEPT_BYTES:
            self._free.append(memory)


#: Of blocks of batches, and of the tables of windows, of the process: two, so that each finds the
#: sizes that it has had before.
BUFFERS, TABLES = Buffers(), Buffers()
