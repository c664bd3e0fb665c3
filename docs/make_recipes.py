"""Write docs/recipes.md from the recipe models: `python docs/make_recipes.py [--check]`."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdcache.recipe import Recipe, builtin_names, load_recipe

PAGE = Path(__file__).parent / "recipes.md"
INTRODUCTION = """\
# Recipes

A recipe is one YAML file that says what to dump, what to train and how to score. Each command
uses its own sections, so one file can serve them all. Unknown keys, keys that stand twice and
values of the wrong type are refused with their path, and `--print-recipe` shows a recipe with
every default filled in.

On the command line any value is set by its dotted path, items of a list by number. The number
after the last item appends one. An override is checked like the file is:

```
kdcache train word-level --cache CACHE --out RUN \\
    --train.objective.1.temperature 2 \\
    --train.objective.2 '{loss: forward_kl, weight: 0.1, temperature: 4}' \\
    --train.student.config.encoder_layers 3
kdcache dump word-level --out CACHE ... --dump.signals.logits.codec '{name: topk, k: 12}'
```

Paths of files are relative to the directory that the command runs in.

A recipe may begin with `extends: OTHER`, a built-in recipe or a path beside the file, and then says
only what differs: mappings are merged key by key, lists and plain values take the place of what was
there, and so does a config of another `model_type`.

A recipe may have `stages`, trainings one after another, each with keys of a recipe that are laid
over those of the whole in the same way. `kdcache train NAME --cache STAGE=CACHE ...` trains them
all, each from the best weights of the one before. `NAME:STAGE` is one of them as a recipe of its
own, to dump for it or to train it alone. `--train.max_steps 200` sets it in all stages,
`--stages.STAGE.train.max_steps 200` in one.

Built-in recipes come at two scales: `-paper` has the sizes and the schedule that were published,
`-small` trains on a laptop. A name without an ending, as `word-level`, is the small one.

## Built in

"""


def main() -> int:
    """Write the page, or with --check say whether it is up to date."""
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/recipes.md is out of date: run python docs/make_recipes.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8", newline="\n")
    return 0


def page() -> str:
    """The whole page."""
    recipes = "".join(f"- `{name}`: {load_recipe(name).description}\n" for name in builtin_names())
    seen: dict[type[BaseModel], str] = {}
    sections = _section(Recipe, "", seen)
    return INTRODUCTION + recipes + "\n" + "\n".join(sections).rstrip() + "\n"


def _section(model: type[BaseModel], path: str, seen: dict[type[BaseModel], str]) -> list[str]:
    """A heading and a table for one model, then the same for the models in it."""
    seen[model] = path
    tag = _tag(model)
    title = (f"`{path}`" if path else "The whole") + (f" with `{tag[0]}: {tag[1]}`" if tag else "")
    lines = [f"## {title}", ""]
    if model.__doc__:
        lines += [" ".join(model.__doc__.split()), ""]
    lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
    inner: list[tuple[type[BaseModel], str]] = []
    for name, field in model.model_fields.items():
        if tag and name == tag[0]:
            continue
        members = [m for m in _members(field.annotation) if _is_model(m)]
        below = f"{path}.{name}".lstrip(".") + _suffix(field.annotation)
        inner += [(member, below) for member in members if member not in seen]
        again = [f"see `{seen[m]}`" for m in members if seen.get(m)]
        cells = [f"`{name}`", _type(field), _default(field), _meaning(field, again)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for member, below in inner:
        if member not in seen:
            lines += _section(member, below, seen)
    return lines


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _tag(model: type[BaseModel]) -> tuple[str, str] | None:
    """Key and value that tell a model from the others that could stand in its place."""
    for name, field in model.model_fields.items():
        values = get_args(field.annotation)
        if len(values) == 1 and get_origin(field.annotation) is Literal:
            return name, str(values[0])
    return None


def _members(kind: Any) -> list[Any]:
    """The types inside lists, dicts and unions."""
    origin = get_origin(kind)
    if origin in (Annotated, list):
        return _members(get_args(kind)[0])
    if origin is dict:
        return _members(get_args(kind)[1])
    if origin in (Union, types.UnionType):
        return [m for a in get_args(kind) for m in _members(a)]
    return [kind]


def _suffix(kind: Any) -> str:
    """What stands for the name or number of an entry."""
    return {dict: ".NAME", list: ".N"}.get(get_origin(kind), "")


def _type(field: FieldInfo) -> str:
    """Values a key takes, in a few words."""
    limits = []
    for item in field.metadata:
        for word, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if getattr(item, word, None) is not None:
                limits.append(f"{sign} {getattr(item, word):g}")
    return " ".join([_words(field.annotation), ", ".join(limits)]).strip()


def _words(kind: Any) -> str:
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_words(arguments[0])}"
        return f"[{', '.join(_words(a) for a in arguments)}]"
    if origin is dict:
        return f"name: {_words(arguments[1])}"
    if origin in (Union, types.UnionType):
        words = [_words(a) for a in arguments if a is not type(None)]
        null = ["null"] if type(None) in arguments else []
        return " or ".join([*dict.fromkeys(words), *null])
    names = {str: "text", int: "integer", float: "number", bool: "true, false", Any: "any value"}
    return "section" if _is_model(kind) else names[kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "null"
    if isinstance(value, BaseModel):
        tag = _tag(type(value))
        return f"`{tag[1]}`" if tag else "its defaults"
    if isinstance(value, dict):
        return ", ".join(f"`{key}`" for key in value) or "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return "`[" + ", ".join(str(item) for item in value) + "]`"
    return f"`{value}`" if value != "" else "empty"


def _meaning(field: FieldInfo, again: list[str]) -> str:
    text = field.description or ""
    for item in field.metadata:
        text = text or getattr(item, "description", None) or ""
    if again:
        text = f"{text.rstrip('.')}: {', '.join(again)}." if text else f"{', '.join(again)}."
    return text.replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(main())
