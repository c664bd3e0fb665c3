"""`kdcache sweep`: train many students."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_json, print_summary
from kdcache.commands.values import count, positive


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "sweep",
        run,
        "train a student for every point of a grid or list",
        "kdcache sweep word-level --cache caches/deen --out sweeps/deen \\\n"
        "      --sweep.grid.train.objective.1.temperature 1,2,4 \\\n"
        "      --sweep.grid.train.seed 1,2,3",
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
        "--out", required=True, metavar="DIR", help="where all goes; finished runs stay as they are"
    )
    command.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="runs side by side, one GPU each where there are GPUs (default 1)",
    )
    command.add_argument(
        "--metric", metavar="NAME", help="that the table is sorted by (default dev_loss)"
    )
    only = command.add_mutually_exclusive_group()
    only.add_argument(
        "--list", action="store_true", help="print each run's commands, one run a line, and stop"
    )
    only.add_argument(
        "--index", type=count, metavar="N", help="do this run alone, from 0, as an array's task"
    )


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Train a student for every point of a grid or list."""
    from kdcache.sweep.runner import check_failures, plan_sweep, run_one, run_sweep
    from kdcache.sweep.runner import commands as commands_of
    from kdcache.sweep.table import outcome_text

    planned = plan_sweep(
        arguments.recipe, arguments.cache, arguments.out, overrides, arguments.metric
    )
    if arguments.list:
        lines = commands_of(planned)
        if arguments.json:
            print_json(
                [
                    {"name": run.name, "settings": run.settings, "command": line}
                    for run, line in zip(planned.runs, lines, strict=True)
                ]
            )
        else:
            print("\n".join(lines))
        return 0
    if arguments.index is not None:
        return print_summary(arguments, run_one(planned, arguments.index))
    found = run_sweep(planned, arguments.jobs)
    if arguments.json:
        print_json(found)
    else:
        print(outcome_text(found))
    check_failures(found)
    return 0
