"""Which samples of several caches are the same, and keyed choices among samples: pure.

# S caches, M samples of one cache, U samples of all
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcache.formats.keyed import sample_keys

#: Stands for "not in this cache".
ABSENT = -1


def occurrences(sample_ids: np.ndarray) -> np.ndarray:
    """How many samples of the same id stand before each.

    It tells duplicates apart by their order alone, whatever the rows or shards are.

    Args:
        sample_ids: [M, 16] uint8.

    Returns:
        [M] int64: 0 for the first sample of an id, 1 for its first duplicate, ...
    """
    words = _words(sample_ids)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal ids stay in order
    rank = _ranks(words[order])
    found = np.empty_like(rank)
    found[order] = rank
    return found


def match(sample_ids: Sequence[np.ndarray], duplicates: Sequence[np.ndarray]) -> np.ndarray:
    """Samples of all caches in order of first appearance, those of one id and duplicate as one.

    Args:
        sample_ids: of each cache, [M, 16] uint8.
        duplicates: of each cache, [M] from `occurrences`.

    Returns:
        [S, U] integer: the sample of each cache; ABSENT where the cache has none.
    """
    words = np.concatenate([_words(ids) for ids in sample_ids])
    number = np.concatenate(duplicates)
    order = np.lexsort((number, words[:, 1], words[:, 0]))
    keys = np.column_stack([words[order], number[order].astype(np.uint64)])
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    group = np.cumsum(fresh) - 1  # of each sample in sorted order
    first = order[fresh]  # the stable sort has a group's first appearance first
    place = np.empty(len(first), dtype=np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    column = np.empty(len(order), dtype=np.int64)
    column[order] = place[group]
    where = _table(len(sample_ids), len(first), [len(ids) for ids in sample_ids])
    begin = 0
    for s, ids in enumerate(sample_ids):
        where[s, column[begin : begin + len(ids)]] = np.arange(len(ids))
        begin += len(ids)
    return where


def stack(counts: Sequence[int]) -> np.ndarray:
    """Samples of all caches one after another, each its own.

    Args:
        counts: samples of each cache.

    Returns:
        [S, U] integer as of `match`.
    """
    where = _table(len(counts), sum(counts), counts)
    begin = 0
    for s, count in enumerate(counts):
        where[s, begin : begin + count] = np.arange(count)
        begin += count
    return where


def first_source(where: np.ndarray, among: Sequence[int] | None = None) -> np.ndarray:
    """[U] int64 the first cache that has each sample; ABSENT where none has.

    Args:
        where: [S, U] from `match` or `stack`.
        among: caches that are asked; all without it.
    """
    found = np.full(where.shape[1], ABSENT, dtype=np.int64)
    for s in reversed(range(len(where)) if among is None else sorted(among)):
        found[where[s] != ABSENT] = s
    return found


def choice_hashes(
    sample_ids: np.ndarray,
    duplicates: np.ndarray,
    seed: int,
    purpose: str,
    copy: int = 0,
) -> np.ndarray:
    """A random number for each sample that depends on its id and duplicate alone.

    Args:
        sample_ids: [M, 16] uint8.
        duplicates: [M] from `occurrences`.
        seed: of the choice.
        purpose: what is chosen.
        copy: which copy of the samples, where they are repeated.

    Returns:
        [M] uint64.
    """
    return sample_keys(seed, purpose, "compile", sample_ids, duplicates, replica=copy)


def below(hashes: np.ndarray, share: float) -> np.ndarray:
    """[M] bool, the samples that a share of all is made of; a larger share has them too.

    Args:
        hashes: [M] uint64.
        share: from 0 to 1.
    """
    if share >= 1:
        return np.ones(len(hashes), dtype=bool)
    chosen: np.ndarray = hashes < np.uint64(int(share * 2.0**64))
    return chosen


def smallest(hashes: np.ndarray, count: int) -> np.ndarray:
    """[M] bool, the `count` samples of the smallest hashes, or all."""
    chosen = np.zeros(len(hashes), dtype=bool)
    chosen[np.argsort(hashes, kind="stable")[:count]] = True
    return chosen


def _words(sample_ids: np.ndarray) -> np.ndarray:
    """[M, 2] uint64."""
    return np.ascontiguousarray(sample_ids).view("<u8").reshape(-1, 2)


def _ranks(keys: np.ndarray) -> np.ndarray:
    """[M] int64 place of each row within its run of equal rows."""
    at = np.arange(len(keys), dtype=np.int64)
    fresh = np.ones(len(keys), dtype=bool)
    fresh[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    return at - np.maximum.accumulate(np.where(fresh, at, 0))


def _table(num_sources: int, num_samples: int, counts: Sequence[int]) -> np.ndarray:
    """An empty table of samples, with four bytes for each where they suffice."""
    wide = max(counts, default=0) > np.iinfo(np.int32).max
    return np.full((num_sources, num_samples), ABSENT, dtype=np.int64 if wide else np.int32)
