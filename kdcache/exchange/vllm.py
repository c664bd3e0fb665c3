"""vLLM's own form: prompt_logprobs as the engine and its server give them, a JSON line a text."""

# T tokens, N labels, E entries

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdcache.errors import CorpusError
from kdcache.exchange.json_lines import json_lines, required, total_bytes
from kdcache.exchange.peer_rows import PeerLabels, PeerRow, integers


class VllmReader:
    """Rows with `prompt_token_ids` and `prompt_logprobs`, and perhaps the `prompt`.

    Its labels hold the token itself, even where that is not among the k: so its log-prob is
    known, and a label that slid by a token is found out at its first position.
    """

    limits: tuple[str, ...] = (
        "no tail: of the ids outside the k only the sum of their probabilities is known, at "
        "temperature 1; other temperatures are approximate",
        "log-probs are taken to be raw (vLLM's logprobs_mode raw_logprobs), at temperature 1: a "
        "file does not say so",
    )
    unit = "B"
    lossy = False
    has_loss = False

    def __init__(self, paths: Sequence[str], text_field: str | None = None) -> None:
        """Name the files.

        Args:
            paths: of JSONL files, .gz or not.
            text_field: key of the text; `prompt` without it.
        """
        self._paths, self._text = paths, text_field
        self.total = total_bytes(paths)

    def rows(self, advance: Callable[[int], object], start: int = 0) -> Iterator[PeerRow]:
        """See `Reader`."""
        for number, where, row in json_lines(self._paths, advance, start):
            ids = integers(
                required(row, ["prompt_token_ids"], "tokens", where), "prompt_token_ids", where
            )
            text = row.get(self._text or "prompt")
            if self._text is not None and not isinstance(text, str):
                raise CorpusError(f"{where}: {self._text!r} should be text; found {sorted(row)}")
            yield PeerRow(
                number,
                where,
                ids,
                text if isinstance(text, str) else None,
                None,
                None,
                lambda row=row, ids=ids, where=where: _labels(row, ids, where),  # type: ignore[misc]
            )


def _labels(row: dict[str, Any], tokens: np.ndarray, where: str) -> PeerLabels:
    """One dictionary for each token, the first one's is null."""
    given = required(row, ["prompt_logprobs"], "log-probs", where)
    if not isinstance(given, list) or len(given) != len(tokens):
        found = len(given) if isinstance(given, list) else type(given).__name__
        raise CorpusError(
            f"{where}: {found} prompt_logprobs for {len(tokens)} tokens; expected one each, the "
            "first of them null"
        )
    counts, ids, log_probs, gold = [], [], [], []
    # One more than k where the token itself is none of them.
    k = min((len(one) for one in given[1:] if isinstance(one, dict)), default=0)
    for position in range(1, len(tokens)):
        kept, own = _position(
            given[position], int(tokens[position]), k, f"{where}, token {position}"
        )
        counts.append(len(kept))
        ids += [token for token, _ in kept]
        log_probs += [value for _, value in kept]
        gold.append(own)
    return PeerLabels(
        1,
        np.array(counts, dtype=np.int64),
        np.array(ids, dtype=np.int64),
        np.array(log_probs, dtype=np.float64),
        np.array(gold, dtype=np.float64),
    )


def _position(
    given: object, token: int, k: int, where: str
) -> tuple[list[tuple[int, float]], float]:
    """The top k of one token, and the log-prob of the token itself."""
    if not isinstance(given, dict) or not given:
        raise CorpusError(f"{where}: no log-probs; only the first token may have none")
    try:
        entries = [(int(key), float(e["logprob"]), e.get("rank")) for key, e in given.items()]
    except (TypeError, ValueError, KeyError, AttributeError):
        raise CorpusError(
            f'{where}: expected objects such as {{"42": {{"logprob": -0.1, "rank": 1}}}}'
        ) from None
    own = [entry for entry in entries if entry[0] == token]
    if not own:
        raise CorpusError(
            f"{where}: its log-probs do not hold the token itself (id {token}), which vLLM always "
            "gives: the labels are shifted against the tokens, or of another text"
        )
    # What was added for its own sake is none of the top k.
    [(_, log_prob, rank)] = own
    least = all(value > log_prob for key, value, _ in entries if key != token)
    added = rank > k if isinstance(rank, int) else least and len(entries) > k
    return [(key, value) for key, value, _ in entries if not (added and key == token)], log_prob
