"""What the declarations of all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from kdcache.commands.values import condition, told

#: Dotted path and text of each value of the recipe that the command line sets.
Overrides = list[tuple[str, str]]

_HOW_TO_OVERRIDE = (
    "overrides:\n"
    "  Any value of the recipe is set by its dotted path: --train.max_steps 200;\n"
    "  items of a list by number: --train.objective.0.weight 0.3. All values:\n"
    "  {command} --print-recipe      (docs/recipes.md: their meaning)"
)


def add_command(
    parsers: Any,
    name: str,
    run: Callable[[argparse.Namespace, Overrides], int],
    summary: str,
    example: str,
    overrides: str | None = None,
) -> argparse.ArgumentParser:
    """Add one command with its example, `--json`, and how to override where it can be.

    Args:
        parsers: of the command line.
        name: the command.
        run: does it; returns the exit code.
        summary: what it does, as the list of commands says it.
        example: a use of it.
        overrides: the command whose `--print-recipe` shows all values; None if it takes none.

    Returns:
        The parser, for the command's own arguments.
    """
    how = f"\n\n{_HOW_TO_OVERRIDE.format(command=overrides)}" if overrides else ""
    command: argparse.ArgumentParser = parsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}{how}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.set_defaults(run=run, takes_overrides=overrides is not None, error=command.error)
    return command


def add_filter(command: argparse.ArgumentParser) -> None:
    """Add `--filter`, which may be given several times.

    Args:
        command: whose `filter` it becomes, a list of conditions.
    """
    command.add_argument(
        "--filter",
        action="append",
        default=[],
        type=told(condition),
        metavar="CONDITION",
        help="keep samples that fulfil all: 'logits.loss < 3' (mean nats), 'logits.entropy > 1', "
        "'tgt.length <= 50', 'beams.bleu >= 20'",
    )


def add_bleu_tokenizer(group: Any) -> None:
    """Add `--bleu-tokenizer`.

    Args:
        group: of arguments, or a command.
    """
    group.add_argument(
        "--bleu-tokenizer",
        default="13a",
        metavar="NAME",
        help="for sentence BLEU (default 13a; zh, ja-mecab, char)",
    )
