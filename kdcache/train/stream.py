"""Batches off a cache: the order of training made tensors, one thread ahead of their need."""

# B samples of a micro-batch, S source positions, T target positions, N = sum of target lengths

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.formats.cache import Cache
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids
from kdcache.formats.window import WindowAhead, WindowReader
from kdcache.labels import CodedLabels, LogitsSpec, coded_labels
from kdcache.train.growth import Growth
from kdcache.train.order import (
    ORDER_VERSION,
    OrderState,
    batching_digest,
    epoch_windows,
    micro_batches,
    plan_digest,
    window_batches,
)

#: Global batches made ahead of need.
PREFETCH = 3


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        rows: [B] int64 corpus rows, on the host.
        src: [B, S] int64 source ids, padded at the end.
        src_mask: [B, S] bool, true on tokens.
        labels: [B, T] int64 target ids, padded at the end.
        label_mask: [B, T] bool, true on tokens; N of them.
        targets: [N] int64, the target ids of `label_mask`, row by row.
        labels_of: signal name to its labels at the same N positions, in the same order.
    """

    rows: np.ndarray
    src: Tensor
    src_mask: Tensor
    labels: Tensor
    label_mask: Tensor
    targets: Tensor
    labels_of: Mapping[str, CodedLabels]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory without waiting."""
        if device.type == "cpu":
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        labels_of = {
            name: coded.to(device, non_blocking=True) for name, coded in self.labels_of.items()
        }
        return replace(self, labels_of=labels_of, **moved)

    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        labels_of = {name: _pinned(coded) for name, coded in self.labels_of.items()}
        return replace(_pinned(self), labels_of=labels_of)


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimiser step is computed from.

    Attributes:
        state: where the stream stands after this batch.
        epoch: epoch it belongs to, from 0.
        shards: the first so many shards of the cache are in that epoch.
        num_tokens: target tokens in all of its micro-batches.
        micro: its micro-batches, each some of its samples.
    """

    state: OrderState
    epoch: int
    shards: int
    num_tokens: int
    micro: tuple[Batch, ...]

    @property
    def rows(self) -> np.ndarray:
        """[B] int64 corpus rows."""
        return np.concatenate([batch.rows for batch in self.micro])


class BatchStream:
    """Global batches of a cache, epoch after epoch.

    Args:
        cache: an open cache.
        source: stream the student's encoder reads.
        target: stream the student predicts.
        signals: names of the logits signals to read beside it.
        batch_tokens: most samples x longest target (and source) of a global batch.
        seed: recipe seed.
        window_shards: shards shuffled together.
        accumulate: micro-batches of a global batch.
        max_epochs: stop after this many; None: never.
        state: where to go on; from the start without it.
        pin: whether batches are put into page-locked memory.
        while_dumping: whether a dump may be on its way: every epoch is then drawn from the
            longest prefix of shards that all of the signals have when it begins, and the first
            epoch waits for the first shard.

    Raises:
        FormatError: the cache lacks a stream or a signal, or its dump is unfinished and that
            is not expected.
        IdentityError: the state is of another order.
    """

    def __init__(
        self,
        cache: Cache,
        source: str,
        target: str,
        signals: Sequence[str],
        batch_tokens: int,
        seed: int,
        window_shards: int,
        *,
        accumulate: int = 1,
        max_epochs: int | None = None,
        state: OrderState | None = None,
        pin: bool = False,
        while_dumping: bool = False,
    ) -> None:
        manifest = cache.manifest
        self.growth = Growth(cache, signals, while_dumping)
        for name in (source, target):
            cache.stream(name)
        self.cache, self.source, self.target = cache, source, target
        self.signals = list(signals)
        self._streams = list(dict.fromkeys([source, target]))
        self.batch_tokens, self.window_shards = batch_tokens, window_shards
        self.accumulate, self.max_epochs, self.pin = accumulate, max_epochs, pin
        self._pad = {
            name: manifest.tokenizers[manifest.streams[name].tokenizer].pad_id or 0
            for name in (source, target)
        }
        self._specs = {
            name: LogitsSpec(record.codec, record.vocab_size, tuple(record.temperatures))
            for name, record in ((name, cache.logits(name)) for name in signals)
        }
        shards = [(shard.start, shard.stop) for shard in manifest.shards]
        self._plan = plan_digest(manifest.corpus.digest, shards)
        digests = [manifest.streams[name].digest for name in (source, target)]
        digest = batching_digest(self._plan, digests, batch_tokens, window_shards)
        if state is not None:
            state.check(digest, seed)
        self.state = state or OrderState(digest=digest, version=ORDER_VERSION, seed=seed)

    def __iter__(self) -> Generator[GlobalBatch, None, None]:
        """Batches from the state on, made by one thread ahead; its errors are raised here."""
        queue: Queue[Any] = Queue(maxsize=PREFETCH)
        stop = Event()
        thread = Thread(target=self._produce, args=(queue, stop), name="kdcache-batches")
        thread.daemon = True
        try:
            thread.start()  # an interrupt while it starts must stop it too
            while True:
                item = queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                yield item
        finally:
            stop.set()
            while thread.is_alive():
                _drain(queue)
                thread.join(timeout=0.05)

    def count_batches(self, num_epochs: int, most: int) -> int:
        """Global batches of the first epochs of a whole cache, counted no further than `most`.

        Args:
            num_epochs: epochs to count.
            most: where to stop counting.
        """
        count = 0
        for epoch in range(num_epochs):
            for window, shards in enumerate(self._windows(epoch, self.cache.num_shards)):
                if count >= most:
                    return most
                reader = WindowReader(self.cache, shards, self._streams, [])
                count += len(self._window_batches(reader, epoch, window))
        return min(count, most)

    def _windows(self, epoch: int, num_shards: int) -> list[list[int]]:
        """Shards of each window of an epoch that is drawn from the first of them."""
        return epoch_windows(self._plan, num_shards, self.window_shards, self.state.seed, epoch)

    def _window_batches(self, reader: WindowReader, epoch: int, window: int) -> list[np.ndarray]:
        """Global batches of a window, as indices into it."""
        return window_batches(
            self._plan,
            self.state.seed,
            epoch,
            window,
            reader.lengths(self.source),
            reader.lengths(self.target),
            self.batch_tokens,
        )

    def _produce(self, queue: Queue[Any], stop: Event) -> None:
        """Fill the queue until told to stop; an error is handed over, not lost."""
        last: BaseException | None = None
        try:
            for batch in self._batches(stop):
                if not _put(queue, batch, stop):
                    return
        except BaseException as error:
            last = error
        _put(queue, last, stop)

    def _batches(self, stop: Event) -> Iterator[GlobalBatch]:
        """Global batches, made as they are asked for; the last one where it is told to stop."""
        state, ahead = self.state, WindowAhead(self.cache, self.signals, stop)
        while self.max_epochs is None or state.epoch < self.max_epochs:
            pinned = self.growth.pinned(state, stop)
            if pinned is None:
                return
            state = replace(state, shards=pinned)
            windows = self._windows(state.epoch, pinned)
            for window in range(state.window, len(windows)):
                reader = WindowReader(self.cache, windows[window], self._streams, self.signals)
                if window + 1 < len(windows):
                    ahead.begin(windows[window + 1])
                batches = self._window_batches(reader, state.epoch, state.window)
                if state.batch >= len(batches):
                    raise TrainingError(
                        f"order state: batch {state.batch} of a window with {len(batches)}; "
                        "the checkpoint is damaged, start a new run"
                    )
                for batch in batches[state.batch :]:
                    epoch, state = state.epoch, state.advanced(len(batches), len(windows))
                    yield self._global_batch(reader, batch, state, (epoch, pinned))

    def _global_batch(
        self, reader: WindowReader, index: np.ndarray, state: OrderState, drawn: tuple[int, int]
    ) -> GlobalBatch:
        """Gather one global batch, micro-batch by micro-batch; `drawn` is epoch and shards."""
        micro = tuple(self._batch(reader, part) for part in micro_batches(index, self.accumulate))
        num_tokens = sum(len(batch.targets) for batch in micro)
        return GlobalBatch(state, *drawn, num_tokens, micro)

    def _batch(self, reader: WindowReader, index: np.ndarray) -> Batch:
        """Gather one micro-batch; `index` counts within the window."""
        src, src_mask, _ = _padded(reader.take_stream(self.source, index), self._pad[self.source])
        labels, label_mask, targets = _padded(
            reader.take_stream(self.target, index), self._pad[self.target]
        )
        batch = Batch(
            rows=reader.row[index],
            src=src,
            src_mask=src_mask,
            labels=labels,
            label_mask=label_mask,
            targets=targets,
            labels_of={
                name: coded_labels(self._specs[name], reader.take_signal(name, index))
                for name in self.signals
            },
        )
        return batch.pinned() if self.pin else batch


def _padded(stream: Ragged, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, L] padded at the end, their mask [B, L], and the ids one after another [N]."""
    lengths = stream.lengths
    flat = join_ids(stream.fields).astype(np.int64)
    mask = np.arange(max(1, int(lengths.max()))) < lengths[:, None]  # [B, L]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = flat
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(flat)


R = TypeVar("R", Batch, CodedLabels)


def _pinned(record: R) -> R:
    """A dataclass with its tensors in page-locked memory."""
    moved = {
        field.name: getattr(record, field.name).pin_memory()
        for field in fields(record)
        if isinstance(getattr(record, field.name), Tensor)
    }
    return replace(record, **moved)


def _put(queue: Queue[Any], item: object, stop: Event) -> bool:
    """Put an item unless told to stop meanwhile."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.1)
        except Full:
            continue
        return True
    return False


def _drain(queue: Queue[Any]) -> None:
    """Make room, so that a waiting producer sees the stop at once."""
    try:
        while True:
            queue.get_nowait()
    except Empty:
        return
