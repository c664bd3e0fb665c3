"""A plain copy of the bytes of batches, under the same loop as those who make them.

All tensors that kdcache delivered in some batches, 256 MiB in all, lie in memory. `flat`: their
bytes, one after another, are copied into memory that is there already, one numpy call a batch.
`clone`: every tensor of a batch is cloned, so that there is a new one, as a loader must give.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from peer_loop import serve
from side_kdcache import Side
from torch import Tensor

HELD_BYTES = 256 << 20


class Copy:
    """Copies for ever.

    Args:
        way: `flat` or `clone`.
    """

    def __init__(self, way: str) -> None:
        self.way = way
        self.batches: list[dict[str, Tensor]] = []

    def loader(self, data: Path, batch: int, workers: int, seed: int) -> Iterable[int]:
        """Shuffled batches of one epoch, each time it is iterated."""
        side, held = Side(), 0
        self.batches = []
        for one in side.loader(data, batch, workers, seed):
            tensors = {name: tensor.clone() for name, tensor in side.tensors(one).items()}
            self.batches.append(tensors)
            held += sum(tensor.nbytes for tensor in tensors.values())
            if held >= HELD_BYTES:
                break
        return self.flat() if self.way == "flat" else self.clone()

    def flat(self) -> Iterator[int]:
        """Tokens of each batch whose bytes were copied."""
        pieces = [
            np.concatenate([tensor.numpy().reshape(-1).view(np.uint8) for tensor in one.values()])
            for one in self.batches
        ]
        tokens = [len(one["gold"]) for one in self.batches]
        self.batches = []
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        source = np.concatenate(pieces)
        target = np.ones_like(source)
        while True:
            for piece, number, end in zip(pieces, tokens, ends, strict=True):
                span = slice(end - len(piece), end)
                np.copyto(target[span], source[span])
                yield number

    def clone(self) -> Iterator[int]:
        """Tokens of each batch whose tensors were cloned."""
        tokens = [len(one["gold"]) for one in self.batches]
        while True:
            for one, number in zip(self.batches, tokens, strict=True):
                fresh = [tensor.clone() for tensor in one.values()]
                yield number
                del fresh

    def tokens(self, batch: int) -> int:
        """Target tokens of a batch."""
        return batch


if __name__ == "__main__":
    serve(Copy(sys.argv[1]))
