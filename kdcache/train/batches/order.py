"""The order of training: which samples stand in which global batch, as a pure function.

    order = f(corpus digest and shard plan, seed, epoch, algorithm version)

Shards are permuted and grouped into windows, samples are permuted inside a window, similar
lengths are brought together inside a pool of that permutation, batches are filled up to a
token budget, and the batches of a window are permuted. Every permutation is keyed by a hash
of what it is for, so seeds and epochs never alias and no library version enters.

While a dump goes on an epoch is drawn from the first shards alone: how many is one more number,
pinned when the epoch begins and kept in the state.
"""

# M samples of a window, B samples of a batch

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from kdcache.errors import IdentityError, TrainingError
from kdcache.formats.buffers import TABLES
from kdcache.formats.keyed import permutation, text_key
from kdcache.formats.native import library

#: Raised by every change after which the same inputs give another order.
ORDER_VERSION = 1

#: Token budgets in one pool of similar lengths: small enough that batches stay well mixed
#: over an epoch, large enough that little is padded.
POOL_BATCHES = 64
#: Lengths up to here are sorted by counting them.
_LONGEST_COUNTED = 1 << 20


@dataclass(frozen=True)
class OrderState:
    """Where training stands: the whole of what a resumed stream needs.

    Attributes:
        digest: of all that fixes the batches (`batching_digest`).
        version: `ORDER_VERSION` of the code that wrote it.
        seed: recipe seed.
        epoch: epoch of the next batch, from 0.
        window: window of the next batch within its epoch.
        batch: number of the next batch within its window.
        shards: the epoch is drawn from the first so many shards. None: those that the cache
            has when the epoch begins; of an epoch that has begun (in a state from before there
            was this number) all.
    """

    digest: str
    version: int
    seed: int
    epoch: int = 0
    window: int = 0
    batch: int = 0
    shards: int | None = None

    def to_json(self) -> str:
        """One line of JSON, under 300 bytes."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> OrderState:
        """The state that `to_json` wrote.

        Raises:
            TrainingError: if the text is no such state.
        """
        try:
            tree = json.loads(text)
        except ValueError:
            tree = text
        return cls.from_dict(tree)

    @classmethod
    def from_dict(cls, found: Any) -> OrderState:
        """The state whose fields are given.

        Raises:
            TrainingError: they are not those of a state.
        """
        try:
            tree = dict(found)
            if tree.get("shards", 0) is None:
                del tree["shards"]
            return cls(digest=str(tree.pop("digest")), **{k: int(v) for k, v in tree.items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise TrainingError(
                f"order state: not a state of this version: {str(found)[:80]!r}"
            ) from None

    def check(self, digest: str, seed: int) -> None:
        """Refuse to go on in another order.

        Raises:
            IdentityError: if digest, seed or version differ, with both sides.
        """
        here = OrderState(digest=digest, version=ORDER_VERSION, seed=seed)
        for key in ("digest", "version", "seed"):
            found, expected = getattr(self, key), getattr(here, key)
            if found != expected:
                raise IdentityError(
                    f"order state: {key} is {found}, this cache and recipe give {expected}; "
                    "resume with the same corpus, batch size, window and seed, or start a new run"
                )

    @property
    def begun(self) -> bool:
        """Whether its epoch has begun, so that it is settled which shards it is drawn from."""
        return (self.window, self.batch) != (0, 0) or self.shards is not None

    def advanced(self, num_batches: int, num_windows: int) -> OrderState:
        """The state after this batch of a window with `num_batches`, of `num_windows`."""
        if self.batch + 1 < num_batches:
            # What `replace` does, which is slow for something done so often.
            return OrderState(
                digest=self.digest,
                version=self.version,
                seed=self.seed,
                epoch=self.epoch,
                window=self.window,
                batch=self.batch + 1,
                shards=self.shards,
            )
        if self.window + 1 < num_windows:
            return replace(self, window=self.window + 1, batch=0)
        return replace(self, epoch=self.epoch + 1, window=0, batch=0, shards=None)


def plan_digest(corpus_digest: str, shards: Sequence[tuple[int, int]]) -> str:
    """16 hex digits that name a corpus and its shard plan; signals and codecs do not enter."""
    flat = [bound for shard in shards for bound in shard]
    return f"{text_key('shard plan', corpus_digest, *flat):016x}"


def batching_digest(
    plan: str,
    stream_digests: Sequence[str],
    batch_tokens: int,
    window_shards: int,
    more: Sequence[str] = (),
) -> str:
    """16 hex digits that name the batches of a plan: a state of others is not to be resumed."""
    parts = (plan, *stream_digests, batch_tokens, window_shards, *more)
    return f"{text_key('batching', *parts):016x}"


def epoch_windows(
    digest: str, num_shards: int, window_shards: int, seed: int, epoch: int
) -> list[list[int]]:
    """Shards of each window of one epoch: every shard exactly once.

    Args:
        digest: from `plan_digest`.
        num_shards: the first so many shards of the cache are in the epoch.
        window_shards: shards shuffled together; the last window may have fewer.
        seed: recipe seed.
        epoch: from 0.
    """
    shards = permutation(num_shards, order_key(digest, seed, epoch, "shards")).tolist()
    return [shards[i : i + window_shards] for i in range(0, num_shards, window_shards)]


def window_batches(
    digest: str,
    seed: int,
    epoch: int,
    window: int,
    lengths: Sequence[np.ndarray],
    batch_tokens: int,
) -> list[np.ndarray]:
    """Global batches of one window: every sample exactly once.

    Args:
        digest: from `plan_digest`.
        seed: recipe seed.
        epoch: from 0.
        window: from 0.
        lengths: [M] int64 tokens in each of the streams; samples of one longest length are
            ordered by the last.
        batch_tokens: most samples x longest sample of a batch, in each of the streams. A longer
            sample is a batch of its own.

    Returns:
        int64 arrays [B] of sample numbers within the window, in training order.
    """
    num_samples = len(lengths[-1])
    order = permutation(num_samples, order_key(digest, seed, epoch, "samples", window))
    batches = _filled(order, lengths, batch_tokens)
    shuffled = permutation(len(batches), order_key(digest, seed, epoch, "batches", window))
    return [batches[i] for i in shuffled]


def _filled(
    order: np.ndarray, lengths: Sequence[np.ndarray], batch_tokens: int
) -> list[np.ndarray]:
    """Batches of like lengths, pool after pool, longest first.

    Args:
        order: [M] permuted samples.
        lengths: [M] int64 tokens in each of the streams.
        batch_tokens: most samples x longest sample of a batch.
    """
    compiled = library()
    most = max([1, *(int(each.max(initial=1)) for each in lengths)])
    if compiled is None or most > _LONGEST_COUNTED:
        # An empty stream still takes a place, or a batch could hold any number of them.
        last = np.maximum(lengths[-1], 1)
        longest = np.max([*lengths, last], axis=0)
        batches: list[np.ndarray] = []
        for pool in pools(order, longest[order], batch_tokens):
            # lexsort is stable, so equal lengths stay in permuted order.
            pool = pool[np.lexsort((-last[pool], -longest[pool]))]
            batches.extend(fill(pool, longest[pool], batch_tokens))
        return batches
    given = [np.ascontiguousarray(each, dtype=np.int64) for each in lengths]
    streams = np.array([each.ctypes.data for each in given], dtype=np.int64)
    counts = np.empty(2 * (most + 1), dtype=np.int64)
    scratch = TABLES.array((3, len(order)), np.int64)
    samples, stops = np.empty_like(order), np.empty_like(order)
    number = compiled.kdcache_fill(
        order.ctypes.data,
        len(order),
        streams.ctypes.data,
        len(given),
        most,
        POOL_BATCHES * batch_tokens,
        batch_tokens,
        *(array.ctypes.data for array in (counts, *scratch, samples, stops)),
    )
    ends = stops[:number].tolist()
    return [samples[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]


def pools(order: np.ndarray, tokens: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """An order cut into pieces within which like lengths may be brought together.

    Args:
        order: [M] what is put into batches.
        tokens: [M] tokens of each, in that order.
        batch_tokens: of a batch.
    """
    ends = np.cumsum(tokens)
    pool_tokens = POOL_BATCHES * batch_tokens
    num_pools = int(ends[-1]) // pool_tokens + 1 if len(order) else 0
    return np.split(order, np.searchsorted(ends, pool_tokens * np.arange(1, num_pools)))


def fill(
    samples: np.ndarray, longest: np.ndarray, batch_tokens: int, sizes: np.ndarray | None = None
) -> list[np.ndarray]:
    """Cut samples, or units of several samples, longest first, into batches within the budget.

    Args:
        samples: [M].
        longest: [M] the longest sample of each.
        batch_tokens: most samples x longest sample of a batch.
        sizes: [M] samples of each; None: one.
    """
    batches = []
    ends = np.arange(1, len(samples) + 1) if sizes is None else np.cumsum(sizes)
    start = before = 0
    while start < len(samples):
        # The first sample is the longest of its batch on either side.
        most = before + batch_tokens // int(longest[start])
        stop = max(start + 1, int(np.searchsorted(ends, most, side="right")))
        batches.append(samples[start:stop])
        start, before = stop, int(ends[stop - 1])
    return batches


def micro_batches(
    batch: np.ndarray,
    accumulate: int,
    rank: int = 0,
    world: int = 1,
    units: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Cut a global batch into at most `accumulate` slices for each rank, none empty.

    Args:
        batch: [B] samples.
        accumulate: micro-batches of a rank.
        rank: whose slices are wanted.
        world: number of ranks.
        units: [B] int64, neighbours of one unit stay in one slice; None: nothing has to.

    Returns:
        Its slices; none where the batch has fewer samples than there are slices before.
    """
    slices = accumulate * world
    if slices == 1 and len(batch):
        return [batch]
    if units is None:
        least, more = divmod(len(batch), slices)  # the first `more` slices have one more
        return [
            batch[number * least + min(number, more) : (number + 1) * least + min(number + 1, more)]
            for number in range(rank, min(slices, len(batch)), world)
        ]
    parts = np.array_split(batch, slices)
    ends = np.append(np.flatnonzero(np.diff(units)) + 1, len(batch))
    cuts = np.cumsum([len(part) for part in parts])[:-1]
    parts = np.split(batch, ends[np.searchsorted(ends, cuts)])
    return [part for part in parts if len(part)][rank::world]


def order_key(digest: str, seed: int, epoch: int, purpose: str, window: int = 0) -> int:
    """Key of one permutation."""
    return text_key("order", ORDER_VERSION, digest, seed, epoch, purpose, window)
