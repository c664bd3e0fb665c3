"""`kdcache inspect`: show a cache."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_json
from kdcache.commands.values import count


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "inspect",
        run,
        "show what a cache holds and how it was made",
        "kdcache inspect caches/deen --samples 5",
    )
    command.add_argument("cache", metavar="CACHE", help="the cache, a directory or URL")
    command.add_argument(
        "--samples", type=count, default=3, metavar="N", help="decoded samples shown (default 3)"
    )


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Show what a cache holds."""
    from kdcache.report.inspect import inspect_cache
    from kdcache.report.inspection_text import inspection_text

    inspection = inspect_cache(arguments.cache, num_samples=arguments.samples)
    if arguments.json:
        print_json(inspection)
    else:
        print(inspection_text(inspection))
    return 0
