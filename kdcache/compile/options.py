"""What a compilation is asked to do, and the words it is asked with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from kdcache.errors import RecipeError
from kdcache.formats.codec import Codec

Missing = Literal["refuse", "drop"]
Choice = Literal["best", "reference", "sampled"]
Quantity = Literal["loss", "entropy", "length", "bleu", "number"]

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_CONDITION = re.compile(
    r"\s*([a-z][a-z0-9_]*)\.([a-z]+)\s*(<=|>=|==|!=|<|>)\s*([-+0-9.eE/_]+)\s*",
)
_CODEC: TypeAdapter[Codec] = TypeAdapter(Codec)


@dataclass(frozen=True)
class Condition:
    """What a sample must fulfil to stay: `name.quantity operator number`.

    Attributes:
        name: of the signal (of the stream, for length; of the field, for number) that is looked at.
        quantity: what of it: a logits signal's mean teacher `loss` or `entropy` in nats, a
            stream's `length` in tokens, the sentence `bleu` of a beams signal's best hypothesis,
            the `number` that a field's text says.
        operator: <, <=, >, >=, == or !=.
        number: the other side.
    """

    name: str
    quantity: Quantity
    operator: str
    number: float

    def __str__(self) -> str:
        number = repr(self.number).removesuffix(".0")
        return f"{self.name}.{self.quantity} {self.operator} {number}"


@dataclass(frozen=True)
class Targets:
    """Hypotheses that become the targets.

    Attributes:
        beams: the beams signal.
        choice: `best`: the first; `reference`: the one of the highest sentence BLEU against the
            reference, the better one of equals; `sampled`: one at random, by the softmax of the
            teacher's log-probs.
    """

    beams: str
    choice: Choice


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Everything that `kdcache compile` does; each of its parts does nothing by default.

    They are applied in this order: filters, ids, fraction or count; mix; targets; codecs; rename;
    shard_tokens.

    Attributes:
        signals: names of the signals to keep, of the caches; None: all.
        missing: what becomes of a sample without a signal that others have: `refuse`, or `drop`
            the sample.
        filters: conditions that a sample must fulfil, all of them, as `logits.loss < 3`.
        ids: file of the samples to keep: a sample_id in 32 hex digits, or a corpus row, a line.
        fraction: share of the samples to keep, each by a hash of its id.
        count: number of samples to keep, those of the smallest hashes.
        seed: of these hashes, of `mix` and of sampled targets.
        mix: a weight for each cache: how often its samples are taken. The fraction of a weight
            takes a part of them, chosen by a hash. None: the caches are merged.
        targets: hypotheses that become the targets, as `beams=best`; None: the targets stay.
        codecs: name of a logits signal to the codec it is re-encoded to.
        rename: name of a signal to the one it has in the output.
        shard_tokens: most tokens of a shard; None: as in the first cache.
        bleu_tokenizer: sacrebleu's tokenizer for sentence BLEU.
    """

    signals: Sequence[str] | None = None
    missing: Missing = "refuse"
    filters: Sequence[str | Condition] = ()
    ids: str | Path | None = None
    fraction: float | None = None
    count: int | None = None
    seed: int = 0
    mix: Sequence[float] | None = None
    targets: str | Targets | None = None
    codecs: Mapping[str, Any] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    shard_tokens: int | None = None
    bleu_tokenizer: str = "13a"

    @property
    def conditions(self) -> list[Condition]:
        """The filters, parsed.

        Raises:
            RecipeError: one is none.
        """
        return [parse_condition(f) if isinstance(f, str) else f for f in self.filters]

    @property
    def chosen_targets(self) -> Targets | None:
        """The targets, parsed.

        Raises:
            RecipeError: they are none.
        """
        return parse_targets(self.targets) if isinstance(self.targets, str) else self.targets

    @property
    def parsed_codecs(self) -> dict[str, Codec]:
        """Name of a signal to the codec it is re-encoded to.

        Raises:
            RecipeError: a codec is none.
        """
        return {name: parse_codec(name, tree) for name, tree in self.codecs.items()}

    def check(self, num_sources: int) -> None:
        """Refuse what cannot be meant.

        Args:
            num_sources: caches that are given.

        Raises:
            RecipeError: with the option, what it is and what was expected.
        """
        if self.fraction is not None and self.count is not None:
            raise RecipeError("compile: fraction and count are both given; keep one")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise RecipeError(f"compile: fraction is {self.fraction:g}, expected one in (0, 1]")
        for name in ("count", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"compile: {name} is {value}, expected at least 1")
        if self.missing not in get_args(Missing):
            raise RecipeError(f"compile: missing is {self.missing!r}, expected refuse or drop")
        if self.mix is not None and len(self.mix) != num_sources:
            raise RecipeError(
                f"compile: mix has {len(self.mix)} weights for {num_sources} caches; give one each"
            )
        wrong = [w for w in self.mix or () if not (math.isfinite(w) and w >= 0)]
        if wrong:
            raise RecipeError(f"compile: mix has the weight {wrong[0]:g}, expected at least 0")
        for name in self.rename.values():
            if not _NAME.fullmatch(name):
                raise RecipeError(
                    f"compile: rename to {name!r}, expected a name such as logits or logits_2"
                )


def parse_condition(text: str) -> Condition:
    """A condition from its words, as `logits.loss < 3`.

    Raises:
        RecipeError: they are none.
    """
    match = _CONDITION.fullmatch(text)
    expected = "expected one such as 'logits.loss < 3', 'tgt.length <= 50' or 'beams.bleu > 20'"
    if not match:
        raise RecipeError(f"filter {text!r}: {expected}")
    name, quantity, operator, number = match.groups()
    if quantity not in get_args(Quantity):
        known = ", ".join(get_args(Quantity))
        raise RecipeError(f"filter {text!r}: quantity {quantity!r}, expected one of {known}")
    try:
        value = float(Fraction(number) if "/" in number else number)
    except (ValueError, ZeroDivisionError):
        raise RecipeError(f"filter {text!r}: {number!r} is no number; {expected}") from None
    return Condition(name, quantity, operator, value)  # type: ignore[arg-type]


def parse_targets(text: str) -> Targets:
    """Targets from their words, as `beams=best`.

    Raises:
        RecipeError: they are none.
    """
    name, equals, choice = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or choice not in get_args(Choice):
        raise RecipeError(
            f"targets {text!r}: expected the name of a beams signal and one of "
            f"{', '.join(get_args(Choice))}, as in beams=best"
        )
    return Targets(name, choice)  # type: ignore[arg-type]


def parse_codec(signal: str, tree: object) -> Codec:
    """A codec from the plain values of a recipe.

    Raises:
        RecipeError: they are none.
    """
    try:
        return _CODEC.validate_python(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(map(str, fault["loc"]))
        reason = fault["msg"].removeprefix("Value error, ")
        raise RecipeError(
            f"codec of {signal!r}: {f'{path}: ' if path else ''}{reason}; expected one such as "
            "{name: threshold, c: 1/8}"
        ) from None


def split_pair(text: str, option: str, example: str) -> tuple[str, str]:
    """Both sides of NAME=VALUE.

    Args:
        text: the words.
        option: what they are of, for the message.
        example: of such words.

    Raises:
        RecipeError: there is no `=`, or no name before it.
    """
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name.strip()) or not value.strip():
        raise RecipeError(f"{option} {text!r}: expected NAME=VALUE, as in {example}")
    return name.strip(), value.strip()
