"""A cache that grows while it is trained on: which of its shards one epoch is drawn from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Event

from kdcache.errors import FormatError, TrainingError
from kdcache.formats.cache import Cache
from kdcache.train.batches.order import OrderState

logger = logging.getLogger(__name__)

#: Between two looks for the first shard. Later ones are looked for once an epoch.
POLL_SECONDS = 10.0


class Growth:
    """The shards of a cache that all signals of a run have.

    A dump commits the samples before the manifest, so only signals grow.

    Args:
        cache: an open cache.
        signals: names of the signals that are read.
        while_dumping: whether they may be unfinished.

    Raises:
        FormatError: the cache has no samples or lacks a signal, or one is unfinished and may
            not be.
    """

    def __init__(self, cache: Cache, signals: Sequence[str], while_dumping: bool) -> None:
        for name in signals:
            cache.signal(name)
        if not cache.num_shards:
            raise FormatError(f"{cache.path}: the cache holds no samples to train on")
        self._cache, self._signals = cache, tuple(signals)
        self._while_dumping = while_dumping
        if not while_dumping:
            self._require_complete()

    def _require_complete(self) -> None:
        """Refuse signals whose dump has not finished, with the shards that are committed."""
        total = self._cache.num_shards
        for name in self._signals:
            have = len(self._cache.committed(name) & set(range(total)))
            if have < total:
                raise FormatError(
                    f"{self._cache.path}: dump is unfinished: {have} of {total} shards of "
                    f"{name!r} are committed; run the same `kdcache dump` again to finish, or set "
                    "train.while_dumping to train on what there is as it grows"
                )

    def prefix(self) -> int:
        """Shards, counted from the first without a gap, that all of the signals have now."""
        total = self._cache.num_shards
        if not self._while_dumping:
            return total
        have = set(range(total)).intersection(*map(self._cache.committed, self._signals))
        return next(n for n in range(total + 1) if n not in have)

    def pinned(self, state: OrderState, stop: Event) -> int | None:
        """How many shards the epoch of a state is drawn from.

        Before any epoch can begin the first shard must be there; it is waited for.

        Args:
            state: where training stands.
            stop: ends the waiting.

        Returns:
            What the state pins; of an epoch that has not begun the prefix, all of a whole cache;
            None if told to stop.

        Raises:
            TrainingError: the state pins what no epoch of this cache can have.
        """
        total = self._cache.num_shards
        if state.begun:
            pinned = total if state.shards is None else state.shards
            if not 0 < pinned <= total:
                raise TrainingError(
                    f"order state: an epoch of {pinned} shards of a cache with {total}; the "
                    "checkpoint is damaged, start a new run"
                )
            return pinned
        found = self.prefix()
        if not found:
            logger.info(
                "%s: waiting for the first of %d shards of %s to be committed",
                *(self._cache.path, total, ", ".join(self._signals)),
            )
        while not found:
            if stop.wait(POLL_SECONDS):
                return None
            found = self.prefix()
        return found
