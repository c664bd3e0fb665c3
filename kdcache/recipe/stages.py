"""Recipes of several stages: each is a whole recipe, and overrides and caches find theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from kdcache.errors import RecipeError
from kdcache.recipe.files import merged, read_file
from kdcache.recipe.tree import read_value, set_value

if TYPE_CHECKING:
    from kdcache.recipe import Recipe

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
        dotted: see `set_value`.
        text: see `read_value`.
        own: the stage that the tree is of; None for a whole recipe.

    Raises:
        RecipeError: the path leads nowhere, or the value is not YAML.
    """
    if own is not None and dotted.startswith(f"{STAGES}."):
        stage, _, rest = dotted.removeprefix(f"{STAGES}.").partition(".")
        if stage != own or not rest:
            raise RecipeError(f"--{dotted}: the recipe is of stage {own} alone; leave it out")
        dotted = rest
    set_all(tree, dotted, read_value(dotted, text))


def set_all(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value in place, of every stage where the path does not name one.

    Args:
        tree: with whole stages, if any.
        dotted: see `set_value`.
        value: plain; each stage has a copy.

    Raises:
        RecipeError: the path leads nowhere.
    """
    stages = tree.get(STAGES)
    if not stages or dotted.partition(".")[0] not in _SECTIONS:
        set_value(tree, dotted, deepcopy(value))
        return
    for name, stage in stages.items():
        try:
            set_value(stage, dotted, deepcopy(value))
        except RecipeError as error:
            raise RecipeError(
                f"{error} (in stage {name}; --{STAGES}.{name}.{dotted} sets one stage alone)"
            ) from None


def caches_of_stages(recipe: Recipe, given: Sequence[str]) -> dict[str, str | None]:
    """The cache of every stage that is not left out; None where the recipe names it itself.

    Args:
        recipe: with stages.
        given: STAGE=CACHE for each of the others; those of stages that are left out do not count.

    Raises:
        RecipeError: a stage has none or two, or there is no such stage.
    """
    found: dict[str, str | None] = {}
    for word in given:
        stage, equals, cache = word.partition("=")
        if not equals or stage not in recipe.stages:
            raise RecipeError(
                f"--cache {word}: {recipe.name} has stages; give each its own: "
                f"{' '.join(f'--cache {name}=CACHE' for name in recipe.kept)}"
            )
        if stage in found or recipe.stages[stage].train.caches:
            raise RecipeError(f"--cache {word}: stage {stage} has a cache already; keep one")
        found[stage] = cache
    for stage, own in recipe.kept.items():
        if stage not in found and not own.train.caches:
            raise RecipeError(f"stage {stage} of {recipe.name} has no cache: --cache {stage}=CACHE")
    return {stage: found.get(stage) for stage in recipe.kept}
