"""`kdcache train`: train a student."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import needs, print_recipe, print_summary


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "train",
        run,
        "train a student from a cache",
        "kdcache train word-level --cache caches/deen --out runs/word-level",
        overrides="kdcache train word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument(
        "--cache",
        action="append",
        metavar="CACHE",
        help="the cache to train from, a directory or URL; of a recipe with stages given once for "
        "each, as STAGE=CACHE",
    )
    command.add_argument(
        "--out", metavar="RUN", help="the run directory; an unfinished one goes on"
    )
    command.add_argument(
        "--share",
        metavar="DIR",
        help="of a recipe with stages: train those that other runs begin with too here, once for "
        "all that name the same directory",
    )
    command.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe, and stop"
    )


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Train a student."""
    from kdcache.recipe import load_recipe
    from kdcache.recipe.stages import caches_of_stages

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_recipe:
        return print_recipe(arguments, recipe)
    given = arguments.cache or []
    if not recipe.stages:
        if arguments.share is not None:
            arguments.error(f"argument --share: {recipe.name} has no stages; leave it out")
        if len(given) > 1:
            arguments.error("argument --cache: given twice; train.caches in a recipe takes several")
        if not recipe.train.caches:
            needs(arguments, "cache")
    out = needs(arguments, "out")
    from kdcache.train.runs.loop import train
    from kdcache.train.runs.stages import train_stages

    if recipe.stages:
        summary = train_stages(recipe, caches_of_stages(recipe, given), out, arguments.share)
    else:
        summary = train(recipe, given[0] if given else None, out)
    from kdcache.train.runs.parallel import is_main

    return print_summary(arguments, summary) if is_main() else 0
