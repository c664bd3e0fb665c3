"""Recipes of several stages: each stage becomes a whole recipe, and overrides find theirs."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from kdcache.errors import RecipeError
from kdcache.recipe.files import merged, read_file
from kdcache.recipe.tree import override

STAGES = "stages"
#: Sections that stages share, each as far as it does not say otherwise.
_SECTIONS = ("corpus", "dump", "train", "evaluate")


def whole_stages(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose stages are whole recipes: its own sections with each stage's laid over them.

    What has no stages stays as it is, and so does what was made whole before.

    Args:
        tree: plain values of a recipe.
    """
    stages = tree.get(STAGES)
    if not stages or not isinstance(stages, Mapping):
        return dict(tree)
    shared = {key: tree[key] for key in _SECTIONS if key in tree}
    found: dict[str, Any] = {}
    for name, own in stages.items():
        if not isinstance(own, Mapping):
            found[name] = own  # the models say what is wrong
            continue
        # Copies, or an override of one stage would change what all share.
        shared_by_all = {"name": f"{tree.get('name')}:{name}", **deepcopy(shared)}
        found[name] = merged(shared_by_all, deepcopy(dict(own)))
    return {key: value for key, value in tree.items() if key not in _SECTIONS} | {STAGES: found}


def read_recipe(name_or_path: str) -> tuple[dict[str, Any], str | None]:
    """Plain values of a recipe file with its stages made whole, or of one of its stages.

    Args:
        name_or_path: see `read_file`; with `:STAGE` behind it, that stage as a recipe of its own.

    Returns:
        The values, and the stage that they are of; None for the whole.

    Raises:
        RecipeError: there is no such file or stage, or it is no recipe.
    """
    try:
        return whole_stages(read_file(name_or_path)), None
    except RecipeError:
        base, colon, stage = name_or_path.rpartition(":")
        if not colon or not stage.isidentifier():
            raise
    stages = whole_stages(read_file(base)).get(STAGES)
    stages = stages if isinstance(stages, Mapping) else {}
    if stage not in stages:
        has = f"it has {', '.join(stages)}" if stages else "it has none"
        raise RecipeError(f"{name_or_path}: there is no stage {stage!r}; {has}")
    if not isinstance(stages[stage], Mapping):
        raise RecipeError(f"{name_or_path}: should be a section of keys (found {stages[stage]!r})")
    return dict(stages[stage]), stage


def override_all(tree: dict[str, Any], dotted: str, text: str, own: str | None = None) -> None:
    """Set one value in place, of every stage where the path does not name one.

    Args:
        tree: with whole stages, if any.
        dotted: see `override`.
        text: see `override`.
        own: the stage that the tree is of; None for a whole recipe.

    Raises:
        RecipeError: the path leads nowhere, or the value is not YAML.
    """
    if own is not None and dotted.startswith(f"{STAGES}."):
        stage, _, rest = dotted.removeprefix(f"{STAGES}.").partition(".")
        if stage != own or not rest:
            raise RecipeError(f"--{dotted}: the recipe is of stage {own} alone; leave it out")
        dotted = rest
    stages = tree.get(STAGES)
    if not stages or dotted.partition(".")[0] not in _SECTIONS:
        override(tree, dotted, text)
        return
    for name, stage in stages.items():
        try:
            override(stage, dotted, text)
        except RecipeError as error:
            raise RecipeError(
                f"{error} (in stage {name}; --{STAGES}.{name}.{dotted} sets one stage alone)"
            ) from None
