"""Scores of a student on text: teacher-forced loss and accuracy, sources right and shuffled."""

# B batch, S source positions, T target positions, N target tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import CorpusError
from kdcache.formats.keyed import permutation, text_key
from kdcache.train.runs.parallel import Ranks
from kdcache.train.runs.scoring import Score, score_tokens_in_turns, token_sums
from kdcache.train.students.student import embedding_rows, max_positions, student_logits


@dataclass(frozen=True)
class TokenPairs:
    """Pairs of token lists, each [length] int64."""

    src: list[np.ndarray]
    tgt: list[np.ndarray]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.tgt)

    def limited(self, num_tokens: int) -> TokenPairs:
        """The first pairs with at most this many target tokens, at least one pair."""
        ends = np.cumsum([len(ids) for ids in self.tgt])
        count = max(1, int(np.searchsorted(ends, num_tokens, side="right")))
        return TokenPairs(self.src[:count], self.tgt[:count])

    def within(self, positions: int | None) -> TokenPairs:
        """The pairs whose both sides have at most this many tokens."""
        if positions is None:
            return self
        sides = zip(self.src, self.tgt, strict=True)
        kept = [pair for pair in sides if max(map(len, pair)) <= positions]
        return TokenPairs([src for src, _ in kept], [tgt for _, tgt in kept])

    def check_ids(self, model: Any) -> None:
        """Refuse ids that a model has no row for: torch would fail without naming them.

        Raises:
            CorpusError: with the pair and the id.
        """
        for side, lists, rows in zip(
            ("source", "target"), (self.src, self.tgt), embedding_rows(model), strict=True
        ):
            for number, ids in enumerate(lists):
                if len(ids) and int(ids.max()) >= rows:
                    raise CorpusError(
                        f"pair {number} (from 0): its {side} has the token id {int(ids.max())}, "
                        f"the model has {rows} ids; use the tokenizer that it was trained with, "
                        "or leave out the pair"
                    )

    def shuffled(self) -> TokenPairs:
        """Every target beside the source of another pair (of itself if there is but one)."""
        order = permutation(len(self), text_key("shuffled sources", len(self)))
        # A step along one cycle through all pairs leaves none in its place.
        other = np.empty(len(self), dtype=np.int64)
        other[order] = np.roll(order, 1)
        return replace(self, src=[self.src[i] for i in other])


def encode(tokenizer: Any, texts: Sequence[str], target: bool) -> list[np.ndarray]:
    """Token ids of texts as a dump makes them, special tokens included.

    Args:
        tokenizer: of transformers.
        texts: to encode.
        target: with the target side of a tokenizer that has two.
    """
    if not texts:
        return []
    side = {"text_target" if target else "text": list(texts)}
    found = tokenizer(**side, return_attention_mask=False, verbose=False)
    return [np.asarray(ids, dtype=np.int64) for ids in found["input_ids"]]


def score(
    model: Any,
    tokenizer: Any,
    src: Sequence[str],
    tgt: Sequence[str],
    device: torch.device,
    batch_tokens: int = 4096,
) -> Score:
    """Score target texts given their sources.

    Args:
        model: a transformers encoder-decoder on `device`.
        tokenizer: its tokenizer.
        src: source texts.
        tgt: as many target texts.
        device: of the model.
        batch_tokens: padded tokens of one forward on the longer side.

    Raises:
        CorpusError: no pair fits the model's positions.
    """
    return score_tokens(model, _pairs(tokenizer, src, tgt), device, batch_tokens)


def score_shuffled(
    model: Any,
    tokenizer: Any,
    src: Sequence[str],
    tgt: Sequence[str],
    device: torch.device,
    batch_tokens: int = 4096,
) -> Score:
    """`score` with every target beside another target's source.

    A model that ignores its source scores the same both times.
    """
    return score_tokens(model, _pairs(tokenizer, src, tgt).shuffled(), device, batch_tokens)


def score_tokens(
    model: Any,
    pairs: TokenPairs,
    device: torch.device,
    batch_tokens: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
) -> Score:
    """Score encoded pairs; those longer than the model's positions are left out.

    Args:
        model: a transformers encoder-decoder on `device`.
        pairs: the same on every rank.
        device: of the model.
        batch_tokens: padded tokens of one forward on the longer side.
        ranks: which score the batches in turns.

    Raises:
        CorpusError: none is left, or one has an id that the model does not know.
    """
    pairs = pairs.within(max_positions(model))
    if not len(pairs):
        raise CorpusError("nothing to score: no pair of texts fits the model's positions")
    pairs.check_ids(model)
    lengths = [max(1, len(s), len(t)) for s, t in zip(pairs.src, pairs.tgt, strict=True)]
    num_tokens = sum(len(ids) for ids in pairs.tgt)

    def sums(rows: list[int]) -> Tensor:
        src, src_mask = padded([pairs.src[i] for i in rows], device)
        labels, label_mask = padded([pairs.tgt[i] for i in rows], device)
        logits = student_logits(model, src, src_mask, labels, label_mask)  # [N, V]
        return token_sums(logits, labels[label_mask], label_mask.sum(1))

    return score_tokens_in_turns(model, lengths, num_tokens, device, batch_tokens, ranks, sums)


def _pairs(tokenizer: Any, src: Sequence[str], tgt: Sequence[str]) -> TokenPairs:
    """Encode both sides."""
    return TokenPairs(encode(tokenizer, src, False), encode(tokenizer, tgt, True))


def padded(ids: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, L] padded with 0 at the end, which the mask [B, L] leaves out."""
    lengths = np.array([len(row) for row in ids])
    mask = np.arange(max(1, int(lengths.max()))) < lengths[:, None]
    out = np.zeros(mask.shape, dtype=np.int64)
    out[mask] = np.concatenate(ids)
    return torch.from_numpy(out).to(device), torch.from_numpy(mask).to(device)
