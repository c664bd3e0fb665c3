"""Do labels belong to their tokens? The mean probability of the token, and under shifts of one."""

# N positions, E entries

from __future__ import annotations

import math

import numpy as np

from kdcache.errors import IdentityError
from kdcache.exchange.label_coding import CleanLabels

#: Standard errors by which the tokens must be more probable than their neighbours.
SIGMAS = 3.0
#: Fewer positions than this tell little, and the sign of the difference must do.
FEW = 30


class GoldCheck:
    """Sums over all labels of a file, sample by sample."""

    def __init__(self) -> None:
        self.num = 0
        self.held = 0
        self._sum = 0.0
        self._shifted = {-1: np.zeros(4), 1: np.zeros(4)}

    def add(self, labels: CleanLabels, tokens: np.ndarray) -> None:
        """Take in the labels of one sample.

        Args:
            labels: N of them.
            tokens: [N] int64 that they are of.
        """
        num = len(tokens)
        rows = np.repeat(np.arange(num), labels.counts)
        here = self._probability(labels, rows, tokens)
        self.num += num
        self.held += int((labels.ids == tokens[rows]).sum())
        self._sum += float(here.sum())
        for shift, sums in self._shifted.items():
            inside = slice(max(0, -shift), num - max(0, shift))
            there = np.full(num, -1, dtype=np.int64)
            there[inside] = tokens[max(0, shift) : num - max(0, -shift)]
            other = self._probability(labels, rows, there)[inside]
            more = here[inside] - other
            sums += np.array([len(more), other.sum(), more.sum(), (more**2).sum()])

    @staticmethod
    def _probability(labels: CleanLabels, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """[N] probability of each token under its label, 0 where it was not kept."""
        match = labels.ids == tokens[rows]
        found = np.zeros(len(tokens))
        found[rows[match]] = np.exp(labels.log_probs[match])
        return found

    def summary(self) -> dict[str, float | int]:
        """positions, held (share of tokens among the kept), and mean probability by shift."""
        return {
            "positions": self.num,
            "held": self.held / max(1, self.num),
            "probability": self._sum / max(1, self.num),
            "probability_shift_minus_1": self._mean(-1),
            "probability_shift_plus_1": self._mean(1),
        }

    def _mean(self, shift: int) -> float:
        num, other, _, _ = self._shifted[shift]
        return float(other / max(1, num))

    def require(self, where: str) -> None:
        """Refuse labels that fit their tokens no better than the tokens' neighbours.

        Raises:
            IdentityError: with the means.
        """
        found = self.summary()
        for sums in self._shifted.values():
            num, _, more, squares = sums.tolist()
            if num < 2:
                continue
            mean = more / num
            error = math.sqrt(max(0.0, squares / num - mean**2) / num)
            if mean > (SIGMAS * error if num >= FEW else 0):
                continue
            raise IdentityError(
                f"{where}: the labels are shifted against the tokens, or of other texts: the mean "
                f"probability of the token is {found['probability']:.4f}, of its neighbours "
                f"{found['probability_shift_minus_1']:.4f} (shift -1) and "
                f"{found['probability_shift_plus_1']:.4f} (+1), over {self.num} labels; mend the "
                "file, or import it all the same with --no-gold-check"
            )
