"""Recipe files: the built-in ones by name, and those that extend another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError
from kdcache.recipe.tree import read_yaml
from kdcache.usage import nearest

_BUILTIN = Path(__file__).parent.parent / "recipes"
#: Ending of the recipes that a name without a scale means.
_DEFAULT_SCALE = "-small"


def builtin_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in _BUILTIN.glob("*.yaml"))


def short_names() -> list[str]:
    """What built-in recipes may be called: their names, and those of the small scale without it."""
    names = builtin_names()
    return sorted({*names, *(name.removesuffix(_DEFAULT_SCALE) for name in names)})


def read_file(name_or_path: str) -> dict[str, Any]:
    """Plain values of a recipe file, on top of those of the recipe that it extends.

    Mappings are merged key by key; lists and plain values take the place of what was there, and so
    does a model's config of another `model_type`.

    Args:
        name_or_path: a YAML file, or the name of a built-in recipe.

    Raises:
        RecipeError: there is no such file, it is no mapping in YAML, or it extends itself.
    """
    return _read(name_or_path, Path(), ())


def _read(name_or_path: str, folder: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe file.

    Args:
        name_or_path: what `extends` says, or the user.
        folder: that a path is relative to.
        below: files that extend this one.
    """
    path, shown = _find(name_or_path, folder), name_or_path
    if path in below:
        raise RecipeError(f"{below[0]}: extends itself, by way of {path}; take one `extends` out")
    if below:
        shown = f"{below[-1]}: extends {name_or_path}"
    if not path.is_file():
        near = nearest(name_or_path, short_names())
        raise RecipeError(
            f"{shown}: no such file and no built-in recipe of that name{near or ';'} "
            "`kdcache recipes` lists them"
        )
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: not UTF-8 at byte {error.start}") from None
    except RecipeError as error:
        raise RecipeError(f"{shown}: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{shown}: a recipe is a mapping, found {type(tree).__name__}")
    if "extends" not in tree:
        return tree
    base = tree.pop("extends")
    if not isinstance(base, str):
        raise RecipeError(
            f"{shown}: extends is {base!r}; expected a built-in recipe or a path beside the file"
        )
    return merged(_read(base, path.parent, (*below, path)), tree)


def _find(name_or_path: str, folder: Path) -> Path:
    """The file that a name or a path means; what is there comes before what is built in."""
    path = folder / name_or_path
    if not path.is_file():
        for name in (name_or_path, name_or_path + _DEFAULT_SCALE):
            if name in builtin_names():
                return _BUILTIN / f"{name}.yaml"
    return path


def merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with another laid over it: mappings key by key, all else as a whole.

    A config of another model type is laid over nothing: keys of one model mean nothing of another.
    """
    found = dict(base)
    for key, value in own.items():
        under = found.get(key)
        if isinstance(under, dict) and isinstance(value, dict) and not _other_model(under, value):
            found[key] = merged(under, value)
        else:
            found[key] = value
    return found


def _other_model(base: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether these are configs of models of two types."""
    return own.get("model_type", base.get("model_type")) != base.get("model_type")
