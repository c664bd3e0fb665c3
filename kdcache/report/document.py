"""A report as text, tables and pictures, written as one HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from kdcache.report import page
from kdcache.report.pictures import Picture
from kdcache.report.text import number


@dataclass(frozen=True)
class Table:
    """Plain cells; `strong` is the row in bold, and cells of `words` are no numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    strong: int | None = None
    words: bool = False

    @property
    def texts(self) -> list[list[str]]:
        """Cells as they are shown."""
        return [[number(cell) for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Code:
    """Text as it is, folded away under a summary."""

    text: str
    language: str
    summary: str


@dataclass(frozen=True)
class Labels:
    """Target tokens with the entries of their soft labels; of the HTML page alone."""

    positions: Sequence[tuple[str, Sequence[page.Entry]]]


Block = Picture | Table | Code | Labels


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: heading.
        text: what is to be seen.
        blocks: what is seen.
        note: how it was made, and what it does not say.
    """

    title: str
    text: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report; sections that stand in a list together share a row where there is room."""

    title: str
    lead: str
    rows: Sequence[Sequence[Section]]
    footer: str
    pictures: list[Picture] = field(init=False)

    def __post_init__(self) -> None:
        blocks = [block for row in self.rows for section in row for block in section.blocks]
        found = [block for block in blocks if isinstance(block, Picture)]
        object.__setattr__(self, "pictures", found)


def html(document: Document) -> str:
    """The page."""
    rows = []
    for row in document.rows:
        cards = [_card(section) for section in row]
        rows.append(cards[0] if len(cards) == 1 else page.side_by_side(*cards))
    return page.page(document.title, document.lead, rows, document.footer)


def _card(section: Section) -> str:
    body = "".join(_html_block(block) for block in section.blocks)
    return page.section(section.title, section.text, body, section.note)


def _html_block(block: Block) -> str:
    if isinstance(block, Picture):
        return block.svg
    if isinstance(block, Table):
        return page.table(block.header, block.texts, block.strong, block.words)
    if isinstance(block, Labels):
        return page.soft_labels(block.positions)
    inside = f"<summary>{escape(block.summary)}</summary>{page.preformatted(block.text)}"
    return f"<details>{inside}</details>"


def markdown(document: Document, folder: str) -> str:
    """The same as Markdown.

    Args:
        document: the report.
        folder: of the pictures, relative to the file.
    """
    parts = [f"# {document.title}", document.lead]
    for section in (section for row in document.rows for section in row):
        shown = [block for block in section.blocks if not isinstance(block, Labels)]
        if section.blocks and not shown:
            continue
        parts.append(f"## {section.title}")
        parts += [section.text] if section.text else []
        parts += [_markdown_block(block, folder) for block in shown]
        parts += [section.note] if section.note else []
    return "\n\n".join([*parts, document.footer]) + "\n"


def _markdown_block(block: Any, folder: str) -> str:
    if isinstance(block, Picture):
        return f"![{block.alt}]({folder}/{block.name}.png)"
    if isinstance(block, Table):
        rows = [
            [f"**{cell}**" if n == block.strong else cell for cell in row]
            for n, row in enumerate(block.texts)
        ]
        rule = ["---", *["---" if block.words else "---:"] * (len(block.header) - 1)]
        lines = [list(block.header), rule, *rows]
        return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
    return f"```{block.language}\n{block.text.rstrip()}\n```"


def _cell(text: str) -> str:
    """A bar would end the cell."""
    return text.replace("|", "\\|")


def write(document: Document, out: Path) -> dict[str, Any]:
    """Write page, Markdown and pictures.

    Args:
        document: the report.
        out: the page; Markdown and pictures go beside it under its name.

    Returns:
        report, markdown, pictures (their number), bytes (of the page).

    Raises:
        StorageError: the disk refused.
    """
    from kdcache.formats.stores.commit import storage_errors

    twin, folder = out.with_suffix(".md"), out.with_name(f"{out.stem}-pictures")
    text = html(document)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        for picture in document.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        out.write_text(text, encoding="utf-8")
        twin.write_text(markdown(document, folder.name), encoding="utf-8")
    return {
        "report": str(out),
        "markdown": str(twin),
        "pictures": len(document.pictures),
        "bytes": len(text.encode()),
    }
