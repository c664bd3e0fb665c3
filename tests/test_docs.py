"""What the pages show must be what the code takes."""

import re
from pathlib import Path

import pytest
import yaml

from kdcache.recipe import parse_recipe

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    (path.name, block)
    for path in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_recipes_in_the_docs_are_recipes(page, block):
    recipe = parse_recipe(yaml.safe_load(block), where=page)
    assert recipe.dump.signals or recipe.train.objective


@pytest.mark.parametrize("name", ["tour.yaml", "tour_seventh.yaml"])
def test_the_tours_recipes_are_recipes(name):
    assert parse_recipe(yaml.safe_load((DOCS / name).read_text("utf-8"))).dump.signals


def test_links_between_pages_lead_somewhere():
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
            assert (DOCS / target).exists(), f"{path.name}: {target}"
