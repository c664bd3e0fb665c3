"""`kdcache quickstart`: the whole story."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_json


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "quickstart",
        run,
        "the whole story on a generated corpus, in minutes on a CPU",
        "kdcache quickstart --out story",
    )
    command.add_argument(
        "--out",
        default="kdcache-quickstart",
        metavar="DIR",
        help="where everything goes (default kdcache-quickstart)",
    )


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """The whole story on a generated corpus."""
    from kdcache.quickstart.outcome import summary_text
    from kdcache.quickstart.story import run as tell

    result = tell(arguments.out)
    if arguments.json:
        print_json(result)
    else:
        print(summary_text(result))
    return 0
