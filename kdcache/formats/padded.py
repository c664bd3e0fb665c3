"""Padded streams: ids of the samples of several batches, as matrices of each."""

# B samples of a batch, T positions of it, A places in the matrices of all batches

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdcache.formats.ragged import Ragged


@dataclass(frozen=True)
class Padded:
    """One stream of several batches.

    Attributes:
        ids: [A] int64 a matrix [B, T] of each batch, one after another, padded at the end.
        mask: [A] bool, true on tokens.
        widths: T of each batch: its longest sample, at least 1.
        beside: what else there is of each token, in its wide form, not padded.
    """

    ids: np.ndarray
    mask: np.ndarray
    widths: list[int]
    beside: Ragged


def padded(stream: Ragged, ends: np.ndarray, pad: int) -> Padded:
    """A stream of several batches, of its tokens one after another.

    Args:
        stream: of the samples of all batches, in its wide form.
        ends: [batches + 1] int64 samples before each batch, and of all.
        pad: id that stands outside the mask.
    """
    lengths, masks, widths = stream.lengths, [], []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        width = int(lengths[start:stop].max(initial=1))
        masks.append((np.arange(width) < lengths[start:stop, None]).reshape(-1))
        widths.append(width)
    mask = np.concatenate(masks)
    ids = np.full(len(mask), pad, dtype=np.int64)
    ids[mask] = stream.fields["id"]
    fields = {name: array for name, array in stream.fields.items() if name != "id"}
    return Padded(ids, mask, widths, Ragged(stream.offsets, fields))
