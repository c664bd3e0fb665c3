"""What is counted of the samples of a global batch: terms of a loss are means over it."""

# B samples of a global batch, M samples of a window, U units

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.formats.buffers import TABLES
from kdcache.formats.rows import sum_rows
from kdcache.formats.window import WindowReader
from kdcache.train.batches.gold import GOLD, has_gold
from kdcache.train.batches.hypotheses import hypothesis_stream


@dataclass(frozen=True)
class Units:
    """Counts of each sample of a window.

    Attributes:
        names: U of them, see `GlobalBatch.counts`.
        of: [M, U] int32: what is counted of a sample lies side by side.
    """

    names: tuple[str, ...]
    of: np.ndarray

    def sums(self, index: np.ndarray, ends: np.ndarray) -> list[dict[str, int]]:
        """Units of each of some global batches, by what they are.

        Args:
            index: [R] places in the window of the samples of all of them.
            ends: [batches + 1] samples before each batch, and of all.
        """
        sums = sum_rows(self.of, index, ends).tolist()
        return [dict(zip(self.names, each, strict=True)) for each in sums]


def units_of(
    window: WindowReader, streams: Sequence[str], signals: Sequence[str], gold: np.ndarray | None
) -> Units:
    """What is counted of each sample of a window.

    Args:
        window: of the samples.
        streams: whose tokens are counted.
        signals: whose records are.
        gold: gold labels of the samples; None: not asked for.
    """
    units: dict[str, np.ndarray | int] = {"": 1}
    units |= {name: window.lengths(name) for name in streams}
    units |= {name: window.counts(name) for name in signals}
    for name, lengths in window.hypothesis_lengths().items():
        each = enumerate(lengths)
        units |= {hypothesis_stream(name, number): of for number, of in each}
    units |= {f"{name}.predicted": of for name, of in window.predicted_counts().items()}
    units |= {f"{name}.masked": of for name, of in window.masked_counts().items()}
    if gold is not None:
        units[GOLD] = has_gold(gold)
    of = TABLES.array((window.num_samples, len(units)), np.int32)
    for number, counts in enumerate(units.values()):
        of[:, number] = counts
    return Units(tuple(units), of)
