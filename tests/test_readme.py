"""The README's commands: they stand there, they parse, and the checks run the same ones."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdcache
from kdcache.cli import _parser, _split_overrides
from kdcache.recipe import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = 'pip install ".[test]" && pytest -n 2 --dist loadfile'
QUICKSTART_COMMAND = "pip install . && kdcache quickstart"


def blocks(text: str) -> list[str]:
    """Lines of the fenced blocks, continuation lines joined."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    return [line for line in fenced.replace("\\\n", " ").split("\n") if line.strip()]


def commands() -> list[str]:
    pages = [README, *(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md")))]
    return sorted({c for page in pages for c in blocks(page) if c.startswith("kdcache ")})


def test_the_two_commands_stand_in_the_readme() -> None:
    assert QUICKSTART_COMMAND in blocks(README)
    assert TEST_COMMAND in blocks(README)


def test_the_checks_run_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n")
    assert TEST_COMMAND in [line.strip() for line in lines]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    parser = _parser()
    # "..." stands for what was said before, "&" for the background.
    given = [word for word in shlex.split(command, comments=True)[1:] if word not in ("...", "&")]
    words, overrides = _split_overrides(given, parser)
    arguments = parser.parse_args(words)
    if overrides:
        assert arguments.takes_overrides
        recipe = getattr(arguments, "recipe", None) or "no-kd"
        # A file of the reader's own is as good as any recipe for what may be overridden.
        load_recipe("no-kd" if recipe.endswith(".yaml") else recipe, overrides)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_the_recipe_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_recipes.py"), "--check"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(kdcache.__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == kdcache.__version__
    assert f"## {kdcache.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
