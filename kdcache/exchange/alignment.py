"""Tokens of an imported row: the file's own, compared with what our tokenizer makes of its text."""

# T tokens of a row

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdcache.dump.tokenize import Tokenizer
from kdcache.errors import CorpusError, IdentityError
from kdcache.exchange.peer_rows import PeerRow


@dataclass(frozen=True)
class TokenRow:
    """A row that is a sample.

    Attributes:
        number: of the row.
        text: raw text of its field.
        ids: [T] int64.
        loss: [T] bool, which tokens are learned; None: all but the first.
    """

    number: int
    text: str
    ids: np.ndarray
    loss: np.ndarray | None


class Alignment:
    """Finds the tokens of rows, and refuses the first that are not its tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, trust_ids: bool, vocab_size: int) -> None:
        """Set up.

        Args:
            tokenizer: of the cache.
            trust_ids: take the file's ids as they are, whatever the tokenizer makes of the text.
            vocab_size: ids that texts may have.
        """
        self._tokenizer, self._trust, self._vocab_size = tokenizer, trust_ids, vocab_size
        self.compared = 0

    def tokens(self, row: PeerRow) -> TokenRow:
        """The tokens of a row.

        Raises:
            IdentityError: the file's ids are not those of our tokenizer; with the first that is
                not.
            CorpusError: the row has neither ids nor text, or messages that cannot be encoded.
        """
        if row.messages is not None:
            try:
                ids, loss = self._tokenizer.chat.encode(row.messages)
            except CorpusError as error:
                raise CorpusError(f"{row.where}: {error}") from None
            own = np.array(ids, dtype=np.int64)
            if row.ids is not None:
                self._compare(row, own, "its messages are tokenised to")
            return TokenRow(row.number, row.messages, own, np.array(loss, dtype=bool))
        if row.ids is None:
            if row.text is None:
                raise CorpusError(f"{row.where}: it has neither tokens nor text")
            own = np.array(self._tokenizer.encode([row.text], False)[0], dtype=np.int64)
            return TokenRow(row.number, row.text, own, row.loss)
        outside = np.flatnonzero((row.ids < 0) | (row.ids >= self._vocab_size))
        if len(outside):
            at = int(outside[0])
            raise IdentityError(
                f"{row.where}: token {at} is id {row.ids[at]}, and {self._tokenizer.path} has "
                f"{self._vocab_size} ids: name the tokenizer of the teacher that was dumped"
            )
        text = row.text
        if text is None:
            text = self._tokenizer.decode(row.ids.tolist())
            if not self._trust:
                again = self._tokenizer.encode_plain(text)
                self._compare(row, np.array(again, dtype=np.int64), "their text is tokenised to")
        elif not self._trust:
            own = np.array(self._tokenizer.encode([text], False)[0], dtype=np.int64)
            self._compare(row, own, "the text is tokenised to")
        return TokenRow(row.number, text, row.ids, row.loss)

    def _compare(self, row: PeerRow, own: np.ndarray, how: str) -> None:
        """Refuse a row whose ids are not our tokenizer's."""
        assert row.ids is not None
        self.compared += 1
        both = min(len(own), len(row.ids))
        apart = np.flatnonzero(own[:both] != row.ids[:both])
        if not len(apart) and len(own) == len(row.ids):
            return
        at = int(apart[0]) if len(apart) else both
        given, ours = (_shown(ids, at) for ids in (row.ids, own))
        raise IdentityError(
            f"{row.where}: token {at} (from 0) is {given} in the file, {how} {ours} by "
            f"{self._tokenizer.path}: name the tokenizer of the teacher that was dumped, or take "
            "the file's ids as they are with --trust-ids"
        )


def _shown(ids: np.ndarray, at: int) -> str:
    return f"id {ids[at]}" if at < len(ids) else f"not there ({len(ids)} tokens)"
