"""What a language model makes of every text of a test set: scores, and lines."""

# M texts

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TextScores:
    """Sums over the predicted tokens of each text.

    Attributes:
        rows: [M] int64, where the texts stand in the corpus, from 0.
        nats: [M] float64, summed negative log-prob of predicted tokens.
        num_tokens: [M] int64, predicted tokens, at least one in all.
        num_right: [M] int64, those of them that are the first choice.
        num_words: [M] int64; None where words are not counted.
    """

    rows: np.ndarray
    nats: np.ndarray
    num_tokens: np.ndarray
    num_right: np.ndarray
    num_words: np.ndarray | None = None

    @property
    def unit(self) -> np.ndarray:
        """[M] int64: every text is drawn by itself."""
        return np.arange(len(self.rows))

    def metrics(self, chosen: np.ndarray | None = None) -> dict[str, float]:
        """loss_nats of a token, perplexity of a token, accuracy, word_perplexity with words.

        Args:
            chosen: [N] int64, those of the texts that count, some perhaps several times; None:
                all, once.
        """
        kept = slice(None) if chosen is None else chosen
        nats, num_tokens = float(self.nats[kept].sum()), max(1, int(self.num_tokens[kept].sum()))
        found = {
            "loss_nats": nats / num_tokens,
            "perplexity": _exp(nats / num_tokens),
            "accuracy": int(self.num_right[kept].sum()) / num_tokens,
        }
        if self.num_words is not None and self.num_words.any():
            found["word_perplexity"] = _exp(nats / max(1, int(self.num_words[kept].sum())))
        return found

    def lines(self, name: str = "") -> Iterable[str]:
        """A JSON object for each text.

        Args:
            name: empty; these have no tasks.
        """
        columns = {key: getattr(self, field).tolist() for key, field in self._fields.items()}
        for values in zip(*columns.values(), strict=True):
            yield json.dumps(dict(zip(columns, values, strict=True)))

    @property
    def _fields(self) -> dict[str, str]:
        """Names in the file to those of the attributes."""
        words = {"num_words": "num_words"} if self.num_words is not None else {}
        same = {name: name for name in ("nats", "num_tokens", "num_right")}
        return {"row": "rows", **same, **words}


def parse_text_scores(lines: Iterable[Mapping[str, Any]]) -> TextScores:
    """The scores that `TextScores.lines` wrote.

    Args:
        lines: as values.

    Raises:
        ValueError: a line is not as it should be.
    """
    held = list(lines)
    try:
        counts = {
            key: np.array([int(line[key]) for line in held], np.int64)
            for key in ("row", "num_tokens", "num_right", "num_words")
            if key != "num_words" or any(key in line for line in held)
        }
        nats = np.array([float(line["nats"]) for line in held], np.float64)
    except (KeyError, TypeError) as error:
        raise ValueError(f"a line lacks {error}") from None
    return TextScores(counts.pop("row"), nats, **counts)


def _exp(nats: float) -> float:
    """A perplexity, infinite where there is no number for it."""
    return math.exp(nats) if nats < 700 else math.inf
