"""NeMo-Aligner's form: tokens, labels, loss mask, top-k logits and their log-sum-exp, in JSONL."""

# T tokens, N labels, k entries of each

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdcache.errors import CorpusError
from kdcache.exchange.json_lines import json_lines, required, total_bytes
from kdcache.exchange.peer_rows import PeerLabels, PeerRow, integers

_LOG_SUM = "log_sum_exp_logits"


class NemoReader:
    """Rows whose item t reads `tokens[t]` and predicts `labels[t]`, which is `tokens[t + 1]`.

    Rows are padded to the longest of their batch; what stands behind the last token with a loss
    is left out, since nothing before it can depend on it.
    """

    limits: tuple[str, ...] = (
        "no tail: of the ids outside the k only the sum of their probabilities is known, at "
        "temperature 1; other temperatures are approximate",
        "targets outside the k have no log-prob of their own: theirs is an estimate",
        "files without log_sum_exp_logits know logits up to a constant: their k probabilities are "
        "scaled to the sum 1",
        "no text: it is what the tokens decode to",
    )
    unit = "B"
    lossy = False
    has_loss = True

    def __init__(self, paths: Sequence[str], text_field: str | None = None) -> None:
        """Name the files.

        Args:
            paths: of JSONL files, .gz or not.
            text_field: key of the text; none without it.
        """
        self._paths, self._text = paths, text_field
        self.total = total_bytes(paths)

    def rows(self, advance: Callable[[int], object], start: int = 0) -> Iterator[PeerRow]:
        """See `Reader`."""
        for number, where, row in json_lines(self._paths, advance, start):
            tokens, labels, mask = (
                integers(_whole(required(row, [key], key, where)), key, where)
                for key in ("tokens", "labels", "loss_mask")
            )
            if not len(tokens) == len(labels) == len(mask):
                raise CorpusError(
                    f"{where}: {len(tokens)} tokens, {len(labels)} labels, {len(mask)} in loss_mask"
                )
            used = int(np.flatnonzero(mask).max(initial=-1)) + 1
            apart = np.flatnonzero(labels[: max(0, used - 1)] != tokens[1:used])
            if len(apart):
                at = int(apart[0])
                raise CorpusError(
                    f"{where}: label {at} is {labels[at]}, and token {at + 1} is {tokens[at + 1]}: "
                    "labels should be the tokens, one further on"
                )
            ids = np.concatenate([tokens[:used], labels[used - 1 : used]])
            loss = np.concatenate([[False], mask[:used] > 0])[: len(ids)]
            text = row.get(self._text) if self._text else None
            read = lambda row=row, used=used, where=where: _labels(row, used, where)  # noqa: E731
            yield PeerRow(number, where, ids, text, None, loss, read)


def _whole(value: object) -> object:
    """A loss mask is written as 0.0 and 1.0."""
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return [int(v) if v == int(v) else v for v in value]
    return value


def _labels(row: dict[str, Any], used: int, where: str) -> PeerLabels:
    """Labels of the first `used` items, of the tokens from the second on."""
    arrays = {}
    for key in ("topk_logits", "topk_token_ids"):
        try:
            arrays[key] = np.array(required(row, [key], key, where), dtype=np.float64)
        except (TypeError, ValueError):
            arrays[key] = np.empty(0)
    logits, ids = arrays["topk_logits"], arrays["topk_token_ids"]
    if logits.ndim != 2 or logits.shape != ids.shape or len(logits) < used:
        raise CorpusError(
            f"{where}: topk_logits {list(logits.shape)} and topk_token_ids {list(ids.shape)} "
            f"should be of one shape, at least {used} tokens x k"
        )
    logits, ids = logits[:used], ids[:used]
    if row.get(_LOG_SUM) is None:
        peak = logits.max(axis=1, initial=-np.inf)
        log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    else:
        log_sum = np.array(row[_LOG_SUM], dtype=np.float64).reshape(-1)[:used]
        if len(log_sum) != used:
            raise CorpusError(f"{where}: {len(log_sum)} {_LOG_SUM}, expected at least {used}")
    counts = np.full(used, ids.shape[1], dtype=np.int64)
    log_probs = (logits - log_sum[:, None]).ravel()
    return PeerLabels(1, counts, ids.astype(np.int64).ravel(), log_probs, np.full(used, np.nan))
