"""A dense signal over a window of shards: rows of any samples at once, of the layers asked for.

# M samples of the window, S samples taken, R rows, L layers taken, W width
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcache.formats.dense import DenseShard
from kdcache.formats.ragged import offsets_of


class DenseWindow:
    """Some shards of a dense signal, their samples numbered one after another.

    Args:
        shards: in the order of the window.
        replicas: of every sample, which all have as many rows; each then counts as a sample.

    Attributes:
        counts: [M] int64 rows of each sample.
    """

    def __init__(self, shards: Sequence[DenseShard], replicas: int = 1) -> None:
        self._parts = [part for shard in shards for part in shard.parts]
        stored = np.array([part.stop - part.start for part in self._parts], dtype=np.int64)
        sizes = stored * replicas
        self._starts = offsets_of(sizes)
        counts = [np.repeat(np.diff(shard.offsets) // replicas, replicas) for shard in shards]
        self.counts: np.ndarray = np.concatenate(counts or [np.empty(0, np.int64)])
        # [M] first row of each sample within its part
        ends = offsets_of(self.counts)[:-1]
        self._first = ends - np.repeat(ends[self._starts[:-1]], sizes) if len(ends) else ends

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in one layer."""
        arrays = [array for part in self._parts[:1] for array in (part.values, part.scale)]
        return sum(array.row_dtype.itemsize for array in arrays if array is not None)

    def take(
        self, samples: np.ndarray, layers: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows of some samples as they are stored.

        Args:
            samples: [S] integer samples of the window, repeats allowed.
            layers: indices of layers.

        Returns:
            [R, L, W] values, [R, L] float32 scales (for int8, else None), and [S] int64 rows of
            each sample.

        Raises:
            IntegrityError: a chunk is not what its crc32c says.
        """
        counts, first = self.counts[samples], self._first[samples]
        places = offsets_of(counts)
        source = np.searchsorted(self._starts, samples, side="right") - 1
        one = self._parts[0]
        shape = (int(places[-1]), len(layers))
        values = np.empty((*shape, *one.values.shape[2:]), one.values.dtype)
        scale = None if one.scale is None else np.empty(shape, one.scale.dtype)
        for number in np.unique(source) if shape[0] else ():
            part, mine = self._parts[number], source == number
            runs = (first[mine], counts[mine])
            for array, out in ((part.values, values), (part.scale, scale)):
                if array is None or out is None:
                    continue
                rows = out.reshape(*shape, -1).view(array.row_dtype)[..., 0]  # [R, L]
                for index, layer in enumerate(layers):
                    array.copy_runs(*runs, layer, rows[:, index], places[:-1][mine])
        return values, scale, counts

    def will_need(self, layers: Sequence[int]) -> None:
        """Ask the system to read some layers from the disk ahead of their use."""
        for part in self._parts:
            for array in (part.values, part.scale):
                if array is not None and array.shape[0]:
                    array.will_need(layers)
