"""The tree of plain values under a recipe: YAML in and out, and dotted overrides of it.

YAML is read strictly: a key that stands twice is refused, and plain words are what they
look like (YAML 1.1 makes a number of 12:30, a boolean of `no`, and a string of 1e-4).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from kdcache.errors import RecipeError

_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = (
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    (_MERGE, r"<<", "<"),
)
#: Below it stand dotted paths.
_GRID = "sweep.grid."


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, and guesses no types."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read back as a string."""


for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            continue
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"line {line}: a key is a word, found a list or mapping")
        key = loader.construct_object(key_node)
        if key in seen:
            raise RecipeError(f"line {line}: key {key!r} stands twice; keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(text: str) -> Any:
    """Plain values of one YAML document.

    Raises:
        RecipeError: with the line of what is wrong.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(f"{line}not YAML: {problem}") from None


def write_yaml(tree: dict[str, Any]) -> str:
    """YAML that `read_yaml` gives back, keys in their order."""
    text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return str(text)


def override(tree: dict[str, Any], dotted: str, text: str) -> None:
    """Set one value of a tree in place by its dotted path.

    Args:
        tree: plain values, as `read_yaml` gives them.
        dotted: see `set_value`.
        text: see `read_value`.

    Raises:
        RecipeError: the path leads nowhere, or the value is not YAML.
    """
    set_value(tree, dotted, read_value(dotted, text))


def read_value(dotted: str, text: str) -> Any:
    """The plain value of an override.

    Args:
        dotted: its path, for the error.
        text: the value, as YAML.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return read_yaml(text)
    except RecipeError as error:
        raise RecipeError(
            f"--{dotted} {text!r}: {str(error).removeprefix('line 1: ')}; "
            "quote a text with special characters"
        ) from None


def set_value(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value of a tree in place by its dotted path.

    Args:
        tree: plain values.
        dotted: keys joined by dots; items of a list by number, from 0. The number after the
            last item appends one. Sections that are not there are made. What follows
            `sweep.grid.` is one key.
        value: plain.

    Raises:
        RecipeError: the path leads nowhere.
    """
    keys = dotted.split(".")
    if dotted.startswith(_GRID):
        keys = [*_GRID.split(".")[:-1], dotted.removeprefix(_GRID)]
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        at = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            node = node[_item_number(node, key, dotted, at, append=False)]
        elif isinstance(node, dict):
            if node.get(key) is None:
                if keys[depth + 1].isdigit():
                    raise RecipeError(
                        f"--{dotted}: the recipe has no {at}; give the list whole: --{at} '[...]'"
                    )
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise RecipeError(f"--{dotted}: {at} is {node!r}, which has no {keys[depth + 1]!r}")
    if isinstance(node, list):
        number = _item_number(node, keys[-1], dotted, dotted, append=True)
        node[number : number + 1] = [value]
    else:
        node[keys[-1]] = value


def _item_number(node: list[Any], key: str, dotted: str, at: str, append: bool) -> int:
    last = len(node) - (0 if append else 1)
    if not key.isdecimal() or int(key) > last:
        numbers = f"0 to {len(node) - 1}" if node else "none"
        more = f" ({len(node)} appends one)" if append else ""
        raise RecipeError(f"--{dotted}: no item {at}; items there: {numbers}{more}")
    return int(key)
