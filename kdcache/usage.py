"""Bad usage told in one line that says what to do, with the nearest word that would have done."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import NoReturn

_LISTED = "`kdcache --help` lists them"


def command_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of every command by its name.

    Args:
        parser: of the whole command line.
    """
    [action] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def nearest(word: str, among: Iterable[str]) -> str:
    """`; did you mean X?` with the word most like the one given, or nothing.

    Args:
        word: what stood there.
        among: what could have stood there.
    """
    near = difflib.get_close_matches(word, list(among), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command line without its overrides.

    Args:
        parser: of the whole command line.
        words: what stood behind `kdcache`.

    Raises:
        SystemExit: with code 2, after one line on stderr says what is wrong; or with 0 after help.
    """
    found = command_parsers(parser)
    if not words:
        _leave(parser, f"no command given; {_LISTED}, `kdcache quickstart` shows them at work")
    if words[0] not in found and words[0] not in parser._option_string_actions:
        kind = "option" if words[0].startswith("-") else "command"
        near = nearest(words[0], [*found, *parser._option_string_actions])
        _leave(parser, f"no {kind} {words[0]!r}{near or ';'} {_LISTED}")
    arguments, rest = parser.parse_known_args(words)
    for word in rest:
        option = word.split("=")[0]
        if option.startswith("--"):
            near = nearest(option, found[arguments.command]._option_string_actions)
            more = f"`kdcache {arguments.command} --help` lists them"
            arguments.error(f"no option {option}{near or ';'} {more}")
    if rest:
        arguments.error(f"unexpected {rest[0]!r}; it takes no more words")
    return arguments


def _leave(parser: argparse.ArgumentParser, line: str) -> NoReturn:
    """One line alone: the usage of the whole would say less than it."""
    parser.exit(2, f"{parser.prog}: {line}\n")
