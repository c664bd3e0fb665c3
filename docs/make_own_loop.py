"""Puts the examples' code into own_loop.md, between the words: python docs/make_own_loop.py."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "own_loop.md"
#: A comment that names a file and what to show of it, and the code that stood below it.
PLACE = re.compile(r"(<!-- (\S+\.py) (\w+) -->\n)(?:```python\n.*?```\n)?", re.DOTALL)


def source_of(file: str, name: str) -> str:
    """A function or class at the top level of a file."""
    text = (ROOT / file).read_text("utf-8")
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            return str(ast.get_source_segment(text, node))
    raise SystemExit(f"{PAGE.name}: {file} has no {name!r}; name a function or class of it")


def main() -> None:
    """Write the page."""
    page = PAGE.read_text("utf-8")
    page = PLACE.sub(lambda at: f"{at[1]}```python\n{source_of(at[2], at[3])}\n```\n", page)
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
