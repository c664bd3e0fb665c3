"""`kdcache report`: draw a page."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_summary


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "report",
        run,
        "draw a page with pictures of a run, a sweep or a cache",
        "kdcache report sweeps/temperature",
    )
    command.add_argument("path", metavar="PATH", help="a run, a sweep, or a cache (or its URL)")
    command.add_argument(
        "--out",
        metavar="FILE",
        help="the page; its Markdown twin goes beside it (default report.html in a run or sweep, "
        "NAME-report.html here of a cache)",
    )
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="RUN",
        help="a run to show beside, as one without KD; may be given again",
    )
    command.add_argument(
        "--cache", metavar="CACHE", help="where a run's cache lies now; as the run says else"
    )


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Draw a report of a run, a sweep or a cache."""
    from kdcache.report.report import write_report

    written = write_report(
        arguments.path, out=arguments.out, beside=arguments.beside, cache=arguments.cache
    )
    return print_summary(arguments, written)
