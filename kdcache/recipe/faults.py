"""What is wrong with a recipe, said in the file's own words.

Pydantic's error paths hold the discriminator of a union (`objective.1.forward_kl.weigth`),
which is no key of the file. Walking the models along with the path tells the two apart, and
knows which keys would have been right.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from kdcache.usage import nearest


@dataclass
class _Place:
    """Where a path of pydantic's leads.

    Attributes:
        keys: path in the file.
        parent: model that the last key belongs to, None inside plain dicts and lists.
        tag: discriminator value of that model, where it is one of several.
        siblings: the other models of that union.
    """

    keys: list[str] = field(default_factory=list)
    parent: type[BaseModel] | None = None
    tag: str | None = None
    siblings: list[type[BaseModel]] = field(default_factory=list)

    @property
    def path(self) -> str:
        return ".".join(self.keys) or "recipe"


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """Every fault with its path, on one line."""
    return "; ".join(_fault(detail, root) for detail in error.errors(include_url=False))


def _fault(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """One fault: path, what is wrong, what was found."""
    kind, found = detail["type"], detail["input"]
    place = _place(detail["loc"], root)
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{place.path}: {_unknown_key(place)}"
    if kind == "missing":
        owner = f"; {place.tag} needs it" if place.tag else ""
        return f"{place.path}: missing{owner}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        name = str(context["discriminator"]).strip("'")
        tags = list(_tags(_unwrap(_annotation(detail["loc"], root))))
        if kind == "union_tag_not_found":
            return f"{place.path}: {name} is missing; one of {', '.join(tags)}"
        tag = str(context["tag"])
        near = nearest(tag, tags) or f"; it is one of {', '.join(tags)}"
        return f"{place.path}.{name}: there is no {tag!r}{near}"
    if kind == "string_pattern_mismatch":
        return f"{place.path}: {found!r} is no name; use lower-case letters, digits and _"
    if kind in ("model_type", "model_attributes_type"):
        return f"{place.path}: should be a section of keys (found {found!r})"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = f" (found {found!r})" if isinstance(found, str | int | float) else ""
    if found is None and kind != "value_error":
        shown = " (found nothing)"
    return f"{place.path}: {message}{shown}"


def _unknown_key(place: _Place) -> str:
    """What to say of a key that its model does not have."""
    key = place.keys[-1]
    if place.parent is None:
        return "unknown key"
    known = list(place.parent.model_fields)
    where = ".".join(place.keys[:-1])
    if any(key in sibling.model_fields for sibling in place.siblings) and key not in known:
        fields = place.parent.model_fields.items()
        needed = [n for n, f in fields if f.is_required() and _word(f) is None]
        name = next(n for n, f in fields if _word(f) == place.tag)
        parts = ", ".join([f"{name}: {place.tag}", *(f"{n}: ..." for n in needed)])
        return (
            f"unknown key of {place.tag}, though another {name} has it; to change the {name}, "
            f"give the whole, as in --{where} '{{{parts}}}'"
        )
    near = nearest(key, known)
    return f"unknown key{near}" if near else f"unknown key; known here: {', '.join(known)}"


def _place(loc: Sequence[str | int], root: type[BaseModel]) -> _Place:
    """Follow one of pydantic's paths through the models."""
    place = _Place()
    node: list[Any] = [root]
    tag: str | None = None
    siblings: list[type[BaseModel]] = []
    for part in loc:
        if len(node) > 1:
            members = [member for member in node if str(part) in _tags([member])]
            tag, siblings = str(part), [member for member in node if member not in members]
            node = members or [Any]
            continue
        if part == "[key]":
            continue
        here = node[0]
        is_model = isinstance(here, type) and issubclass(here, BaseModel)
        place.parent = here if is_model else None
        place.tag, place.siblings = tag, siblings
        place.keys.append(str(part))
        node, tag, siblings = _unwrap(_child(here, part)), None, []
    return place


def _annotation(loc: Sequence[str | int], root: type[BaseModel]) -> Any:
    """The type that stands at a path of pydantic's."""
    node: list[Any] = [root]
    annotation: Any = root
    for part in loc:
        if len(node) > 1:
            node = [member for member in node if str(part) in _tags([member])]
            continue
        annotation = _child(node[0], part)
        node = _unwrap(annotation)
    return annotation


def _child(node: Any, part: str | int) -> Any:
    """Type of one key or item of a type."""
    if isinstance(node, type) and issubclass(node, BaseModel):
        known = node.model_fields.get(str(part))
        return known.annotation if known else Any
    arguments = get_args(node)
    if get_origin(node) is dict:
        return arguments[1]
    return arguments[0] if get_origin(node) in (list, tuple) else Any


def _unwrap(annotation: Any) -> list[Any]:
    """The members of a type: one, or several of a union, without None."""
    if get_origin(annotation) is Annotated:
        return _unwrap(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for a in get_args(annotation) if a is not type(None) for m in _unwrap(a)]
    return [annotation]


def _tags(members: Iterable[Any]) -> Iterable[str]:
    """Discriminator values of the models of a union: what their one-word field may be."""
    for member in members:
        if isinstance(member, type) and issubclass(member, BaseModel):
            words = (_word(known) for known in member.model_fields.values())
            yield from (word for word in words if word is not None)


def _word(known: FieldInfo) -> str | None:
    """The one word that a field may be; None where it may be more."""
    words = get_args(known.annotation)
    return str(words[0]) if get_origin(known.annotation) is Literal and len(words) == 1 else None
