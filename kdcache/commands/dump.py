"""`kdcache dump`: run a teacher over a corpus, or plan to."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import needs, print_json, print_recipe, print_summary
from kdcache.commands.values import positive
from kdcache.dump.ranks import Ranks, parse_ranks


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "dump",
        run,
        "run the teacher over a corpus and write a cache",
        "kdcache dump word-level --out caches/deen \\\n      --dump.teacher.path models/deen \\\n"
        "      --corpus.fields.src train.de --corpus.fields.tgt train.en",
        overrides="kdcache dump word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument(
        "--out", metavar="CACHE", help="the cache, a directory or URL; an unfinished one goes on"
    )
    command.add_argument(
        "--rank",
        type=_rank,
        metavar="R/WORLD",
        help="make the shards R, R + WORLD, ...; else what torchrun or SLURM says",
    )
    command.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="that tokenise a large corpus (default: one for each processor core)",
    )
    command.add_argument(
        "--plan",
        action="store_true",
        help="dump a pilot of some hundred samples, say what the whole will cost, and stop",
    )
    command.add_argument(
        "--budget", type=_bytes, metavar="SIZE", help="with --plan: the cache may have 200GB, say"
    )
    command.add_argument(
        "--report", metavar="FILE", help="with --plan: write a page with pictures there"
    )
    command.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe, and stop"
    )


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Write a cache, show the recipe, or plan."""
    from kdcache.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_recipe:
        return print_recipe(arguments, recipe)
    if arguments.plan:
        return _plan(arguments, recipe)
    for option in ("budget", "report"):
        if getattr(arguments, option) is not None:
            arguments.error(f"argument --{option}: goes with --plan")
    out = needs(arguments, "out")
    from kdcache.dump.ranks import ranks_from
    from kdcache.dump.runner import dump
    from kdcache.processes import num_cores

    ranks = arguments.rank or ranks_from(os.environ)
    processes = arguments.processes or num_cores()
    return print_summary(arguments, dict(dump(recipe, out, ranks=ranks, processes=processes)))


def _plan(arguments: argparse.Namespace, recipe: Any) -> int:
    from kdcache.dump.plan import plan
    from kdcache.report.plan_text import plan_page, plan_text

    if arguments.report is not None:
        Path(arguments.report).touch()  # a page that cannot be written should fail before a pilot
    result = plan(recipe, arguments.budget)
    if arguments.json:
        print_json(result)
    else:
        print(plan_text(result))
    if arguments.report is not None:
        Path(arguments.report).write_text(plan_page(result, recipe.name), encoding="utf-8")
    return 0


def _rank(text: str) -> Ranks:
    """One of several processes, for argparse."""
    try:
        return parse_ranks(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> float:
    """A size such as 200GB or 1.5TiB, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 200GB")
    power = "kmgtp".index(match[2]) + 1 if match[2] else 0
    return float(match[1]) * (1024 if match[3] else 1000) ** power
