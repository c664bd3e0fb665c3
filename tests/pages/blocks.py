"""The fenced blocks of README and docs, and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
#: Pages whose commands are held to the code.
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the headings it stands under, its language and its text."""

    page: str
    section: str
    language: str
    text: str
    before: str  # the line above the fence


@dataclass(frozen=True)
class Command:
    """A command line of a block, continuation lines joined and comments left out."""

    page: str
    section: str
    text: str


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = read(page)
    found = []
    for match in _FENCE.finditer(text):
        above = text[: match.start()]
        headings = re.findall(r"^## (.+)$", above, re.MULTILINE)
        section = headings[-1] if headings else ""
        found.append(Block(page, section, match[1], match[2], above.rstrip("\n").split("\n")[-1]))
    return found


def commands(page: str) -> list[Command]:
    """Lines of a page's shell blocks that somebody would type, in order.

    Of a block in which lines begin with `$ ` those alone are typed, the others were printed.
    """
    found = []
    for block in blocks(page):
        if block.language not in ("", "sh", "bash", "console"):
            continue
        lines = block.text.replace("\\\n", " ").split("\n")
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        for line in lines:
            typed = re.sub(r"\s+#\s.*$", "", line).strip()
            if typed:
                found.append(Command(page, block.section, re.sub(r"\s{2,}", " ", typed)))
    return found
