"""What several commands ask and print: one JSON document, or text."""

from __future__ import annotations

import argparse
import json
from typing import Any


def print_json(document: object) -> None:
    """A document for machines."""
    print(json.dumps(document, indent=1, ensure_ascii=False))


def print_summary(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    """One JSON document, or a listing."""
    from kdcache.report.text import listing

    if arguments.json:
        print_json(summary)
    else:
        print(listing(summary))
    return 0


def print_recipe(arguments: argparse.Namespace, recipe: Any) -> int:
    """The resolved recipe as YAML, or as JSON."""
    from kdcache.recipe import dump_recipe, recipe_tree

    if arguments.json:
        print_json(recipe_tree(recipe))
    else:
        print(dump_recipe(recipe), end="")
    return 0


def needs(arguments: argparse.Namespace, option: str) -> str:
    """An option that is required unless the recipe is only printed."""
    value = getattr(arguments, option)
    if value is None:
        arguments.error(f"the following arguments are required: --{option}")
    return str(value)
