"""Messages of a conversation, as the raw text of a corpus field: canonical JSON.

A message is an object with `role` (text) and `content` (text, or null), and whatever else its
chat template reads. Canonical: keys sorted, no spaces, nothing escaped that need not be, so the
same conversation is the same text, and has the same sample id, however its file was written.
"""

from __future__ import annotations

import json
from typing import Any

Messages = list[dict[str, Any]]


def canonical(value: object) -> str:
    """The text of some messages; of none, no text.

    Raises:
        ValueError: they are no messages; says what they are.
    """
    if fault := _fault(value):
        raise ValueError(fault)
    if not value:
        return ""
    # What a template reads is JSON, which has neither NaN nor Infinity.
    options: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "allow_nan": False}
    return json.dumps(value, ensure_ascii=False, **options)


def parse(text: str) -> Messages:
    """The messages of a text.

    Raises:
        ValueError: it holds none; says what it is.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not the JSON of messages") from None
    if fault := _fault(value):
        raise ValueError(fault)
    if not value:
        raise ValueError("it holds no message")
    return list(value)


def _fault(value: object) -> str | None:
    """Why a value is no list of messages."""
    if not isinstance(value, list):
        return f"expected a list of messages, found {_kind(value)}"
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            return f"message {number} (from 0) is {_kind(message)}, expected an object"
        for key, kinds in (("role", str), ("content", str | None)):
            if key not in message:
                return f"message {number} (from 0) has no {key!r}; it has {sorted(message)}"
            if not isinstance(message[key], kinds):
                return (
                    f"{key!r} of message {number} (from 0) should be text, found "
                    f"{_kind(message[key])}"
                )
    return None


def _kind(value: object) -> str:
    """JSON's word for a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
