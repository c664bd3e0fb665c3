"""The README's commands: they stand there, they parse, and the checks run the same ones."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kdcache

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = 'pip install ".[test]" && pytest -n 2 --dist loadfile'
QUICKSTART_COMMAND = "pip install . && kdcache quickstart"


def blocks(text: str) -> list[str]:
    """Lines of the fenced blocks, continuation lines joined."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    return [line for line in fenced.replace("\\\n", " ").split("\n") if line.strip()]


def test_the_two_commands_stand_in_the_readme() -> None:
    assert QUICKSTART_COMMAND in blocks(README)
    assert TEST_COMMAND in blocks(README)


def test_the_checks_run_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n")
    assert TEST_COMMAND in [line.strip() for line in lines]


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
