"""`kdcache evaluate`: score a run or a model."""

from __future__ import annotations

import argparse
from pathlib import Path
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
        "evaluate",
        run,
        "translate and score a run or any encoder-decoder model",
        "kdcache evaluate runs/word-level --against runs/no-kd \\\n"
        "      --evaluate.corpus.fields.src test.de --evaluate.corpus.fields.tgt test.en",
        overrides="kdcache train word-level",
    )
    command.add_argument("run_path", metavar="RUN", help="a run, or a transformers directory")
    command.add_argument("--recipe", metavar="RECIPE", help="score as it says; the run's own else")
    command.add_argument("--against", metavar="RUN2", help="an evaluated run to compare with")
    command.add_argument("--out", metavar="DIR", help="where results go; the run itself else")


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Score a run or a model."""
    from kdcache.recipe import load_recipe, parse_recipe
    from kdcache.recipe.tree import override
    from kdcache.train.runs.run import last_stage

    section, path = None, last_stage(Path(arguments.run_path))
    own = path / "recipe.yaml"
    if arguments.recipe or (overrides and own.is_file()):
        section = load_recipe(arguments.recipe or str(own), overrides).single().evaluate
    elif overrides:
        tree: dict[str, Any] = {"name": "evaluate"}
        for dotted, text in overrides:
            override(tree, dotted, text)
        section = parse_recipe(tree, where="overrides").evaluate
    from kdcache.train.evaluation.evaluate import evaluate

    result = evaluate(path, section=section, against=arguments.against, out=arguments.out)
    return print_summary(arguments, result)
