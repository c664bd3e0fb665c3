"""Where the time of a stream goes: the same batches planned, copied out of the files, and made."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event
from typing import Any

from stream_fresh import spread
from stream_peers.kdcache_tensors import SIGNAL

from kdcache.formats.cache import Cache
from kdcache.train.batches.cut import joined
from kdcache.train.batches.stream import BatchStream

STREAMS = ["src", "tgt"]


def measure_parts(cache: Cache, budget: int, turns: int) -> dict[str, Any]:
    """Shares of the processor time of an epoch on one thread, each part once a turn.

    `plan`: which samples make a batch. `copy`: their pieces copied out of the mapped files, widened
    and padded. `tensors`: a tensor of each batch for each field. `counts`: units of
    every global batch, sample ids and the rest.

    Args:
        cache: warm, and all of it one window.
        budget: tokens of a batch.
        turns: how often.
    """
    shares = [_shares(cache, budget, seed) for seed in range(1, turns + 1)]
    return {name: spread([one[name] for one in shares]) for name in shares[0]}


def _shares(cache: Cache, budget: int, seed: int) -> dict[str, float]:
    """The parts of one epoch."""
    args = (STREAMS, [SIGNAL], budget, seed, cache.num_shards)
    stream = BatchStream(cache, *args, max_epochs=1, threads=0)
    began = time.thread_time()
    blocks = list(stream._planned(Event()))
    plan = time.thread_time() - began

    def copied() -> None:
        for block in blocks:
            index, ends = joined(block.indices)
            block.window.take_padded(index, ends, dict.fromkeys(STREAMS, 0))
            block.window.take_signal(SIGNAL, index, wide=True)

    def gathered() -> None:
        for block in blocks:
            stream._gatherer.batches(block.window, *joined(block.indices))

    def made() -> None:
        for block in blocks:
            stream._gather(block)

    copy, gather, whole = _seconds(copied), _seconds(gathered), _seconds(made)
    seconds = {"plan": plan, "copy": copy, "tensors": gather - copy, "counts": whole - gather}
    return {name: each / (plan + whole) for name, each in seconds.items()}


def _seconds(work: Callable[[], None]) -> float:
    """Processor time of a second call, the first warms up."""
    work()
    began = time.thread_time()
    work()
    return time.thread_time() - began
