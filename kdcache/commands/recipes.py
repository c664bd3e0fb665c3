"""`kdcache recipes`: list the built-in ones."""

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
    add_command(parsers, "recipes", run, "list the built-in recipes", "kdcache recipes")


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """List the built-in recipes."""
    from kdcache.recipe import builtin_names, load_recipe
    from kdcache.report.text import table

    rows = [(name, load_recipe(name).description) for name in builtin_names()]
    if arguments.json:
        print_json([{"name": name, "description": text} for name, text in rows])
    else:
        print(table(("name", "description"), rows))
    return 0
