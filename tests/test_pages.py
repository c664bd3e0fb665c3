"""Every command on README's and docs' pages is run, or it says here why it is not."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

import kdcache
from kdcache.cli import main, make_parser, split_overrides
from kdcache.dump.teacher import Teacher
from kdcache.recipe import load_recipe
from kdcache.recipe.teacher import TeacherSection
from kdcache.usage import command_parsers, parse
from tests.pages.blocks import PAGES, Command, blocks, commands
from tests.pages.scenes import (
    NOT_OURS,
    PARSED,
    PARSED_SECTIONS,
    SCENES,
    Scene,
    mapped,
    own_words,
    program_of,
)
from tests.pages.small import shrunk
from tests.pages.world import VOCAB_SIZE, make_world

COMMANDS = [command for page in PAGES for command in commands(page)]


def scenes_of(command: Command) -> list[Scene]:
    """The scenes that run a command."""
    return [s for s in SCENES if s.page == command.page and s.section in (None, command.section)]


def is_parsed_only(command: Command) -> bool:
    words = own_words(command.text)
    if (command.page, command.section) in PARSED_SECTIONS:
        return True
    return words is not None and any(" ".join(["kdcache", *words[1]]).startswith(p) for p in PARSED)


def test_every_command_has_one_who_answers_for_it() -> None:
    ours = "|".join(command_parsers(make_parser()))
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
    assert set(PARSED_SECTIONS) <= {(c.page, c.section) for c in COMMANDS}


def test_every_command_of_ours_parses_and_its_recipe_resolves(tmp_path: Path, monkeypatch) -> None:
    make_recipes(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        found = own_words(command.text)
        if found is None:
            continue
        words, overrides = split_overrides(mapped(found[1], ""), make_parser())
        arguments = parse(make_parser(), words)
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
    if scene.prepare is not None:
        scene.prepare(folder)
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


PYTHON = [
    block
    for page in PAGES
    for block in blocks(page)
    if block.language == "python" and not block.before.startswith("<!--")
]


@pytest.mark.parametrize("page", sorted({block.page for block in PYTHON}))
def test_python_on_the_pages_runs(
    page: str, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a page in one namespace; those taken from files are held to them by test_docs."""
    monkeypatch.chdir(labelled)
    names = NAMES_GIVEN.get(page, dict)()
    for block in PYTHON:
        if block.page == page:
            # Batches go on for ever; here they end.
            exec(block.text.replace("seed=1)", "seed=1, epochs=1)"), names)
    CHECKS.get(page, bool)(names)


@pytest.fixture(scope="module")
def labelled(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with caches/deen (signals logits and all_logits), caches/a and caches/b."""
    folder = Path(shutil.copytree(small_world, tmp_path_factory.mktemp("python") / "world"))
    words = ["dump", "word-level", "--out", str(folder / "caches" / "deen")]
    words += ["--dump.teacher.path", str(folder / "models" / "deen")]
    words += ["--dump.signals.all_logits", "{kind: logits, codec: {name: full, values: float32}}"]
    words += [f"--corpus.fields.src={folder / 'train.de'}"]
    words += [f"--corpus.fields.tgt={folder / 'train.en'}"]
    assert main(shrunk(words)) == 0
    for name in ("a", "b"):
        shutil.copytree(folder / "caches" / "deen", folder / "caches" / name)
    return folder


def loss_names() -> dict[str, Any]:
    """What the page of losses takes for given: labels of a batch, and random students."""
    [step] = list(kdcache.batches("caches/deen", signals=["logits", "all_logits"], epochs=1))[:1]
    [batch] = step.micro
    labels = batch.signals["logits"]
    token_ids, vocab_size = batch.streams["tgt"].flat, labels.spec.vocab_size
    torch.manual_seed(1)
    names: dict[str, Any] = {name: getattr(kdcache.losses, name) for name in kdcache.losses.__all__}
    return names | {
        "labels": labels,
        "full_labels": batch.signals["all_logits"],
        "token_ids": token_ids,
        "vocab_size": vocab_size,
        "logits": torch.randn(len(token_ids), vocab_size, requires_grad=True),
        "mask": torch.ones(len(token_ids), dtype=torch.bool),
        "hidden": torch.randn(len(token_ids), 8, requires_grad=True),
        "head": torch.nn.Linear(8, vocab_size),
        "student": torch.randn(5, 8),
        "teacher": torch.randn(5, 8),
        "projection": torch.nn.Linear(8, 8),
        "row_weight": torch.full((5,), 0.2),
    }


def student_names() -> dict[str, Any]:
    """A student that says the same of every token."""
    bias = torch.zeros(VOCAB_SIZE, requires_grad=True)
    return {"student": lambda batch: bias.expand(len(batch.streams["tgt"].flat), -1), "bias": bias}


def teacher_names() -> dict[str, Any]:
    """A model of the reader's own."""
    model = SimpleNamespace(
        labels={"sentiment": ["bad", "good"]},
        heads={"sentiment": lambda states: states * 2},
        encode=lambda ids, mask: ids * mask,
    )
    return {"load_my_model": lambda path: model}


def check_teacher(names: dict[str, Any]) -> None:
    section = TeacherSection(
        path="models/deen", kind="custom", model_class="x:TwoHeads", options={"head": "sentiment"}
    )
    teacher = names["TwoHeads"].load(section, needs_attention=False)
    assert isinstance(teacher, Teacher)
    assert teacher.labels == ["bad", "good"]
    assert teacher.record.digest
    assert teacher.scores(SimpleNamespace(ids=3, mask=1)) == 6


def check_losses(names: dict[str, Any]) -> None:
    assert names["total"].item() > 0
    assert names["loss"].item() > 0
    assert names["hidden"].grad.abs().sum() > 0


def check_readme(names: dict[str, Any]) -> None:
    assert names["bias"].grad.abs().sum() > 0
    assert names["state"]["seed"] == 1


def check_compiled(names: dict[str, Any]) -> None:
    assert 0 < kdcache.open_cache("caches/both").num_samples < 40


def check_loop(names: dict[str, Any]) -> None:
    assert names["step"].num_tokens > 0
    assert names["batch"].streams["tgt"].ids.dim() == 2


NAMES_GIVEN = {
    "README.md": student_names,
    "docs/losses.md": loss_names,
    "docs/own_loop.md": lambda: {"rank": 0, "world": 1},
    "docs/signals.md": teacher_names,
}
CHECKS = {
    "README.md": check_readme,
    "docs/compile.md": check_compiled,
    "docs/losses.md": check_losses,
    "docs/own_loop.md": check_loop,
    "docs/signals.md": check_teacher,
}
