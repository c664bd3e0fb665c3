"""Every command on README's and docs' pages is run, or it says here why it is not."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from kdcache.cli import _parser, _split_overrides, main
from kdcache.recipe import load_recipe
from kdcache.usage import command_parsers, parse
from tests.pages.blocks import PAGES, Command, commands
from tests.pages.scenes import NOT_OURS, PARSED, SCENES, Scene, mapped, own_words, program_of
from tests.pages.small import shrunk
from tests.pages.world import make_world

COMMANDS = [command for page in PAGES for command in commands(page)]


def scenes_of(command: Command) -> list[Scene]:
    """The scenes that run a command."""
    return [s for s in SCENES if s.page == command.page and s.section in (None, command.section)]


def is_parsed_only(command: Command) -> bool:
    words = own_words(command.text)
    return words is not None and any(" ".join(["kdcache", *words[1]]).startswith(p) for p in PARSED)


def test_every_command_has_one_who_answers_for_it() -> None:
    ours = "|".join(command_parsers(_parser()))
    used = set()
    for command in COMMANDS:
        if own_words(command.text) is None:
            program = program_of(command.text)
            used.add(program)
            # A line that is no command at all: a listing, a formula, what was printed.
            assert program or not re.search(rf"\bkdcache (?:{ours})\b", command.text), command
        elif not is_parsed_only(command):
            assert len(scenes_of(command)) == 1, command
    assert set(NOT_OURS) <= used
    assert sum(own_words(c.text) is not None for c in COMMANDS) > 110
    for scene in SCENES:
        assert any(scene in scenes_of(c) for c in COMMANDS if own_words(c.text)), scene
    for start in PARSED:
        assert any(start in c.text for c in COMMANDS), start


def test_every_command_of_ours_parses_and_its_recipe_resolves(tmp_path: Path, monkeypatch) -> None:
    make_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        found = own_words(command.text)
        if found is None:
            continue
        words, overrides = _split_overrides(mapped(found[1], ""), _parser())
        arguments = parse(_parser(), words)
        assert arguments.takes_overrides or not overrides, command
        recipe = getattr(arguments, "recipe", None)
        if recipe or overrides:
            assert load_recipe(recipe or "no-kd", overrides).name, command


def make_recipes(root: Path) -> None:
    """The reader's own recipes that pages name."""
    for name in ("deen.yaml", "monolingual.yaml", "tour.yaml", "tour_seventh.yaml"):
        (root / name).write_text("extends: no-kd\n", encoding="utf-8")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    make_world(root)
    return root


@pytest.fixture(scope="module")
def large_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    make_world(root, more=True)
    return root


@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(
            scene,
            id=" ".join(filter(None, (scene.page, scene.section))),
            marks=[pytest.mark.slow] if scene.slow else [],
        )
        for scene in SCENES
    ],
)
def test_the_commands_run(
    scene: Scene, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = request.getfixturevalue("large_world" if scene.slow else "small_world")
    folder = Path(shutil.copytree(world, tmp_path / "world"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    fsspec.filesystem("memory").store.clear()
    for text in scene.before:
        play(text, scene, monkeypatch)
    for command in COMMANDS:
        if scenes_of(command) == [scene] and not is_parsed_only(command):
            for start, name in scene.removed:
                if command.text.startswith(start):
                    shutil.rmtree(folder / name)
            play(command.text, scene, monkeypatch)


def play(text: str, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command in this process, the shell's own in a shell."""
    found = own_words(text)
    if found is None:
        if program_of(text) in ("find", "sha256sum"):
            subprocess.run(["bash", "-c", f"set -o pipefail; {text}"], check=True)
        return
    variables, words = found
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        small = shrunk(mapped(words, scene.dots))
        print("$ kdcache", shlex.join(small), file=sys.stderr)
        assert main(small) == 0, text
