"""axolotl's form: messages, and a list of top-k log-probs for the last tokens of each."""

# N labels, E entries

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kdcache.errors import CorpusError
from kdcache.exchange.json_lines import json_lines, required, total_bytes
from kdcache.exchange.peer_rows import PeerLabels, PeerRow, integers
from kdcache.text import messages as chats

#: Keys that are looked for where none is named.
MESSAGES = ["messages", "messages_combined"]
LOG_PROBS = ["logprobs", "llm_text_generation_vllm_logprobs"]
#: An entry's token is written so.
_PREFIX = "token_id:"


class AxolotlReader:
    """Rows with messages and log-probs, in either of its two forms.

    The first has a list of `{"token": "token_id:42", "logprob": -0.1}` for each token, the second
    two lists of numbers, of log-probs and `target_token_ids`. Both belong to the last tokens.
    """

    limits: tuple[str, ...] = (
        "no tail: of the ids outside the k only the sum of their probabilities is known, at "
        "temperature 1; none at all where the file's k were scaled to the sum 1",
        "no token ids: the labels are taken to be those of the last tokens of the messages, under "
        "the tokenizer that was named",
        "targets outside the k have no log-prob of their own: theirs is an estimate",
        "log-probs are taken to be at temperature 1: a file does not say so",
    )
    unit = "B"
    lossy = False
    has_loss = True

    def __init__(
        self, paths: Sequence[str], messages_field: str | None, logprobs_field: str | None
    ) -> None:
        """Name the files.

        Args:
            paths: of JSONL files, .gz or not.
            messages_field: key of the messages; one of `MESSAGES` without it.
            logprobs_field: key of the log-probs; one of `LOG_PROBS` without it.
        """
        self._paths = paths
        self._messages = [messages_field] if messages_field else MESSAGES
        self._logprobs = [logprobs_field] if logprobs_field else LOG_PROBS
        self.total = total_bytes(paths)

    def rows(self, advance: Callable[[int], object], start: int = 0) -> Iterator[PeerRow]:
        """See `Reader`."""
        for number, where, row in json_lines(self._paths, advance, start):
            messages = required(row, self._messages, "messages", where)
            try:
                text = chats.canonical(messages)
            except ValueError as error:
                raise CorpusError(f"{where}: {error}") from None
            read = lambda row=row, where=where: self._labels(row, where)  # noqa: E731
            yield PeerRow(number, where, None, None, text, None, read)

    def _labels(self, row: dict[str, Any], where: str) -> PeerLabels:
        """Labels of the last tokens; a first null, as vLLM gives it, is passed over."""
        given = required(row, self._logprobs, "log-probs", where)
        named = row.get("target_token_ids")
        if not isinstance(given, list) or (named is not None and not isinstance(named, list)):
            raise CorpusError(f"{where}: log-probs should be a list with one item for each token")
        if named is not None and len(named) != len(given):
            raise CorpusError(
                f"{where}: {len(named)} target_token_ids for {len(given)} tokens with log-probs"
            )
        if given and not given[0]:
            given, named = given[1:], named and named[1:]
        counts, ids, log_probs = [], [], []
        for position, entries in enumerate(given):
            place = f"{where}, log-probs {position} (from 0)"
            some = _two_lists(entries, named[position], place) if named else _pairs(entries, place)
            counts.append(len(some[0]))
            ids += some[0]
            log_probs += some[1]
        return PeerLabels(
            None,
            np.array(counts, dtype=np.int64),
            np.array(ids, dtype=np.int64),
            np.array(log_probs, dtype=np.float64),
            np.full(len(counts), np.nan),
        )


def _pairs(entries: object, where: str) -> tuple[list[int], list[float]]:
    """One token's list of objects."""
    try:
        tokens = [entry["token"] for entry in entries]  # type: ignore[attr-defined]
        wrong = [token for token in tokens if not str(token).startswith(_PREFIX)]
        if not wrong and tokens:
            values = [float(entry["logprob"]) for entry in entries]  # type: ignore[attr-defined]
            return [int(token.removeprefix(_PREFIX)) for token in tokens], values
    except (TypeError, ValueError, KeyError):
        wrong = []
    if wrong:
        raise CorpusError(
            f"{where}: the token {wrong[0]!r} has no id, expected one such as 'token_id:42'; have "
            "vLLM's server return tokens as ids (return_tokens_as_token_ids)"
        )
    raise CorpusError(
        f'{where}: expected a list of objects such as {{"token": "token_id:42", "logprob": -0.1}}'
    )


def _two_lists(values: object, ids: object, where: str) -> tuple[list[int], list[float]]:
    """One token's lists of numbers."""
    tokens = integers(ids, "target_token_ids", where).tolist()
    if not isinstance(values, list) or len(values) != len(tokens) or not tokens:
        raise CorpusError(f"{where}: log-probs and target_token_ids differ in length, or are empty")
    try:
        return tokens, [float(value) for value in values]
    except (TypeError, ValueError):
        raise CorpusError(f"{where}: a log-prob is no number") from None
