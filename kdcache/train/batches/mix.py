"""Several caches mixed by weight: from which of them each global batch is drawn.

Every global batch is of one cache. The turns are those of proportionate ("Pfair") scheduling: batch
j of a cache with share w may come no earlier than step floor(j / w) and must come before step
ceil((j + 1) / w); of those that may come, the one that must come first does. So after any number n
of steps a cache has had its n w batches, rounded up or down. Equal claims are settled by a keyed
hash, so the turns are a function of weights and seed.

Source: Baruah, Cohen, Plaxton & Varvel 1996, Proportionate progress.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from fractions import Fraction
from typing import Any

from kdcache.errors import IdentityError, TrainingError
from kdcache.formats.cache import Cache
from kdcache.formats.identity import differences
from kdcache.formats.keyed import text_key
from kdcache.train.batches.mix_state import MixState
from kdcache.train.batches.order import OrderState
from kdcache.train.batches.stream import BatchStream, GlobalBatch

#: What of two records of one signal may differ: a batch carries it along, or nothing depends on it.
_MAY_DIFFER = {
    *("recipe", "versions", "seed", "stream_digest", "source_digest", "teacher"),
    *("codec", "temperatures", "values", "scheme", "parameters", "decoding", "num_hypotheses"),
}


def stream_seed(seed: int, number: int) -> int:
    """Seed of the order of one of several caches: two of one corpus must not go in step.

    Args:
        seed: recipe seed.
        number: of the cache, from 0; the first has the recipe's own.
    """
    return text_key(seed, "cache", number) >> 1 if number else seed


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Weights over their sum, exactly."""
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def next_cache(shares: Sequence[Fraction], counts: Sequence[int], seed: int) -> int:
    """The cache that the next global batch is drawn from.

    Args:
        shares: of the caches, above 0, 1 in all.
        counts: global batches drawn from each so far, by this function.
        seed: recipe seed.
    """
    step = sum(counts)
    pairs = list(enumerate(zip(shares, counts, strict=True)))
    may = [(n, share, count) for n, (share, count) in pairs if count // share <= step]
    claims = [
        (-(-(count + 1) // share), text_key("mix", seed, step, number), number)
        for number, share, count in may
    ]
    return min(claims)[-1]


def check_agreement(
    caches: Sequence[Cache],
    streams: Sequence[str],
    signals: Sequence[str],
    layers: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Refuse caches whose batches cannot take turns in one training.

    Args:
        caches: to be mixed.
        streams: names of the streams that are read.
        signals: names of the signals that are read.
        layers: dense signals whose layers are asked for by number.

    Raises:
        FormatError: a cache lacks a stream or a signal.
        IdentityError: two caches have other tokenizers, streams or signals under one name.
    """
    first = caches[0]
    for other in caches[1:]:
        ours, theirs = (_shape(one, streams, signals, layers or {}) for one in (first, other))
        faults = differences(ours, theirs)
        if faults:
            shown = "; ".join(fault.removesuffix(" given") for fault in faults[:3])
            shown = shown.replace(" in the cache, ", f" in {first.path}, ")
            raise IdentityError(
                f"{other.path}: cannot be mixed with {first.path}: {shown} here; mix caches of the "
                "same tokenizers, streams and signals"
            )


def _shape(
    cache: Cache,
    streams: Sequence[str],
    signals: Sequence[str],
    layers: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """What of a cache a student or an objective depends on."""
    records = {name: cache.stream(name) for name in streams}
    tokenizers = {one.tokenizer: cache.tokenizer(one.tokenizer) for one in records.values()}
    stream_keys = {"field", "pair", "template", "tokenizer", "target", "vocab_size"}
    return {
        "streams": {name: one.model_dump(include=stream_keys) for name, one in records.items()},
        "tokenizers": {name: one.model_dump(exclude={"files"}) for name, one in tokenizers.items()},
        "signals": {
            name: cache.signal(name).model_dump(
                mode="json", exclude=_MAY_DIFFER | ({"layers"} if name in layers else set())
            )
            for name in signals
        },
    }


class MixedStream:
    """Global batches of several caches, each batch of one of them.

    Args:
        streams: of the caches, without an end, with the seeds of `stream_seed`.
        weights: their shares of the global batches, relative to one another, above 0.
        seed: recipe seed.

    Attributes:
        state: where iterating begins.

    Raises:
        TrainingError: a stream ends, or weights are not one for each.
    """

    def __init__(self, streams: Sequence[BatchStream], weights: Sequence[float], seed: int) -> None:
        if len(streams) != len(weights) or not all(weight > 0 for weight in weights):
            raise TrainingError(
                f"mix: weights are {list(weights)} for {len(streams)} caches; expected a number "
                "above 0 for each"
            )
        if any(stream.max_epochs is not None for stream in streams):
            raise TrainingError(
                "mix: caches that are mixed differ in size, so there is no common epoch to stop "
                "after; leave max_epochs out and bound the run by max_steps"
            )
        self.streams, self.seed, self._shares = list(streams), seed, shares(weights)
        orders = tuple(stream.state for stream in streams)
        parts = [*(order.digest for order in orders), *self._shares]
        digest = f"{text_key('mix', *parts):016x}"
        self.state = MixState(digest, seed, (0,) * len(streams), orders)

    def __iter__(self) -> Generator[GlobalBatch, None, None]:
        """Batches from the state on; each cache has threads of its own."""
        counts, orders = list(self.state.counts), list(self.state.orders)
        with ExitStack() as stack:
            running = []
            for stream, order in zip(self.streams, orders, strict=True):
                stream.state = order
                running.append(stack.enter_context(closing(iter(stream))))
            while True:
                number = next_cache(self._shares, counts, self.seed)
                batch = next(running[number], None)
                if batch is None:
                    return  # told to stop while it waited for a dump
                assert isinstance(batch.state, OrderState)
                counts[number] += 1
                orders[number] = batch.state
                state = replace(self.state, counts=tuple(counts), orders=tuple(orders))
                yield replace(batch, state=state, cache=number)


def batch_stream(
    caches: Sequence[Cache],
    weights: Sequence[float] | None,
    streams: Sequence[str],
    signals: Sequence[str],
    batch_tokens: int,
    seed: int,
    window_shards: int,
    **options: Any,
) -> BatchStream | MixedStream:
    """The global batches of one cache, or of several mixed.

    Args:
        caches: at least one.
        weights: their shares, relative to one another; None: all the same.
        streams: names of the streams to read.
        signals: names of the signals to read.
        batch_tokens: see `BatchStream`.
        seed: recipe seed.
        window_shards: see `BatchStream`.
        options: of `BatchStream`.

    Raises:
        FormatError: a cache lacks a stream, a signal or a layer, or is unfinished.
        IdentityError: the caches do not go together.
        TrainingError: weights or epochs do not fit several caches.
    """
    check_agreement(caches, streams, signals, options.get("layers"))
    made = [
        BatchStream(
            *(cache, streams, signals, batch_tokens, stream_seed(seed, number), window_shards),
            **options,
        )
        for number, cache in enumerate(caches)
    ]
    if len(made) == 1:
        return made[0]
    return MixedStream(made, [1.0] * len(made) if weights is None else weights, seed)
