"""Scripts that complete kdcache's words in bash, zsh and fish, made from its own parser.

They hold every word they may offer, so that a key press starts no Python: commands, options,
choices, names of the built-in recipes and dotted paths of overrides. Everything else is a file.
"""

from __future__ import annotations

import argparse
import shlex
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from kdcache.recipe import Recipe
from kdcache.recipe.files import short_names
from kdcache.usage import command_parsers


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: as it is written, `--out`.
        meaning: its help.
        takes_value: whether a word follows it.
        choices: words that may follow, none where any may.
    """

    name: str
    meaning: str
    takes_value: bool
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """What may stand behind one command.

    Attributes:
        meaning: its summary.
        options: its options.
        words: of its arguments without a name, where they are a choice or a recipe.
        overrides: whether dotted paths may follow.
    """

    meaning: str
    options: tuple[Option, ...]
    words: tuple[str, ...]
    overrides: bool


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a shell.

    Args:
        parser: of the whole command line.
        shell: `bash`, `zsh` or `fish`.
    """
    return _SCRIPTS[shell](commands_of(parser), override_paths())


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Command]:
    """Every command with what may follow it.

    Args:
        parser: of the whole command line.
    """
    found = {}
    for name, command in command_parsers(parser).items():
        options, words = [], []
        for action in command._actions:
            if action.option_strings:
                choices = short_names() if action.dest == "recipe" else action.choices or ()
                option = action.option_strings[-1]
                options.append(Option(option, action.help or "", action.nargs != 0, tuple(choices)))
            elif action.dest == "recipe":
                words += short_names()
            else:
                words += action.choices or ()
        meaning = (command.description or "").rstrip(".")
        overrides = bool(command.get_default("takes_overrides"))
        found[name] = Command(meaning, tuple(options), tuple(words), overrides)
    return found


def override_paths() -> tuple[str, ...]:
    """Dotted paths of the recipe's values, those inside lists and named entries left out."""
    return tuple(sorted(set(_paths(Recipe, ""))))


def _paths(model: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        below = f"{path}.{name}".lstrip(".")
        inner = [m for m in _members(field.annotation) if _is_model(m)]
        for member in inner:
            yield from _paths(member, below)
        if not inner and "." in below:
            yield below


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _members(kind: Any) -> list[Any]:
    """The types inside unions; a list or mapping of sections has names nobody can list."""
    if get_origin(kind) is Annotated:
        return _members(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [m for a in get_args(kind) for m in _members(a)]
    return [kind]


def _joined(words: tuple[str, ...] | list[str]) -> str:
    """Words in one pair of quotes: none of them holds a blank or a quote."""
    return shlex.quote(" ".join(words))


# bash and zsh share a table: for a command (and an option before the word) the words to offer.


def _table(commands: dict[str, Command]) -> list[str]:
    """Lines that set `flags`, `values` and `dotted` of a command; of its option, `values`."""
    lines = ['    case "$command" in', f"    '') values={_joined(list(commands))}"]
    lines.append("        flags='--help --version' ;;")
    for name, command in commands.items():
        flags = [option.name for option in command.options]
        lines.append(f"    {name}) values={_joined(command.words)} flags={_joined(flags)}")
        lines.append(f"        dotted={'1' if command.overrides else ''} ;;")
    lines += ["    esac", '    case "$command $previous" in']
    for name, command in commands.items():
        for option in command.options:
            if option.choices:
                lines.append(f"    '{name} {option.name}') values={_joined(option.choices)} ;;")
            elif option.takes_value:
                lines.append(f"    '{name} {option.name}') values='' ;;")
    return [*lines, "    esac"]


_COMMON = """\
    case "$current" in
    --*.*) [ -n "$dotted" ] && offered="$paths" || offered='' ;;
    -*) offered="$flags" ;;
    *) offered="$values" ;;
    esac"""


def _bash(commands: dict[str, Command], paths: tuple[str, ...]) -> str:
    lines = [
        '# bash: eval "$(kdcache completion bash)"',
        "_kdcache() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
        "    local command='' values='' flags='' dotted='' offered='' word",
        f"    local paths={_joined([f'--{path}' for path in paths])}",
        '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        '        case "$word" in -*) ;; *) command="$word"; break ;; esac',
        "    done",
        *_table(commands),
        _COMMON,
        '    COMPREPLY=($(compgen -W "$offered" -- "$current"))',
        "    # Where nothing is offered bash itself completes files (`-o default`).",
        "    local IFS=$'\\n'",
        '    if [ -n "$command" ] && [ -n "$values" ]; then',
        '        case "$current" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$current")) ;; esac',
        "    fi",
        "}",
        "complete -o default -o filenames -F _kdcache kdcache",
    ]
    return "\n".join(lines) + "\n"


def _zsh(commands: dict[str, Command], paths: tuple[str, ...]) -> str:
    lines = [
        "#compdef kdcache",
        '# zsh: eval "$(kdcache completion zsh)", below compinit',
        "_kdcache() {",
        '    local current="${words[CURRENT]}" previous="${words[CURRENT-1]}"',
        "    local command='' values='' flags='' dotted='' offered='' word",
        f"    local paths={_joined([f'--{path}' for path in paths])}",
        '    for word in "${(@)words[2,CURRENT-1]}"; do',
        '        case "$word" in -*) ;; *) command="$word"; break ;; esac',
        "    done",
        *_table(commands),
        _COMMON,
        "    compadd -- ${=offered}",
        '    if [ -n "$command" ]; then',
        '        case "$current" in -*) ;; *) _files ;; esac',
        "    fi",
        "}",
        "compdef _kdcache kdcache",
    ]
    return "\n".join(lines) + "\n"


def _fish(commands: dict[str, Command], paths: tuple[str, ...]) -> str:
    lines = [
        "# fish: kdcache completion fish | source",
        "complete -c kdcache -n __fish_use_subcommand -f",
        "complete -c kdcache -n __fish_use_subcommand -l help",
        "complete -c kdcache -n __fish_use_subcommand -l version",
    ]
    for name, command in commands.items():
        seen = f"complete -c kdcache -n '__fish_seen_subcommand_from {name}'"
        meaning = _fish_quoted(command.meaning)
        lines.append(f"complete -c kdcache -n __fish_use_subcommand -a {name} -d {meaning}")
        if command.words:
            lines.append(f"{seen} -a {_joined(command.words)}")
        for option in command.options:
            line = f"{seen} -l {option.name.removeprefix('--')} -d {_fish_quoted(option.meaning)}"
            line += " -r" if option.takes_value else ""
            lines.append(line + (f" -a {_joined(option.choices)}" if option.choices else ""))
    takes = " ".join(name for name, command in commands.items() if command.overrides)
    dotted = (
        f"'__fish_seen_subcommand_from {takes}; and string match -q -- \"--*.*\" (commandline -ct)'"
    )
    lines.append(f"complete -c kdcache -n {dotted} -a {_joined([f'--{path}' for path in paths])}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    """A string of fish, where a backslash in single quotes is one of two escapes."""
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


_SCRIPTS: dict[str, Callable[[dict[str, Command], tuple[str, ...]], str]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
