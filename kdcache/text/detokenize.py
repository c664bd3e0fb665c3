"""Text of tokenised corpora as people write it, which GPT-2's perplexities are of."""

from __future__ import annotations

import re
from collections.abc import Callable

#: Words of a contraction that WikiText stands apart: `it 's`, `didn 't`.
_ENDINGS = "s|t|d|m|ll|re|ve"
_WIKITEXT = (
    (r" @([-,.])@ ", r"\1"),  # within a word or number
    (r"=(?: =)+", lambda match: match[0].replace(" ", "")),  # a heading's level
    (rf" '(?=(?:{_ENDINGS})\b)", "'"),
    (r"(?<=s) '(?= )", "'"),  # of many: `the players ' room`
    (r" ([,.;:!?%)\]}])", r"\1"),
    (r"([(\[{$£#]) ", r"\1"),
    (r"(?<=[0-9]) (°)", r"\1"),
    (r'" ([^"]*?) ?"', r'"\1"'),
)


def wikitext(text: str) -> str:
    """A line of WikiText with the white space taken out that its tokenisation put in.

    Words stay as they are, `<unk>` too. What was typed with a space before a mark cannot be told
    from what was not; the numbers of words are counted before this.
    """
    for pattern, by in _WIKITEXT:
        text = re.sub(pattern, by, text)
    return text.strip()


#: What `corpus.detokenize` names.
DETOKENIZERS: dict[str, Callable[[str], str]] = {"wikitext": wikitext}
