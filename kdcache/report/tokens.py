"""Token strings for people: vocabularies over bytes decoded, control characters shown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Marks of byte-level vocabularies that stay as they are: a space before the token, a new line.
_KEPT = {" ": "Ġ", "\n": "Ċ"}


def readable(tokens: Sequence[str]) -> list[str]:
    """The strings of a vocabulary as people read them.

    In byte-level vocabularies (GPT-2's and its heirs) every letter stands for a byte, so that
    "ü" is written "Ã¼": tokens that are whole characters are decoded, the mark of a leading space
    stays. Other vocabularies stay as they are.

    Args:
        tokens: V token strings.
    """
    byte_of = _byte_alphabet()
    marked = sum(token.startswith("Ġ") for token in tokens)
    if marked <= len(tokens) // 50:
        return list(tokens)
    return [_decoded(token, byte_of) for token in tokens]


def _decoded(token: str, byte_of: dict[str, int]) -> str:
    """A byte-level token as text; as it is where it is no whole text (or a special token)."""
    try:
        text = bytes(byte_of[letter] for letter in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return token
    return "".join(_KEPT.get(letter, letter) for letter in text)


def _byte_alphabet() -> dict[str, int]:
    """The letter that stands for each byte: itself where it prints, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(rest)}


def names_of(vocabulary: Sequence[str], ids: np.ndarray) -> list[str]:
    """Token strings of ids [E]; rows that a padded output layer adds are shown as <id>."""
    return [vocabulary[i] if i < len(vocabulary) else f"<{i}>" for i in ids.tolist()]
