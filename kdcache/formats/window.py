"""Windows: samples gathered from several shards at once, by vectorised takes.

# M samples of the window, n hypotheses of a sample, R replicas
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdcache.errors import IntegrityError, KDCacheError
from kdcache.formats.buffers import TABLES
from kdcache.formats.dense_window import DenseWindow
from kdcache.formats.joined import JoinedColumns
from kdcache.formats.manifest import SAMPLES, FileRecord
from kdcache.formats.padded import Padded
from kdcache.formats.ragged import Ragged, joined_lengths
from kdcache.formats.replicas import by_replica, replica_counts
from kdcache.formats.rows import take_rows
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    HiddenRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.units import (
    MAIN_COLUMN,
    hypothesis_lengths,
    label_counts,
    num_replicas,
    predicted_lengths,
)

if TYPE_CHECKING:
    from kdcache.formats.cache import Cache

#: Records read at a time.
THREADS = 8


class _Turn(NamedTuple):
    """Which replica of a signal is served; one of one: a sample's are served together.

    Attributes:
        replicas: R that are rows of their own.
        number: of the one whose turn it is.
    """

    replicas: int
    number: int

    def rows(self, samples: np.ndarray) -> np.ndarray:
        """Rows of some samples."""
        return samples if self.replicas == 1 else samples * self.replicas + self.number

    def of(self, rows: np.ndarray) -> np.ndarray:
        """[M] from what is known of all rows."""
        return rows if self.replicas == 1 else rows[self.number :: self.replicas]


class WindowReader:
    """Some shards of a cache, their samples numbered one after another."""

    def __init__(
        self,
        cache: Cache,
        shards: Sequence[int],
        streams: Sequence[str],
        signals: Sequence[str],
        epoch: int | None = None,
    ) -> None:
        """Map the shards and check that labels lie on their tokens.

        Args:
            cache: the cache.
            shards: shard numbers, in the order of the window.
            streams: streams to serve.
            signals: signals to serve.
            epoch: of the replicas of a sample serve the one of this epoch: they take turns, from 0
                on; None: all of them.

        Raises:
            FormatError: a stream or signal is not in the cache, or a file is damaged.
        """
        for name in streams:
            cache.stream(name)
        cache.store.fetch(window_files(cache, shards, signals))
        samples = [cache.samples(shard) for shard in shards]
        # Of each sample the row and the two halves of its id lie side by side.
        self._names = TABLES.array((sum(len(shard.row) for shard in samples), 3), np.int64)
        start = 0
        for shard_samples in samples:
            stop = start + len(shard_samples.row)
            self._names[start:stop, 0] = shard_samples.row
            self._names[start:stop, 1:] = shard_samples.sample_id.view(np.int64)
            start = stop
        held = [{name: shard.streams[name] for name in streams} for shard in samples]
        self._samples = samples
        self._streams = JoinedColumns(held)
        self._lengths: dict[str, np.ndarray] = {
            name: joined_lengths([file[name] for file in held]) for name in streams
        }
        self._predicted: dict[str, np.ndarray] = {
            name: predicted_lengths([file[name] for file in held]) for name in streams
        }
        self._columns: dict[str, JoinedColumns] = {}
        self._dense: dict[str, DenseWindow] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._hypothesis_lengths: dict[str, np.ndarray] = {}
        self._masked: dict[str, np.ndarray] = {}
        self._turns: dict[str, _Turn] = {}
        for name in signals:
            record = cache.signal(name)
            replicas = 1 if epoch is None else num_replicas(cache, record)
            self._turns[name] = _Turn(replicas, (epoch or 0) % replicas)
            if isinstance(record, HiddenRecord | AttentionRecord):
                held_rows = [cache.dense_shard(name, shard) for shard in shards]
                self._dense[name] = DenseWindow(held_rows, replicas)
            else:
                self._open_columns(cache, record, shards)

    def _open_columns(self, cache: Cache, record: SignalRecord, shards: Sequence[int]) -> None:
        """Map a signal that is kept in Arrow; its labels must be as many as what they describe."""
        name, main, turn = record.name, MAIN_COLUMN[record.kind], self._turns[record.name]
        parts: list[Mapping[str, Ragged]] = []
        for shard in shards:
            held = cache.signal_shard(name, shard)
            expected = label_counts(cache, record, shard)
            counts = None
            if turn.replicas > 1:
                counts = replica_counts(cache, record, shard, turn.replicas)
            for start, stop, columns in held.parts:
                if expected is not None:
                    mine = expected[start - held.start : stop - held.start]
                    _check_lengths(cache, name, shard, mine, columns[main].lengths)
                if counts is not None:
                    part = counts[start - held.start : stop - held.start]
                    columns = by_replica(record, columns, part)
                parts.append(columns)
        self._columns[name] = JoinedColumns(parts)
        self._counts[name] = turn.of(joined_lengths([part[main] for part in parts]))
        if isinstance(record, BeamsRecord):
            found = [
                [hypothesis_lengths(part["hypotheses"], n) for n in range(record.num_hypotheses)]
                for part in parts
            ]
            empty = np.empty((record.num_hypotheses, 0), np.int64)
            self._hypothesis_lengths[name] = np.concatenate([empty, *map(np.array, found)], axis=1)
        if isinstance(record, MasksRecord):
            self._masked[name] = turn.of(joined_lengths([part["masked"] for part in parts]))

    @property
    def num_samples(self) -> int:
        """Samples of the window."""
        return len(self._names)

    @property
    def row(self) -> np.ndarray:
        """[M] int64 corpus row of each sample."""
        return self._names[:, 0]

    @property
    def sample_id(self) -> np.ndarray:
        """[M, 16] uint8 id of each sample."""
        return self._names[:, 1:].view(np.uint8)

    def take_names(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which samples some are: [R] int64 corpus rows and [R, 16] uint8 sample ids.

        Args:
            rows: [R] int64 samples of the window, repeats allowed.
        """
        taken = take_rows(self._names, rows)
        return taken[:, 0], taken[:, 1:].view(np.uint8)

    def lengths(self, stream: str) -> np.ndarray:
        """[M] int64 tokens of each sample in a stream."""
        return self._lengths[stream]

    def texts(self, field: str) -> list[str]:
        """M raw texts of a field of the corpus."""
        return [text for shard in self._samples for text in shard.text(field).to_pylist()]

    def tasks(self) -> list[str]:
        """M names of tasks; none where the corpus has no tasks."""
        found = [shard.tasks() for shard in self._samples]
        return [task for column in found if column is not None for task in column.to_pylist()]

    def sample_bytes(self, layers: Mapping[str, Sequence[int]]) -> float:
        """Bytes that a sample takes on average.

        Args:
            layers: dense signal to the layers that are read of it.
        """
        total = float(self._streams.nbytes)
        for name, columns in self._columns.items():
            total += columns.nbytes / self._turns[name].replicas
        for name, read in layers.items():
            total += int(self.counts(name).sum()) * self._dense[name].row_bytes * len(read)
        return total / max(1, self.num_samples)

    def take_padded(
        self, rows: np.ndarray, ends: np.ndarray, pads: Mapping[str, int]
    ) -> dict[str, Padded]:
        """Token ids of several batches as padded matrices, by stream.

        Args:
            rows: [R] integer samples of all batches, counted within the window, repeats allowed.
            ends: [batches + 1] int64 samples before each batch, and of all.
            pads: stream to the id that stands outside the mask.
        """
        return self._streams.take_padded(rows, ends, pads)

    def take_stream(self, name: str, rows: np.ndarray) -> Ragged:
        """Token ids of some samples in one stream, as they are stored.

        Args:
            name: a stream this window serves.
            rows: [R] integer samples of the window, repeats allowed.
        """
        return self._streams.take(rows)[name]

    def take_signal(self, name: str, rows: np.ndarray, wide: bool = False) -> dict[str, Ragged]:
        """Labels of some samples, by column.

        Args:
            name: a signal this window serves.
            rows: [R] integer samples of the window, repeats allowed.
            wide: in their wide form, see `wide`; else as they are stored.
        """
        columns, rows = self._columns[name], self._turns[name].rows(rows)
        return columns.take_wide(rows) if wide else columns.take(rows)

    def take_dense(
        self, name: str, rows: np.ndarray, layers: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Rows of some samples in a dense signal, as they are stored.

        Args:
            name: a dense signal this window serves.
            rows: [S] integer samples of the window, repeats allowed.
            layers: indices of layers in the signal's record; no other is read.

        Returns:
            [R, L, W] values, [R, L] scales (for int8, else None), and [S] rows of each sample.
        """
        return self._dense[name].take(self._turns[name].rows(rows), layers)

    def counts(self, name: str) -> np.ndarray:
        """[M] int64 records of each sample in a signal's main column (rows of a dense one)."""
        if name in self._dense:
            return self._turns[name].of(self._dense[name].counts)
        return self._counts[name]

    def hypothesis_lengths(self) -> dict[str, np.ndarray]:
        """[n, M] int64 tokens of the hypotheses of each beams signal, 0 where there are fewer."""
        return self._hypothesis_lengths

    def predicted_counts(self) -> dict[str, np.ndarray]:
        """[M] int64 tokens of each stream that a causal model predicts."""
        return self._predicted

    def masked_counts(self) -> dict[str, np.ndarray]:
        """[M] int64 masked tokens of the replicas that are served, of each masks signal."""
        return self._masked


def window_files(cache: Cache, shards: Sequence[int], signals: Sequence[str]) -> list[FileRecord]:
    """Records of all data files that a window reads, those of the signals' inputs too.

    Args:
        cache: the cache.
        shards: shard numbers.
        signals: signals that the window serves.

    Raises:
        FormatError: a signal or a commit is missing or damaged.
    """
    inputs = [name for signal in signals for name in cache.signal(signal).inputs]
    names = list(dict.fromkeys([SAMPLES, *inputs, *signals]))
    commits = [(name, shard) for shard in shards for name in names]
    if isinstance(cache.store, LocalStore):
        records = [cache.commit_record(*commit) for commit in commits]
    else:  # over a network each takes its time, so they are read side by side
        with ThreadPoolExecutor(THREADS, "kdcache-records") as threads:
            records = list(threads.map(lambda commit: cache.commit_record(*commit), commits))
    return [file for record in records for part in record.parts for file in part.files]


class WindowAhead:
    """Fetches the files of a window in the background, while the one before is read.

    Of a remote cache they are copied here. Of a dense signal, whose rows are then read at random,
    the layers that are needed are brought into memory, as far as the system has room.

    Args:
        cache: the cache.
        signals: signals that the windows serve.
        stop: ends the fetching, with the files that are on their way.
        layers: dense signal to the indices of its layers that are read.
    """

    def __init__(
        self,
        cache: Cache,
        signals: Sequence[str],
        stop: Event,
        layers: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._cache, self._signals, self._stop = cache, signals, stop
        self._layers = layers or {}

    def begin(self, shards: Sequence[int]) -> None:
        """Begin to fetch a window of these shards."""
        if self._layers or not isinstance(self._cache.store, LocalStore):
            Thread(target=self._fetch, args=(shards,), name="kdcache-ahead", daemon=True).start()

    def _fetch(self, shards: Sequence[int]) -> None:
        # Whoever reads the window meets the same error.
        with contextlib.suppress(KDCacheError):
            files = window_files(self._cache, shards, self._signals)
            self._cache.store.fetch(takewhile(lambda _: not self._stop.is_set(), files))
            for shard in shards:
                for name, layers in self._layers.items():
                    if self._stop.is_set():
                        return
                    DenseWindow([self._cache.dense_shard(name, shard)]).will_need(layers)


def _check_lengths(
    cache: Cache, name: str, shard: int, expected: np.ndarray, labels: np.ndarray
) -> None:
    """Labels of another number than what they describe would slide against it."""
    wrong = np.flatnonzero(expected != labels)
    if len(wrong):
        first = int(wrong[0])
        raise IntegrityError(
            f"{cache.path}: signal {name!r} shard {shard}: {len(wrong)} samples have another "
            f"number of labels than they must have, the first {int(labels[first])}, "
            f"expected {int(expected[first])}; delete the cache and dump again"
        )
