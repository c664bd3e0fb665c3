"""Links on the pages: files and headings are there; the web is named by few addresses."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.pages.blocks import PAGES, ROOT, read

LINK = re.compile(r"\]\(([^)\s]+)\)")
#: Addresses outside the repository, each with its reason.
OUTSIDE = {
    "https://filesystem-spec.readthedocs.io": "the library that reads URLs",
}
MORE_PAGES = ["CHANGELOG.md"]


def prose(text: str) -> str:
    """A page without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`", lambda code: re.sub(r"[\[\]()]", "", code[0]), text)


def anchors(text: str) -> set[str]:
    """Names of a page's headings as code hosts make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        number, single = 1, name
        while name in found:
            name, number = f"{single}-{number}", number + 1
        found.add(name)
    return found


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES])
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(prose(read(page))):
        if re.match(r"[a-z]+:", target):
            assert target in OUTSIDE, f"{page}: {target}"
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}"


def test_every_page_is_in_the_index_and_the_index_in_the_readme() -> None:
    index = LINK.findall(read("docs/README.md"))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages - set(index) == set()
    assert "docs/README.md" in LINK.findall(read("README.md"))


def test_anchors_are_those_of_code_hosts() -> None:
    text = "# A `b`: c\n\n## LightPAFF, GPT-2\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n"
    assert anchors(text) == {"a-b-c", "lightpaff-gpt-2", "same", "same-1"}


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_whole_and_fetch_nothing(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert not re.search(r"href=|url\((?!#)|<script", path.read_text(encoding="utf-8"))
