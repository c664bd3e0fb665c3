"""Completion, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kdcache.cli import main, make_parser
from kdcache.commands.completion_script import script
from kdcache.recipe import builtin_names
from kdcache.usage import command_parsers

#: Words of a line, the last to be completed, and what has to be and must not be offered.
CASES = [
    (["tr"], {"train"}, {"dump", "--help"}),
    ([""], set(command_parsers(make_parser())), {"word-level"}),
    (["train", "word-"], {"word-level", "word-level-paper"}, {"no-kd", "train"}),
    (["train", "--ca"], {"--cache"}, {"--out"}),
    (["dump", "no-kd", "--p"], {"--plan", "--processes", "--print-recipe"}, {"--out", "--plan.x"}),
    (["dump", "no-kd", "--out", "no"], {"notes.yaml"}, {"no-kd"}),
    (["train", "no"], {"no-kd", "notes.yaml"}, {"train"}),
    (["train", "no-kd", "--train.opt"], {"--train.optimizer.lr"}, {"--train.max_steps", "--out"}),
    (["inspect", "--train.opt"], set(), {"--train.optimizer.lr"}),
    (["compile", "a", "--missing", "d"], {"drop"}, {"refuse"}),
    (["verify", "--recipe", "hyb"], {"hybrid"}, {"verify"}),
    (["completion", ""], {"bash", "zsh", "fish"}, {"train"}),
]
#: Ask each shell for what it offers: bash as its readline does, zsh with what stands in for
#: its own builtins, fish by its own command.
ASK = {
    "bash": "source {script}; COMP_WORDS=(kdcache {words}); COMP_CWORD={last}; _kdcache;"
    ' printf "%s\\n" "${{COMPREPLY[@]}}"; [ ${{#COMPREPLY[@]}} -gt 0 ] || compgen -f -- {word}',
    "zsh": "compdef() {{ : }}; source {script};"
    " compadd() {{ shift; print -l -- ${{(M)@:#{word}*}} }};"
    " _files() {{ print -l -- *(N) }}; words=(kdcache {words}); CURRENT={last}+1; _kdcache",
    "fish": 'source {script}; complete -C "kdcache {line}" | string split -f1 \\t',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shells")
    (root / "files").mkdir()
    (root / "files" / "notes.yaml").touch()
    for shell in ASK:
        (root / shell).write_text(script(make_parser(), shell), encoding="utf-8")
    return root


@pytest.mark.parametrize("shell", ASK)
def test_a_shell_offers_the_words(shell: str, place: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here")
    asked = []
    for words, _, _ in CASES:
        quoted = " ".join(f'"{word}"' for word in words)
        ask = ASK[shell].format(
            script=place / shell,
            words=quoted,
            word=f'"{words[-1]}"',
            last=len(words),
            line=" ".join(words),
        )
        asked.append(f"{ask}; echo done.")
    # A line each, in one process: a shell starts more slowly than it completes.
    done = subprocess.run(
        [program, "-c", "\n".join(asked)],
        capture_output=True,
        text=True,
        check=False,
        cwd=place / "files",
    )
    assert done.stderr == ""
    answers = done.stdout.split("done.\n")[:-1]
    for (words, wanted, unwanted), answer in zip(CASES, answers, strict=True):
        offered = set(answer.split())
        assert wanted <= offered, words
        assert not unwanted & offered, words


def test_the_script_knows_every_recipe_and_option() -> None:
    for shell in ASK:
        text = script(make_parser(), shell)
        assert [name for name in builtin_names() if name not in text] == []
        for command in command_parsers(make_parser()).values():
            for option in command._option_string_actions:
                assert option.removeprefix("--").removeprefix("-") in text


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    assert "choose from" in capsys.readouterr().err
    assert main(["completion", "bash"]) == 0
    assert "_kdcache()" in capsys.readouterr().out
