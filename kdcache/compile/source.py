"""One cache that is compiled: what is asked of its samples, and what is taken from them.

# M samples of the cache, R samples that are taken, L layers, W width
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa

from kdcache.compile.runs import gather_runs
from kdcache.errors import IntegrityError
from kdcache.formats.cache import Cache
from kdcache.formats.dense import DenseShard
from kdcache.formats.mapped_array import MappedArray
from kdcache.formats.ragged import Ragged, segment_indices
from kdcache.formats.shard import SampleShard
from kdcache.formats.stores.store import REPAIR
from kdcache.formats.units import MAIN_COLUMN, label_counts
from kdcache.formats.zarr_layout import CHUNK_ROWS

#: Shards that stay mapped; more are opened again when they are needed.
_OPEN_SHARDS = 16

T = TypeVar("T")


class Source:
    """A cache whose samples are numbered from 0 over all of its shards.

    Attributes:
        cache: the cache.
        number: its place among the caches that are compiled.
    """

    def __init__(self, cache: Cache, number: int) -> None:
        """Open nothing yet.

        Args:
            cache: the cache.
            number: its place among the caches that are compiled.
        """
        self.cache, self.number = cache, number
        shards = cache.manifest.shards
        self._starts = np.array([shard.start for shard in shards] + [cache.num_samples])
        self._open: OrderedDict[tuple[str, str, int], object] = OrderedDict()

    @property
    def name(self) -> str:
        """Where it lies, for messages."""
        return str(self.cache.path)

    @property
    def num_samples(self) -> int:
        """M."""
        return self.cache.num_samples

    def shards(self) -> Iterator[tuple[int, int, int]]:
        """Number, first sample and sample after the last of every shard."""
        for number, shard in enumerate(self.cache.manifest.shards):
            yield number, shard.start, shard.stop

    def samples(self, shard: int) -> SampleShard:
        """The samples of one shard, mapped."""
        return self._opened("samples", "", shard, lambda: self.cache.samples(shard))

    def columns(self, signal: str, shard: int) -> list[tuple[int, int, dict[str, Ragged]]]:
        """Parts of one shard of an Arrow signal, mapped, their labels counted against the samples.

        Raises:
            IntegrityError: bytes are not those committed, or a sample has too many or few labels.
        """

        def checked() -> list[tuple[int, int, dict[str, Ragged]]]:
            held = self.cache.signal_shard(signal, shard)
            record = self.cache.signal(signal)
            expected = label_counts(self.cache, record, shard)
            if expected is not None:
                main = MAIN_COLUMN[record.kind]
                found = np.concatenate([columns[main].lengths for _, _, columns in held.parts])
                wrong = np.flatnonzero(found != expected)
                if len(wrong):
                    raise IntegrityError(
                        f"{self.name}: signal {signal!r} shard {shard}: sample "
                        f"{held.start + int(wrong[0])} has {int(found[wrong[0]])} labels, expected "
                        f"{int(expected[wrong[0]])}; {REPAIR}"
                    )
            return held.parts

        return self._opened("signal", signal, shard, checked)

    def dense(self, signal: str, shard: int) -> DenseShard:
        """One shard of a dense signal, mapped."""
        return self._opened("dense", signal, shard, lambda: self.cache.dense_shard(signal, shard))

    def sample_ids(self) -> np.ndarray:
        """[M, 16] uint8 of all samples."""
        ids = np.empty((self.num_samples, 16), dtype=np.uint8)
        for shard, start, stop in self.shards():
            ids[start:stop] = self.samples(shard).sample_id
        return ids

    def rows(self) -> np.ndarray:
        """[M] int64 corpus rows of all samples."""
        rows = np.empty(self.num_samples, dtype=np.int64)
        for shard, start, stop in self.shards():
            rows[start:stop] = self.samples(shard).row
        return rows

    def lengths(self, streams: Sequence[str]) -> dict[str, np.ndarray]:
        """Name of a stream to [M] int32 tokens of every sample."""
        found = {name: np.empty(self.num_samples, dtype=np.int32) for name in streams}
        for shard, start, stop in self.shards():
            samples = self.samples(shard)
            for name, lengths in found.items():
                lengths[start:stop] = samples.streams[name].lengths
        return found

    def locate(self, index: np.ndarray) -> np.ndarray:
        """[R] int64 shard of each of some samples."""
        return np.searchsorted(self._starts, index, side="right") - 1

    def take_stream(self, name: str, index: np.ndarray) -> Ragged:
        """Tokens of some samples, as they are stored.

        Args:
            name: of the stream.
            index: [R] samples, in any order.
        """
        shard = self.locate(index)
        used, which = np.unique(shard, return_inverse=True)
        columns = [self.samples(int(number)).streams[name] for number in used]
        return gather_runs(columns, which, index - self._starts[shard])

    def take_texts(self, field: str, index: np.ndarray) -> list[str]:
        """Raw texts of some samples."""
        return self._take_texts(index, lambda samples: samples.text(field))

    def take_tasks(self, index: np.ndarray) -> list[str]:
        """Tasks of some samples, in a cache that has tasks."""
        return self._take_texts(index, lambda samples: samples.tasks())

    def take_ids(self, index: np.ndarray) -> np.ndarray:
        """[R, 16] uint8 ids of some samples."""
        ids = np.empty((len(index), 16), dtype=np.uint8)
        for mine, inner, samples in self._of_shards(index):
            ids[mine] = samples.sample_id[inner]
        return ids

    def take_columns(self, signal: str, index: np.ndarray) -> dict[str, Ragged]:
        """Labels of some samples in an Arrow signal, by column.

        Args:
            signal: its name.
            index: [R] samples, in any order; at least one.
        """
        parts = [
            part
            for number in np.unique(self.locate(index))
            for part in self.columns(signal, int(number))
        ]
        begins = np.array([start for start, _, _ in parts])
        which = np.searchsorted(begins, index, side="right") - 1
        inner = index - begins[which]
        return {
            name: gather_runs([columns[name] for _, _, columns in parts], which, inner)
            for name in parts[0][2]
        }

    def count_labels(self, signal: str, index: np.ndarray) -> np.ndarray:
        """[R] int64 records of the main column of some samples."""
        record = self.cache.signal(signal)
        counts = np.empty(len(index), dtype=np.int64)
        shard = self.locate(index)
        for number in np.unique(shard):
            mine = np.flatnonzero(shard == number)
            found = label_counts(self.cache, record, int(number))
            if found is None:
                main = MAIN_COLUMN[record.kind]
                parts = self.columns(signal, int(number))
                found = np.concatenate([columns[main].lengths for _, _, columns in parts])
            counts[mine] = found[index[mine] - self._starts[number]]
        return counts

    def take_dense(
        self,
        signal: str,
        index: np.ndarray,
        place: np.ndarray,
        values: np.ndarray,
        scale: np.ndarray | None,
    ) -> None:
        """Copy rows of a dense signal, as they are stored, to where they belong.

        Args:
            signal: its name.
            index: [R] samples.
            place: [R] int64 row of `values` where each sample's rows begin.
            values: [rows, L, W] that is filled.
            scale: [rows, L] that is filled, for int8.
        """
        shard = self.locate(index)
        for number in np.unique(shard):
            dense = self.dense(signal, int(number))
            mine = np.flatnonzero(shard == number)
            begins = np.array([part.start for part in dense.parts])
            which = np.searchsorted(begins, index[mine], side="right") - 1
            for p in np.unique(which):
                part, some = dense.parts[p], mine[which == p]
                inner = index[some] - dense.start
                first = dense.offsets[inner]
                lengths = dense.offsets[inner + 1] - first
                rows = segment_indices(first - dense.offsets[part.start - dense.start], lengths)
                to = segment_indices(place[some], lengths)
                _copy_rows(part.values, rows, to, values)
                if part.scale is not None and scale is not None:
                    _copy_rows(part.scale, rows, to, scale)

    def _of_shards(self, index: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, SampleShard]]:
        """Of each shard that some samples lie in: which of them, where in it, and the shard."""
        shard = self.locate(index)
        for number in np.unique(shard):
            mine = np.flatnonzero(shard == number)
            yield mine, index[mine] - self._starts[number], self.samples(int(number))

    def _take_texts(self, index: np.ndarray, texts: Callable[[SampleShard], pa.Array]) -> list[str]:
        found = np.empty(len(index), dtype=object)
        for mine, inner, samples in self._of_shards(index):
            found[mine] = texts(samples).take(pa.array(inner)).to_pylist()
        out: list[str] = found.tolist()
        return out

    def _opened(self, kind: str, signal: str, shard: int, opens: Callable[[], T]) -> T:
        """What was opened lately, or is opened now in place of the oldest."""
        key = kind, signal, shard
        if key not in self._open:
            self._open[key] = opens()
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]  # type: ignore[return-value]


def _copy_rows(array: MappedArray, rows: np.ndarray, to: np.ndarray, out: np.ndarray) -> None:
    """Copy rows of all layers, a chunk's at a time.

    Args:
        array: [.., L, ...] where they lie.
        rows: [N] int64.
        to: [N] int64 rows of `out`.
        out: [.., L, ...].
    """
    chunk = rows // CHUNK_ROWS
    cuts = np.flatnonzero(np.diff(chunk)) + 1
    for some, places in zip(np.split(rows, cuts), np.split(to, cuts), strict=True):
        if not len(some):
            continue
        first, last = int(some.min()), int(some.max()) + 1
        for layer in range(array.shape[1]):
            out[places, layer] = array.read(first, last, layer)[some - first]
