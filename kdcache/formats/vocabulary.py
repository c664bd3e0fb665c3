"""The token strings of a vocabulary, as a cache keeps them."""

from __future__ import annotations

import json

from kdcache.errors import FormatError


def decode_tokens(data: bytes, where: str, vocab_size: int) -> list[str]:
    """The token string of every id, from the bytes of a tokens.json.

    Args:
        data: bytes of the file.
        where: how messages call it.
        vocab_size: how many there must be.

    Raises:
        FormatError: they are not.
    """
    try:
        tokens = json.loads(data.decode("utf-8"))
        json.dumps(tokens, ensure_ascii=False).encode("utf-8")  # a lone surrogate fails here
    except (ValueError, RecursionError):
        raise FormatError(f"{where}: not JSON in UTF-8") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise FormatError(f"{where}: expected a list of strings")
    if len(tokens) != vocab_size:
        raise FormatError(f"{where}: {len(tokens)} tokens, expected {vocab_size}")
    return tokens
