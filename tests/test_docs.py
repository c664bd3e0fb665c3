"""What the pages show must be what the code takes."""

import ast
import re
from pathlib import Path

import pytest

from kdcache.recipe import parse_recipe
from kdcache.recipe.tree import read_yaml

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = [
    (path.name, block)
    for path in sorted(DOCS.glob("*.md"))
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_recipes_in_the_docs_are_recipes(page, block):
    recipe = parse_recipe(read_yaml(block), where=page)
    assert recipe.dump.signals or recipe.train.objective or recipe.stages


@pytest.mark.parametrize("name", ["tour.yaml", "tour_seventh.yaml"])
def test_the_tours_recipes_are_recipes(name):
    assert parse_recipe(read_yaml((DOCS / name).read_text("utf-8"))).dump.signals


#: Code that a page takes from a file: the file, and a function or class at its top level.
SHOWN = re.compile(r"<!-- (\S+\.py) (\w+) -->\n```python\n(.*?)```", re.DOTALL)


def test_code_that_is_taken_from_a_file_is_what_stands_there():
    """`python docs/make_own_loop.py` puts it right."""
    text = (DOCS / "own_loop.md").read_text("utf-8")
    found = SHOWN.findall(text)
    assert len(found) == len(re.findall(r"<!-- \S+\.py", text)) == 9
    for file, name, shown in found:
        source = (DOCS.parent / file).read_text("utf-8")
        parts = [
            ast.get_source_segment(source, node)
            for node in ast.parse(source).body
            if getattr(node, "name", None) == name
        ]
        assert parts == [shown.rstrip("\n")], f"{file}: {name}"


def test_python_in_the_docs_is_python():
    for path in DOCS.glob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
            compile(block, path.name, "exec")


#: A file of the package and, behind it, what of it is meant.
CODE = re.compile(r"`(kdcache/[\w/]+\.py)`((?:[,; ]|and )*(?:`[\w.]+`(?:, | and )?)*)")


def test_code_that_equations_name_is_there():
    found = CODE.findall((DOCS / "systems.md").read_text("utf-8"))
    assert len(found) > 40
    for file, behind in found:
        defined: set[str] = set()
        for node in ast.walk(ast.parse((DOCS.parent / file).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined.add(node.target.id)
        for name in re.findall(r"`([\w.]+)`", behind):
            assert set(name.split(".")) <= defined, f"{file}: {name}"
