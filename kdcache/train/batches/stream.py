"""Global batches off a cache: the order of training made tensors, ahead of their need."""

# B samples of a micro-batch, M samples of a window

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np
import torch

from kdcache.errors import TrainingError
from kdcache.formats.cache import Cache
from kdcache.formats.window import WindowAhead, WindowReader
from kdcache.recipe import Replicas
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.cut import joined
from kdcache.train.batches.gather import Gatherer
from kdcache.train.batches.gold import GoldLabels
from kdcache.train.batches.growth import Growth
from kdcache.train.batches.hypotheses import check_hypothesis
from kdcache.train.batches.mix_state import MixState
from kdcache.train.batches.order import (
    ORDER_VERSION,
    OrderState,
    batching_digest,
    epoch_windows,
    micro_batches,
    plan_digest,
    window_batches,
)
from kdcache.train.batches.tasks import Groups, TaskGold, TaskOrder
from kdcache.train.batches.units import Units, units_of

#: Blocks of global batches made ahead of need.
PREFETCH = 2
#: Stored bytes of a block that a thread makes: so many that what a block costs in Python, and to be
#: handed over, is shared; so few that some blocks are no burden.
BLOCK_BYTES = 1 << 23
#: Those of a block that is made when it is asked for: nothing is handed over, and somebody waits.
ASKED_BLOCK_BYTES = 1 << 22


@dataclass
class GlobalBatch:
    """What one optimiser step is computed from; of several ranks each has its own micro-batches.

    Attributes:
        state: where the stream stands after this batch.
        epoch: epoch it belongs to, from 0.
        shards: the first so many shards of the cache are in that epoch.
        rows: [B] int64 corpus rows of all ranks.
        counts: units of all ranks: tokens of every stream, and of every signal the records of its
            main column, by name; tokens of the n-th hypotheses of a beams signal under `NAME.n`;
            masked tokens of a masks signal under `NAME.masked`; tokens of a stream that a causal
            model predicts under `NAME.predicted`; samples under ""; those with a gold label, where
            they were asked for, under ".gold".
        num_tokens: tokens of the last stream, of all ranks.
        micro: micro-batches of this rank, each some of the samples.
        spare: stand-ins, the first sample of all ranks each time, that make up the number of the
            rank with the most micro-batches: a student that is spread over the ranks must run as
            often on each. They count nothing.
        sample_ids: [B, 16] uint8, of all ranks.
        cache: number of the cache that it is of, where several are mixed.
    """

    state: OrderState | MixState
    epoch: int
    shards: int
    rows: np.ndarray
    counts: Mapping[str, int]
    num_tokens: int
    micro: tuple[Batch, ...]
    spare: tuple[Batch, ...] = ()
    sample_ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 16), np.uint8))
    cache: int = 0

    def to(self, device: torch.device | str) -> GlobalBatch:
        """The batch with its micro-batches on a device."""
        micro, spare = (
            tuple(batch.to(device) for batch in batches) for batches in (self.micro, self.spare)
        )
        return replace(self, micro=micro, spare=spare)


@dataclass
class _Block:
    """Some global batches of a window that are not gathered yet."""

    window: WindowReader
    units: Units
    epoch: int
    shards: int
    gold: np.ndarray | None
    groups: Groups | None
    indices: list[np.ndarray] = field(default_factory=list)
    states: list[OrderState] = field(default_factory=list)  # after each of them


class BatchStream:
    """Global batches of a cache, epoch after epoch, the same for any number of ranks and threads.

    Args:
        cache: an open cache.
        streams: names of the streams to read; the tokens of the last one are counted.
        signals: names of the signals to read beside them.
        batch_tokens: most samples x longest sample of a global batch, in each of the streams and
            of the `hypotheses`.
        seed: recipe seed.
        window_shards: shards shuffled together.
        accumulate: micro-batches of a global batch on each rank.
        max_epochs: stop after this many; None: never.
        state: where to go on; from the start without it.
        pin: whether batches are put into page-locked memory.
        while_dumping: whether a dump may be on its way: every epoch is then drawn from the
            longest prefix of shards that all of the signals have when it begins, and the first
            epoch waits for the first shard.
        rank: whose micro-batches are gathered.
        world: number of ranks.
        threads: threads that gather ahead; 0 gathers when asked.
        layers: dense signal to the teacher's numbers of the layers to read; all of the others.
        gold: how gold labels become targets; None: they are not read.
        tasks: every batch is of one of these tasks, and samples of others are left out; None:
            tasks do not matter.
        replicas: of a sample with several maskings read the next one in every epoch, or all of
            them at once.
        hypotheses: beams signals among the signals, and which of their hypotheses are read as
            streams are: their tokens count as a stream's do.

    Raises:
        RecipeError: gold labels or tasks are asked for, and the cache has none.
        FormatError: the cache lacks a stream, a signal, a layer or a hypothesis, or its dump is
            unfinished and that is not expected.
        IdentityError: the state is of another order.
    """

    def __init__(
        self,
        cache: Cache,
        streams: Sequence[str],
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
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        layers: Mapping[str, Sequence[int]] | None = None,
        gold: GoldLabels | TaskGold | None = None,
        tasks: TaskOrder | None = None,
        replicas: Replicas = "by_epoch",
        hypotheses: Iterable[tuple[str, int]] = (),
    ) -> None:
        for asked in (tasks, gold):
            if asked is not None:
                asked.check(cache)
        self.gold, self.tasks = gold, tasks
        manifest = cache.manifest
        self.growth = Growth(cache, signals, while_dumping)
        self.cache, self.streams, self.signals = cache, list(streams), list(signals)
        self.batch_tokens, self.window_shards = batch_tokens, window_shards
        self.accumulate, self.max_epochs = accumulate, max_epochs
        self.rank, self.world, self.threads = rank, world, threads
        self.replicas, self.hypotheses = replicas, sorted(set(hypotheses))
        for name, number in self.hypotheses:
            check_hypothesis(cache, signals, name, number)
        self._gatherer = Gatherer(cache, streams, signals, pin, layers)
        shards = [(shard.start, shard.stop) for shard in manifest.shards]
        self._plan = plan_digest(manifest.corpus.digest, shards)
        digests = [manifest.streams[name].digest for name in streams]
        more = [] if tasks is None else tasks.identity
        for name, number in self.hypotheses:
            more = [*more, "hypotheses", cache.signal(name).digest, f"{number}"]
        digest = batching_digest(self._plan, digests, batch_tokens, window_shards, more)
        if state is not None:
            state.check(digest, seed)
        self.state = state or OrderState(digest=digest, version=ORDER_VERSION, seed=seed)

    def __iter__(self) -> Generator[GlobalBatch, None, None]:
        """Batches from the state on, made ahead by threads; their errors are raised here."""
        stop = Event()
        if not self.threads:
            try:
                for block in self._planned(stop):
                    yield from self._gather(block)
            finally:
                stop.set()
            return
        queue: Queue[Any] = Queue(maxsize=PREFETCH)
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
                yield from item.result()
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
        count, beams = 0, sorted({name for name, _ in self.hypotheses})
        for epoch in range(num_epochs):
            for window, shards in enumerate(self._windows(epoch, self.cache.num_shards)):
                if count >= most:
                    return most
                reader = WindowReader(self.cache, shards, self.streams, beams)
                count += len(self._window_batches(reader, epoch, window, self._groups(reader)))
        return min(count, most)

    def _windows(self, epoch: int, num_shards: int) -> list[list[int]]:
        """Shards of each window of an epoch that is drawn from the first of them."""
        return epoch_windows(self._plan, num_shards, self.window_shards, self.state.seed, epoch)

    def _groups(self, reader: WindowReader) -> Groups | None:
        """Which samples of a window stand in one batch; None where any may."""
        return None if self.tasks is None else self.tasks.of_window(self.cache, reader)

    def _window_batches(
        self, reader: WindowReader, epoch: int, window: int, groups: Groups | None
    ) -> list[np.ndarray]:
        """Global batches of a window, as indices into it."""
        found = reader.hypothesis_lengths()
        lengths = [found[name][number] for name, number in self.hypotheses]
        lengths += [reader.lengths(name) for name in self.streams]
        args = (self._plan, self.state.seed, epoch, window, lengths, self.batch_tokens)
        return window_batches(*args) if groups is None else groups.batches(*args)

    def _produce(self, queue: Queue[Any], stop: Event) -> None:
        """Fill the queue until told to stop; an error is handed over, not lost."""
        last: BaseException | None = None
        # This thread plans, so that gathering need not wait for the plan of the next window.
        with ThreadPoolExecutor(self.threads, "kdcache-gather") as gathering:
            try:
                for block in self._planned(stop):
                    if not _put(queue, gathering.submit(self._gather, block), stop):
                        return
            except BaseException as error:
                last = error
            _put(queue, last, stop)

    def _planned(self, stop: Event) -> Iterator[_Block]:
        """Global batches in order, some of one window at a time, until told to stop."""
        ahead = WindowAhead(self.cache, self.signals, stop, self._gatherer.layers)
        most_bytes = BLOCK_BYTES if self.threads else ASKED_BLOCK_BYTES
        state = self.state
        while self.max_epochs is None or state.epoch < self.max_epochs:
            pinned = self.growth.pinned(state, stop)
            if pinned is None:
                return
            state = replace(state, shards=pinned)
            windows = self._windows(state.epoch, pinned)
            some = (state.window, state.batch) != (0, 0)
            for window in range(state.window, len(windows)):
                turn = state.epoch if self.replicas == "by_epoch" else None
                read = (self.streams, self.signals)
                reader = WindowReader(self.cache, windows[window], *read, epoch=turn)
                if window + 1 < len(windows):
                    ahead.begin(windows[window + 1])
                gold = None if self.gold is None else self.gold.of_window(self.cache, reader)
                groups = self._groups(reader)
                units = units_of(reader, self.streams, self.signals, gold)
                batches = self._window_batches(reader, state.epoch, state.window, groups)
                if not batches and not state.batch:  # nothing of the tasks
                    state = state.advanced(0, len(windows))
                    continue
                if state.batch >= len(batches):
                    raise TrainingError(
                        f"order state: batch {state.batch} of a window with {len(batches)}; "
                        "the checkpoint is damaged, start a new run"
                    )
                some = True
                whole = (reader, units, state.epoch, pinned, gold, groups)
                block = _Block(*whole)
                own_bytes = reader.sample_bytes(self._gatherer.layers) / self.world
                size = 0.0
                for batch in batches[state.batch :]:
                    state = state.advanced(len(batches), len(windows))
                    block.indices.append(batch)
                    block.states.append(state)
                    size += len(batch) * own_bytes
                    if size >= most_bytes:
                        yield block
                        block, size = _Block(*whole), 0.0
                if block.indices:
                    yield block
            if not some:
                names = () if self.tasks is None else self.tasks.names
                raise TrainingError(
                    f"{self.cache.path}: no sample of the tasks {list(names)} in the first "
                    f"{pinned} shards; dump some, or wait until the dump comes to them"
                )

    def _gather(self, block: _Block) -> list[GlobalBatch]:
        """Gather this rank's part of some global batches of one window."""
        window, alone = block.window, self.accumulate * self.world == 1
        index, ends = joined(block.indices)
        counts = block.units.sums(index, ends)
        shares = [(1, 0)] * len(block.indices)
        if not alone:
            parts, shares = self._shares(block)
            index, ends = joined(parts)
        gathered = self._gatherer.batches(window, index, ends, block.gold)
        if block.groups is not None:
            gathered = [
                block.groups.told(batch, index[start:stop])
                for batch, (start, stop) in zip(gathered, pairwise(ends.tolist()), strict=True)
            ]
        made = iter(gathered)
        found = []
        for state, whole, mine, (own, missing) in zip(
            block.states, block.indices, counts, shares, strict=True
        ):
            micro = tuple(islice(made, own))
            if alone:
                rows, sample_ids = micro[0].rows, micro[0].sample_ids
            else:
                rows, sample_ids = window.take_names(whole)
            found.append(
                GlobalBatch(
                    state=state,
                    epoch=block.epoch,
                    shards=block.shards,
                    rows=rows,
                    counts=mine,
                    num_tokens=mine[self.streams[-1]],
                    micro=micro,
                    spare=tuple(islice(made, missing > 0)) * missing,
                    sample_ids=sample_ids,
                )
            )
        return found

    def _shares(self, block: _Block) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        """This rank's parts of global batches: how many each has, and how many are missing."""
        parts: list[np.ndarray] = []
        shares = []
        for index in block.indices:
            units = None if block.groups is None else block.groups.unit[index]
            cut = partial(micro_batches, index, self.accumulate, units=units)
            own = cut(self.rank, self.world)
            # Rank 0 has the most.
            most = len(own) if self.world == 1 else len(cut(0, self.world))
            shares.append((len(own), most - len(own)))
            parts += own if len(own) == most else [*own, index[:1]]
        return parts, shares


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
