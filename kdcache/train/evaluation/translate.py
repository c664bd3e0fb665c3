"""Beam search over many sentences with transformers' own generate.

Sentences are searched together with others of exactly their length, so no row is padded
and every row has the length limit it would have alone: a batch gives what one sentence at
a time gives, up to the noise of matrix products.
"""

# B sentences of one batch, S source tokens, T generated tokens

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kdcache.errors import CorpusError
from kdcache.progress import progress
from kdcache.train.students.student import embedding_rows, max_positions


def translate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    max_length_ratio: float = 2.0,
    batch_tokens: int = 4096,
    description: str | None = None,
) -> list[str]:
    """Translate texts by beam search.

    Args:
        model: a transformers encoder-decoder; it is put into evaluation mode.
        tokenizer: its transformers tokenizer.
        texts: source sentences.
        num_beams: beams; 1 is greedy search.
        length_penalty: exponent of the length a hypothesis' log-prob is divided by.
        max_length_ratio: a hypothesis stops at this many times the source tokens, plus 10.
        batch_tokens: source tokens x beams in one batch.
        description: what the progress bar is called; no bar without it.

    Returns:
        The best hypothesis of every text, in the order of the texts, special tokens left out.

    Raises:
        CorpusError: a text has more tokens than the model has positions, or an id it lacks.
    """
    if not texts:
        return []
    was_training = model.training
    model.eval()
    ids = [list(row) for row in tokenizer(list(texts))["input_ids"]]
    _check_rows(ids, max_positions(model), embedding_rows(model)[0])
    hypotheses = [""] * len(texts)
    try:
        with _bar(len(texts), description) as bar, torch.inference_mode():
            for rows in _batches([len(row) for row in ids], batch_tokens // num_beams):
                src = torch.tensor([ids[row] for row in rows], device=model.device)  # [B, S]
                out = _generate(model, src, num_beams, length_penalty, max_length_ratio)  # [B, T]
                found = tokenizer.batch_decode(
                    out.cpu(), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                for row, text in zip(rows, found, strict=True):
                    hypotheses[row] = text
                if bar is not None:
                    bar.update(len(rows))
    finally:
        model.train(was_training)
    return hypotheses


def _bar(total: int, description: str | None) -> AbstractContextManager[Any]:
    """A progress bar, or nothing: sentences timed one by one draw none."""
    return nullcontext() if description is None else progress(total, description, "sentence")


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of one length each, longest first so that memory is claimed at the start."""
    of_length: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        of_length[length].append(row)
    for length in sorted(of_length, reverse=True):
        rows = of_length[length]
        size = max(1, batch_tokens // max(1, length))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _generate(
    model: Any, src: torch.Tensor, num_beams: int, length_penalty: float, ratio: float
) -> torch.Tensor:
    """[B, S] source ids to [B, T] ids of the best hypotheses."""
    limit = math.floor(ratio * src.shape[1]) + 10
    positions = max_positions(model)
    if positions is not None:
        limit = min(limit, positions - 1)
    options: dict[str, Any] = {"length_penalty": length_penalty} if num_beams > 1 else {}
    found: torch.Tensor = model.generate(
        input_ids=src,
        attention_mask=torch.ones_like(src),
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=limit,
        **options,
    )
    return found


def _check_rows(ids: Sequence[Sequence[int]], positions: int | None, num_ids: int) -> None:
    """Refuse what the embeddings cannot take: torch would fail without naming the row."""
    for row, tokens in enumerate(ids):
        if positions is not None and len(tokens) > positions:
            raise CorpusError(
                f"sentence {row} (from 0) has {len(tokens)} tokens; the model takes {positions}: "
                "shorten it or leave it out"
            )
        if tokens and max(tokens) >= num_ids:
            raise CorpusError(
                f"sentence {row} (from 0) has the token id {max(tokens)}; the model has {num_ids} "
                "ids: use the tokenizer that it was trained with, or leave it out"
            )
