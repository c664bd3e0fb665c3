"""Masked copies of rows: every word is replaced by the mask token with some probability.

Words are what stands between white space, which stays as it is. Which of them are masked is a keyed
hash of seed, row, copy and word, so the same copies come out in every process and batch.

Source: Tang et al. 2019, Distilling Task-Specific Knowledge from BERT, section 3.3 (masking alone);
Liu et al. 2019, MKD, section 6.2.
"""

# R rows, K copies, W words of all rows

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from kdcache.formats.identity import sample_id
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.recipe import AugmentSection

_SPACE = re.compile(r"(\s+)")


def with_copies(
    fields: Mapping[str, Sequence[str]],
    numbers: np.ndarray,
    copies: int,
    section: AugmentSection,
    masked: Sequence[str],
    task: str,
) -> dict[str, list[str]]:
    """Rows, each followed by its copies.

    Args:
        fields: name to R texts; of the mark they are not read.
        numbers: [R] int64 of the rows in the task's own files.
        copies: K, of every row.
        section: how they are made.
        masked: fields in which words are masked.
        task: whose rows they are.

    Returns:
        The same names to R * (1 + K) texts; the mark says 0 of a row and 1 to K of its copies.
    """
    texts = [fields[name] for name in fields if name != section.mark]
    packed = b"".join(sample_id(row, task) for row in zip(*texts, strict=True))
    ids = np.frombuffer(packed, dtype=np.uint8).reshape(-1, 16)
    pieces = {name: [_SPACE.split(text) for text in fields[name]] for name in masked}
    counts = np.zeros(len(numbers), dtype=np.int64)
    for split in pieces.values():
        counts += np.array([(len(text) + 1) // 2 for text in split], dtype=np.int64)
    ends = np.cumsum(counts)
    row = np.repeat(np.arange(len(counts)), counts)  # [W]
    place = np.arange(len(row)) - np.repeat(ends - counts, counts)
    found = {
        name: [text for text in fields[name] for _ in range(1 + copies)]
        for name in fields
        if name != section.mark
    }
    for copy in range(1, copies + 1):
        keys = sample_keys(section.seed, "augment", "", ids, numbers, copy)
        drawn = (position_hash(keys[row], place) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        chosen = (drawn < section.probability).tolist()
        at = 0
        for number in range(len(counts)):
            for name, split in pieces.items():
                text = list(split[number])
                end = at + (len(text) + 1) // 2
                text[::2] = [
                    section.mask if word and hit else word
                    for word, hit in zip(text[::2], chosen[at:end], strict=True)
                ]
                at = end
                found[name][number * (1 + copies) + copy] = "".join(text)
    if section.mark in fields:
        found[section.mark] = [str(n) for n in range(1 + copies)] * len(counts)
    return {name: found[name] for name in fields}
