"""Batches for a loop of one's own: a cache as an iterable that says where it stands."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from kdcache.errors import TrainingError
from kdcache.formats.cache import Cache, open_cache
from kdcache.recipe import Replicas
from kdcache.train.batches.mix import MixedStream, batch_stream
from kdcache.train.batches.mix_state import state_from_dict
from kdcache.train.batches.order import OrderState
from kdcache.train.batches.stream import BatchStream, GlobalBatch


class Batches(IterableDataset[GlobalBatch]):
    """Global batches of a cache, epoch after epoch.

    Iterating goes on from where the batches stand, which is after the last one that was handed
    out, however far threads are ahead. A torch DataLoader takes it with batch_size=None and
    num_workers=0.

    Args:
        stream: the batches, from the state they shall start at.

    Attributes:
        caches: that they are drawn from.
        streams: names of the streams that they hold; the tokens of the last one are counted.
        signals: names of the signals that they hold.
        rank: whose micro-batches are read.
        world: number of ranks.
        accumulate: most micro-batches of a global batch on each rank.
    """

    def __init__(self, stream: BatchStream | MixedStream) -> None:
        super().__init__()
        self._stream = stream
        parts = stream.streams if isinstance(stream, MixedStream) else [stream]
        self.caches = [part.cache for part in parts]
        first = parts[0]
        self.streams, self.signals = list(first.streams), list(first.signals)
        self.rank, self.world, self.accumulate = first.rank, first.world, first.accumulate

    def __iter__(self) -> Generator[GlobalBatch, None, None]:
        """The batches from here to the end of the last epoch."""
        return self._until(None)

    def one_epoch(self) -> Generator[GlobalBatch, None, None]:
        """The batches from here to the end of the epoch that they stand in.

        Raises:
            TrainingError: several caches are mixed, whose epochs end at different steps.
        """
        if isinstance(self._stream, MixedStream):
            raise TrainingError(
                "batches: caches that are mixed have no epoch in common; count steps instead"
            )
        return self._until(self._stream.state.epoch + 1)

    def micro_batches(self) -> MicroBatches:
        """The same, one micro-batch at a time, for a trainer that adds up gradients by itself."""
        return MicroBatches(self)

    def state_dict(self) -> dict[str, Any]:
        """Where the batches stand, as a few plain values: the next one is the first after it."""
        return asdict(self._stream.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where others stood; a running iteration does not notice.

        Args:
            state: from `state_dict` of batches with the same corpus, streams, sizes and seed.

        Raises:
            TrainingError: it is no state.
            IdentityError: it is one of other batches, with both sides.
        """
        found, stream = state_from_dict(state), self._stream
        found.check(stream.state.digest, stream.state.seed)
        stream.state = found  # of its kind: the digest says so

    def _until(self, epoch: int | None) -> Generator[GlobalBatch, None, None]:
        """The batches before an epoch."""
        if get_worker_info() is not None:
            raise TrainingError(
                "batches: a DataLoader reads them in worker processes, each of which would read "
                "all; set num_workers=0, a thread makes them ahead"
            )
        with closing(iter(self._stream)) as running:
            for batch in running:
                self._stream.state = batch.state
                yield batch
                if epoch is not None and _epoch(batch) >= epoch:
                    return


class MicroBatches(IterableDataset[GlobalBatch]):
    """Global batches cut up: each item is one with a single micro-batch, or with none.

    There are `accumulate` of them for every global batch, also where it has too few samples for
    that, so whoever steps after so many steps once for each global batch. The counts stay those of
    the whole: a loss over an item is its share of the mean.

    Args:
        batches: where they come from, and what says where they stand. It counts a global batch as
            done from its first item on, so its state is to be saved between steps.

    Attributes:
        batches: as given.
        epoch: of the last item, from 0.
    """

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches, self.epoch = batches, 0

    def __iter__(self) -> Generator[GlobalBatch, None, None]:
        """The items from where the batches stand to the end of the last epoch."""
        with closing(iter(self.batches)) as running:
            for step in running:
                self.epoch = step.epoch
                for number in range(self.batches.accumulate):
                    yield replace(step, micro=step.micro[number : number + 1])


def _epoch(batch: GlobalBatch) -> int:
    """Epoch of the batch after this one, of one cache."""
    assert isinstance(batch.state, OrderState)
    return batch.state.epoch


def batches(
    cache: Cache | str | Path | Sequence[Cache | str | Path],
    streams: Sequence[str] | None = None,
    signals: Sequence[str] = (),
    *,
    layers: Mapping[str, Sequence[int]] | None = None,
    batch_tokens: int = 4096,
    seed: int = 1,
    window_shards: int = 4,
    epochs: int | None = None,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    threads: int = 1,
    pin: bool = False,
    while_dumping: bool = False,
    weights: Sequence[float] | None = None,
    replicas: Replicas = "by_epoch",
    hypotheses: Iterable[tuple[str, int]] = (),
) -> Batches:
    """Shuffled batches of a cache, or of several.

    Args:
        cache: an open cache, its directory or its URL; of a list of them every global batch is
            drawn from one.
        streams: names of the streams to read; the tokens of the last one are counted. None: those
            that the signals describe, sources first; without signals all of the cache.
        signals: names of the signals to read, of any kind.
        layers: dense signal to the teacher's numbers of the layers to read; all of the others.
        batch_tokens: most samples x longest sample of a global batch, in each of the streams.
        seed: of the order.
        window_shards: shards shuffled together.
        epochs: stop after this many, counted from the beginning; None: never.
        rank: whose micro-batches are read.
        world: number of ranks; the global batches are the same for any.
        accumulate: micro-batches of a global batch on each rank.
        threads: threads that make batches ahead; 0 makes them when asked.
        pin: whether batches are put into page-locked memory.
        while_dumping: whether a dump may be on its way.
        weights: shares of several caches in the global batches, relative to one another; None: all
            the same.
        replicas: "by_epoch": of a sample with several maskings every epoch reads the next one;
            "all": all of them at once.
        hypotheses: beams signals among the signals, and which of their hypotheses (0 the best) the
            loop reads as streams: their tokens count in batch_tokens too.

    Raises:
        FormatError: the cache lacks a stream, a signal or a layer, or its dump is unfinished and
            that is not expected.
        IdentityError: several caches do not go together.
        TrainingError: weights or epochs do not fit several caches.
    """
    given = [cache] if isinstance(cache, Cache | str | Path) else list(cache)
    caches = [one if isinstance(one, Cache) else open_cache(one) for one in given]
    options: dict[str, Any] = {
        "accumulate": accumulate,
        "max_epochs": epochs,
        "pin": pin,
        "while_dumping": while_dumping,
        "rank": rank,
        "world": world,
        "threads": threads,
        "layers": layers,
        "replicas": replicas,
        "hypotheses": hypotheses,
    }
    names = _described(caches[0], signals) if streams is None else streams
    sizes = (names, signals, batch_tokens, seed, window_shards)
    return Batches(batch_stream(caches, weights, *sizes, **options))


def _described(cache: Cache, signals: Sequence[str]) -> list[str]:
    """The streams that some signals describe, sources first."""
    if not signals:
        return list(cache.manifest.streams)
    records = [cache.signal(name) for name in signals]
    sources = [record.source for record in records if record.source is not None]
    labelled = [record.stream for record in records]
    names = [*(name for name in sources if name not in labelled), *labelled]
    return list(dict.fromkeys(names))
