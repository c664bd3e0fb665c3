"""Hypotheses as a stream: what a student predicts where it learns from a teacher's translations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from kdcache.errors import FormatError, ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.signals import BeamsRecord
from kdcache.train.batches.batch import Batch, Hypotheses


def hypothesis_stream(beams: str, number: int) -> str:
    """The name that some hypotheses have as a stream; no stream of a cache has a dot in its own.

    Args:
        beams: name of a beams signal.
        number: which hypothesis of each sample, 0 the best.
    """
    return f"{beams}.{number}"


def is_hypothesis(stream: str) -> bool:
    """Whether a name is one of `hypothesis_stream`."""
    return "." in stream


def check_hypothesis(cache: Cache, signals: Collection[str], name: str, number: int) -> None:
    """Refuse hypotheses that are not read.

    Args:
        cache: that they are read from.
        signals: names of the signals that are read.
        name: of a beams signal.
        number: which of its hypotheses.

    Raises:
        FormatError: the signal is not read, is of another kind or has not so many.
    """
    record = cache.signal(name)
    if name not in signals or not isinstance(record, BeamsRecord):
        raise FormatError(
            f"{cache.path}: hypotheses of signal {name!r} are asked for, which is no beams signal "
            f"among those that are read, {sorted(signals)}"
        )
    if not 0 <= number < record.num_hypotheses:
        raise FormatError(
            f"{cache.path}: hypothesis {number} of signal {name!r} is asked for; it has "
            f"{record.num_hypotheses}, from 0 on"
        )


def with_hypotheses(
    batch: Batch, wanted: Mapping[str, tuple[str, int]], max_positions: int | None
) -> Batch:
    """A batch with some of its hypotheses as streams too.

    Args:
        batch: on the host.
        wanted: name of a stream to the beams signal and the number of the hypothesis.
        max_positions: most tokens that a student takes; None: any.

    Raises:
        ModelError: a hypothesis is longer; its sample is named.
    """
    if not wanted:
        return batch
    streams = dict(batch.streams)
    for name, (beams, number) in wanted.items():
        hypotheses = batch.signals[beams]
        assert isinstance(hypotheses, Hypotheses)
        streams[name] = tokens = hypotheses.tokens(number)
        longest = tokens.ids.shape[1]
        if max_positions is not None and longest > max_positions:
            row = batch.rows[int(tokens.mask.sum(1).argmax())]
            raise ModelError(
                f"student: takes {max_positions} positions, and hypothesis {number} of signal "
                f"{beams!r} has {longest} tokens at corpus row {row}; give the student more "
                f"(train.student.config.max_position_embeddings), or dump the hypotheses with "
                f"max_length {max_positions}"
            )
    return replace(batch, streams=streams)
