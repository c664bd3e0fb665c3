"""The shard plan: where shards and their parts end, a pure function of sample lengths.

# M samples
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

PART_BYTES = 256 << 20


class ShardCutter:
    """Cuts a stream of samples into shards of about `shard_tokens` tokens.

    A shard takes samples as long as its tokens stay within `shard_tokens`, and at least one.
    Where the samples come in batches, the batches do not matter.
    """

    def __init__(self, shard_tokens: int) -> None:
        """Start with an empty shard.

        Args:
            shard_tokens: most tokens of a shard that has more than one sample.
        """
        self._shard_tokens = shard_tokens
        self._open_tokens = 0
        self._open_samples = 0

    def cut(self, token_counts: np.ndarray) -> list[int]:
        """Take in the next samples.

        Args:
            token_counts: [M] integer tokens of each sample, all streams summed.

        Returns:
            Ascending indices into `token_counts` before which a shard ends; 0 where the
            shard that was open takes none of them.
        """
        ends = np.cumsum(token_counts, dtype=np.int64)
        cuts: list[int] = []
        begin, before = 0, 0
        while begin < len(ends):
            budget = before + self._shard_tokens - self._open_tokens
            stop = int(np.searchsorted(ends, budget, side="right"))
            if stop == begin and self._open_samples == 0:
                stop = begin + 1
            if stop > begin:
                self._open_samples += stop - begin
                self._open_tokens += int(ends[stop - 1]) - before
                begin, before = stop, int(ends[stop - 1])
            if begin < len(ends):
                cuts.append(begin)
                self._open_tokens = self._open_samples = 0
        return cuts


def plan_shards(token_counts: np.ndarray, shard_tokens: int) -> list[tuple[int, int]]:
    """Shards of a whole corpus as (start, stop) sample ranges.

    Args:
        token_counts: [M] integer tokens of each sample, all streams summed.
        shard_tokens: most tokens of a shard that has more than one sample.
    """
    if len(token_counts) == 0:
        return []
    bounds = [0, *ShardCutter(shard_tokens).cut(token_counts), len(token_counts)]
    return list(pairwise(bounds))


def plan_parts(
    lengths: np.ndarray, max_bytes_per_token: int, limit: int = PART_BYTES
) -> list[tuple[int, int]]:
    """Parts of a shard as (start, stop) sample ranges, each at most `limit` bytes.

    A part holds whole samples and at least one, so one sample of more bytes than the limit is
    a part by itself.

    Args:
        lengths: [M] integer positions of each sample in the signal's stream.
        max_bytes_per_token: from `schema.max_bytes_per_token`.
        limit: bytes.
    """
    # A list offset of 4 bytes a column and sample is counted as well, for at most 4 columns.
    sizes = np.asarray(lengths, dtype=np.int64) * max_bytes_per_token + 16
    return plan_shards(sizes, limit)
