"""Chat templates: messages to the tokens of a tokenizer, and which of them the assistant wrote."""

from __future__ import annotations

import re
from typing import Any

from kdcache.errors import CorpusError, ModelError
from kdcache.text import messages as chats
from kdcache.text.messages import Messages

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

#: Some templates write today's date, and the same recipe must give the same bytes tomorrow: on
#: every day it is 26 July 2024, the date that Llama's templates fall back on.
_DATE = {
    "%Y": "2024",
    "%y": "24",
    "%m": "07",
    "%-m": "7",
    "%B": "July",
    "%b": "Jul",
    "%d": "26",
    "%-d": "26",
    "%e": "26",
    "%A": "Friday",
    "%a": "Fri",
    "%H": "00",
    "%M": "00",
    "%S": "00",
}
_FIXED_DATE = (
    "{%- macro strftime_now(format) %}{{- format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    + " -}}{% endmacro %}\n"
)


class ChatTemplate:
    """The chat template of one tokenizer.

    A token of the assistant is one that a template with a `{% generation %}` block says is; under
    another template, one of the text that an assistant's message adds to the prompt before it.
    """

    def __init__(self, backend: Any, path: str) -> None:
        """Take the template of a tokenizer.

        Args:
            backend: tokenizer of transformers.
            path: where it came from, for messages.

        Raises:
            ModelError: it has no chat template, or does not know which characters its tokens are.
        """
        try:
            template = backend.get_chat_template()
        except ValueError:
            raise ModelError(
                f"{path}: its tokenizer has no chat template; expected one for a stream with "
                "`template: chat`"
            ) from None
        if not backend.is_fast:
            raise ModelError(
                f"{path}: its tokenizer does not say which characters a token is of, expected a "
                "fast one for a stream with `template: chat`"
            )
        self._backend = backend
        self._marks_generation = bool(_GENERATION.search(template))
        self._template = (_FIXED_DATE if "strftime_now" in template else "") + template

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of one conversation.

        Args:
            text: of a corpus field, see `kdcache.text.messages`; without messages if it is empty.

        Returns:
            Token ids, and 1 for each that the assistant wrote, 0 for the others.

        Raises:
            CorpusError: it holds no messages, the template refuses them, or it cannot be told what
                the assistant wrote.
        """
        if not text or text.isspace():
            return [], []
        try:
            messages = chats.parse(text)
        except ValueError as error:
            raise CorpusError(f"no messages: {error}") from None
        if self._marks_generation:
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            encoded = self._apply(messages, **options, tokenizer_kwargs={"verbose": False})
            return encoded["input_ids"], encoded["assistant_masks"]
        return self._encode_by_prefixes(messages)

    def _encode_by_prefixes(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Find what the assistant wrote by rendering up to each message and beyond it."""
        whole: str = self._apply(messages, tokenize=False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise CorpusError(
                    "the assistant speaks first, so there is no prompt before it; remove its "
                    "message, or use a template with a {% generation %} block"
                )
            prompt: str = self._apply(messages[:number], tokenize=False, add_generation_prompt=True)
            until: str = self._apply(messages[: number + 1], tokenize=False)
            if not (until.startswith(prompt) and whole.startswith(until)):
                raise CorpusError(
                    f"the chat template writes message {number} (from 0) otherwise once more "
                    "follow, so what the assistant wrote cannot be told; use a template with a "
                    "{% generation %} block"
                )
            spans.append((len(prompt), len(until)))
        encoded = self._backend(
            whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        mask = [0] * len(encoded["input_ids"])
        for start, stop in spans:
            inside = [
                t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < stop and b > start
            ]
            if inside:
                # Tokens of no characters between two of the assistant's are the assistant's.
                mask[inside[0] : inside[-1] + 1] = [1] * (inside[-1] + 1 - inside[0])
        return encoded["input_ids"], mask

    def _apply(self, messages: Messages, **options: Any) -> Any:
        """What transformers makes of some messages; its errors in one line."""
        try:
            return self._backend.apply_chat_template(
                messages, chat_template=self._template, **options
            )
        except Exception as error:
            # A template is a program of its own: it raises what it likes.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise CorpusError(f"the chat template refuses the messages: {reason}") from None
