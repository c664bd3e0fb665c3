"""The columns of a masks signal: written from flat arrays, and put over the tokens of a stream.

# M samples, R replicas, A chosen (sample, replica) pairs, E masked tokens
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kdcache.errors import FormatError
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import join_ids, split_ids

#: Largest position and count, which have two bytes.
LARGEST = (1 << 16) - 1


def masks_columns(
    num_masked: np.ndarray, positions: np.ndarray, ids: np.ndarray, vocab_size: int
) -> dict[str, Ragged]:
    """The stored columns of some samples.

    Args:
        num_masked: [M, R] int64 masked tokens of every replica.
        positions: [E] int64 where they are in their sample; sample after sample, replica after
            replica, ascending.
        ids: [E] int64 what stands there in the input.
        vocab_size: V of the stream.

    Raises:
        FormatError: a position, count or id does not fit its field.
    """
    largest = max(int(positions.max(initial=0)), int(num_masked.max(initial=0)))
    if largest > LARGEST:
        raise FormatError(
            f"masks: a sample has a masked position or a count of {largest}, at most {LARGEST} "
            "can be stored: lower dump.max_tokens"
        )
    num_samples, num_replicas = num_masked.shape
    replicas = {"num_masked": num_masked.reshape(-1).astype(np.uint16)}
    masked = {"position": positions.astype(np.uint16), **split_ids(ids, vocab_size)}
    return {
        "replicas": Ragged(np.arange(num_samples + 1, dtype=np.int64) * num_replicas, replicas),
        "masked": Ragged(offsets_of(num_masked.sum(axis=1)), masked),
    }


def masked_tokens(masks: Mapping[str, Ragged], samples: np.ndarray, replicas: np.ndarray) -> Ragged:
    """The masked tokens of chosen maskings.

    Args:
        masks: columns of a masks signal.
        samples: [A] int64 samples, counted within the columns.
        replicas: [A] int64 which masking of each.

    Returns:
        [A] ragged: `position` int64, ascending, and `id` int32, what stands there in the input.

    Raises:
        FormatError: a sample has no such replica.
    """
    column = masks["replicas"]
    wrong = np.flatnonzero((replicas < 0) | (replicas >= column.lengths[samples]))
    if len(wrong):
        sample, replica = int(samples[wrong[0]]), int(replicas[wrong[0]])
        raise FormatError(
            f"masks: replica {replica} of a sample that has {int(column.lengths[sample])}"
        )
    counts = column.fields["num_masked"].astype(np.int64)
    before = offsets_of(counts)  # masked tokens before each replica
    first = column.offsets[samples].astype(np.int64)
    start = masks["masked"].offsets[samples] + before[first + replicas] - before[first]
    lengths = counts[first + replicas]
    index = segment_indices(start.astype(np.int64), lengths)
    fields = {name: values[index] for name, values in masks["masked"].fields.items()}
    position = fields["position"].astype(np.int64)
    return Ragged(offsets_of(lengths), {"position": position, "id": join_ids(fields)})


def masked_stream(
    stream: Ragged, masks: Mapping[str, Ragged], samples: np.ndarray, replicas: np.ndarray
) -> Ragged:
    """The tokens of chosen maskings as a model reads them.

    Args:
        stream: the tokens, stored (`id` and `id_high`) or joined (`id`); other fields stay.
        masks: columns of a masks signal over the same samples of this stream.
        samples: [A] int64 samples, counted within both.
        replicas: [A] int64 which masking of each.

    Returns:
        [A] ragged: `id` int32 and the stream's other fields.

    Raises:
        FormatError: a sample has no such replica.
    """
    tokens = stream.take(samples)
    masked = masked_tokens(masks, samples, replicas)
    ids = join_ids(tokens.fields)
    starts = np.repeat(tokens.offsets[:-1], masked.lengths)
    ids[starts + masked.fields["position"]] = masked.fields["id"]
    rest = {k: v for k, v in tokens.fields.items() if k not in ("id", "id_high")}
    return Ragged(tokens.offsets, {"id": ids, **rest})
