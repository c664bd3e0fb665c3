"""Where words begin in a sequence of tokens, read from the strings of a vocabulary.

A vocabulary marks words in one of four ways: pieces that go on carry "##" (WordPiece), pieces
that begin a word carry a space ("▁" of SentencePiece, "Ġ" of byte-level BPE), pieces that end one
carry "</w>", or pieces that do not end one carry "@@". Without any mark every token is a word.

# V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: White space as the byte-level alphabet writes it: space, line feed, tab, carriage return.
BYTE_SPACES = ("Ġ", "Ċ", "ĉ", "č")


@dataclass(frozen=True)
class WordMarks:
    """What each id says about words: token t begins one if begins[t] or ends[t - 1].

    The first token of a text begins a word whatever it is, and so does one that follows a
    special token; that is the reader's to add.

    Attributes:
        begins: [V] bool, the id begins a word.
        ends: [V] bool, the id ends one.
    """

    begins: np.ndarray
    ends: np.ndarray


def word_marks(tokens: Sequence[str]) -> WordMarks:
    """The marks of a vocabulary; where it seems to have several kinds, the most frequent is it.

    A word is what the mark delimits: for WordPiece a sign of punctuation is a word by itself,
    for the others it belongs to the word that it is written to.

    Args:
        tokens: V token strings, empty for ids that name nothing.
    """
    no_ids = np.zeros(len(tokens), dtype=bool)

    def flags(marked: Sequence[bool]) -> np.ndarray:
        return np.fromiter(marked, dtype=bool, count=len(tokens))

    goes_on = flags([token.startswith("##") and len(token) > 2 for token in tokens])
    spaced = flags([token.startswith("▁") for token in tokens])
    byte_spaced = flags([token.startswith(BYTE_SPACES) for token in tokens])
    ended = flags([token.endswith("</w>") for token in tokens])
    unended = flags([token.endswith("@@") and len(token) > 2 for token in tokens])
    kinds = [
        (goes_on, WordMarks(begins=~goes_on, ends=no_ids)),
        (spaced, WordMarks(begins=spaced, ends=no_ids)),
        (byte_spaced, WordMarks(begins=byte_spaced, ends=no_ids)),
        (ended, WordMarks(begins=no_ids, ends=ended)),
        (unended, WordMarks(begins=no_ids, ends=~unended)),
    ]
    # Without any mark the first kind is it: no piece goes on, so every token is a word.
    return max(kinds, key=lambda kind: int(kind[0].sum()))[1]
