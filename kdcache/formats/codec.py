"""Codecs: how a teacher's distribution over V ids becomes a few entries, as records.

A codec here is its name, its parameters and what follows from them for the bytes on
disk. Selection on the device is `kdcache.dump.codecs.select`, decoding on it
`kdcache.labels.decoding`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, model_validator

Values = Literal["uint8", "float16", "float32"]

#: Range in nats of a uint8 code that no codec narrows, and of the gold log-prob.
WIDE_RANGE_NATS = 25.0

#: Largest range of any uint8 code, in nats: float32 probabilities reach no lower.
_WIDEST_RANGE_NATS = 80.0

#: ln of the largest vocabulary, whose ids have three bytes.
_MAX_LOG_VOCAB = 24 * math.log(2)


def _fraction(value: object) -> object:
    """Let a recipe say 1/16."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            raise ValueError("should be a number or a fraction such as 1/16") from None
    return value


FractionFloat = Annotated[float, BeforeValidator(_fraction)]


class _Codec(BaseModel):
    """What all codecs share."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    values: Values = Field(
        "uint8",
        description="How a kept log-prob is stored: uint8 (a code in sqrt(-log_prob), rounded "
        "stochastically in probability, hence unbiased), float16 or float32.",
    )

    @property
    def range_nats(self) -> float:
        """Largest -log_prob, in nats, that a uint8 code of an exact entry can say."""
        return WIDE_RANGE_NATS

    @property
    def has_exact(self) -> bool:
        """Whether positions have exact entries."""
        return True

    @property
    def has_drawn(self) -> bool:
        """Whether positions have drawn entries."""
        return False

    @property
    def has_tail(self) -> bool:
        """Whether sums over the ids outside the exact entries are stored.

        With them every temperature can be served; `full` has no tail, and `sampled` has no
        exact entries and so serves temperature 1 alone.
        """
        return True

    @property
    def drawn_weight(self) -> float:
        """Weight of a drawn entry (times its count where counts are stored).

        Where log-probs are stored with the draws it is the largest: at the temperature at which
        the id is the most probable.
        """
        raise AssertionError("no drawn entries")

    @property
    def drawn_temperatures(self) -> tuple[float, ...]:
        """Temperatures at which drawn entries are unbiased."""
        return (1.0,) if self.has_drawn else ()

    @property
    def has_drawn_log_probs(self) -> bool:
        """Whether a drawn entry stores its log-prob, from which its weights follow."""
        return False

    @property
    def drawn_range_nats(self) -> float:
        """Largest -log_prob, in nats, that a uint8 code of a drawn entry can say."""
        return WIDE_RANGE_NATS

    @abstractmethod
    def max_exact(self, vocab_size: int) -> int:
        """Most exact entries a position can have."""

    def max_drawn(self, vocab_size: int) -> int:
        """Most drawn entries a position can have."""
        return 0


class ThresholdCodec(_Codec):
    """Keep every id with t >= c exactly; draw the others systematically with weight c.

    With several temperatures the largest t over them decides. A drawn entry weighs c at the
    temperature of its largest t, and less in proportion to t at the others.
    """

    name: Literal["threshold"] = "threshold"
    c: FractionFloat = Field(
        1 / 16,
        gt=0,
        lt=1,
        description="Ids with at least this probability are kept exactly; each of the others "
        "is drawn with probability t/c and then weighs c. Smaller c: less noise, more bytes. "
        "A number or a fraction such as 1/16.",
    )
    temperatures: tuple[Annotated[FractionFloat, Field(ge=0.1, le=100)], ...] = Field(
        (1.0,),
        max_length=64,
        description="Temperatures at which the drawn entries serve, ascending, each among the "
        "signal's own. With others than 1 alone an id is kept with the largest of its "
        "probabilities at these temperatures, over c, and a drawn entry takes one byte more (or "
        "as many as `values` says) for its log-prob. Hot ones are noisy: at 5, a few draws of "
        "weight c stand for thousands of nearly equal ids.",
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            found = ", ".join(f"{t:g}" for t in self.temperatures) or "none"
            raise ValueError(f"temperatures of the codec are {found}; they must ascend, each once")
        return self

    @property
    def range_nats(self) -> float:
        # An id with t >= c at T: its log-prob is at least T ln c, less where T < 1.
        reach = -math.log(self.c)
        most = max(t * reach + max(0.0, 1 - t) * _MAX_LOG_VOCAB for t in self.temperatures)
        return min(most, max(reach, _WIDEST_RANGE_NATS))

    @property
    def has_drawn(self) -> bool:
        return True

    @property
    def drawn_temperatures(self) -> tuple[float, ...]:
        return self.temperatures

    @property
    def has_drawn_log_probs(self) -> bool:
        return self.temperatures != (1.0,)

    @property
    def drawn_range_nats(self) -> float:
        return min(WIDE_RANGE_NATS * max(1.0, self.temperatures[-1]), _WIDEST_RANGE_NATS)

    @property
    def drawn_weight(self) -> float:
        return self.c

    # Over all ids the largest probabilities sum to at most 1 for each temperature.
    def max_exact(self, vocab_size: int) -> int:
        return min(vocab_size, math.floor(len(self.temperatures) / self.c) + 1)

    def max_drawn(self, vocab_size: int) -> int:
        return min(vocab_size, math.floor(len(self.temperatures) / self.c) + 1)


class TopKCodec(_Codec):
    """Keep the k most probable ids."""

    name: Literal["topk"] = "topk"
    k: StrictInt = Field(ge=1, description="Number of ids kept at every position.")

    def max_exact(self, vocab_size: int) -> int:
        return min(self.k, vocab_size)


class NucleusCodec(_Codec):
    """Keep the fewest most probable ids whose probabilities reach p, at most k_max."""

    name: Literal["nucleus"] = "nucleus"
    p: FractionFloat = Field(gt=0, lt=1, description="Probability mass to reach.")
    k_max: StrictInt = Field(128, ge=1, description="Most ids kept at one position.")

    def max_exact(self, vocab_size: int) -> int:
        return min(self.k_max, vocab_size)


class SampledCodec(_Codec):
    """Draw n ids with replacement from the teacher (Sparse Logit Sampling)."""

    name: Literal["sampled"] = "sampled"
    n: StrictInt = Field(ge=1, le=65535, description="Number of draws at every position.")

    @property
    def has_exact(self) -> bool:
        return False

    @property
    def has_tail(self) -> bool:
        return False

    @property
    def has_drawn(self) -> bool:
        return True

    @property
    def drawn_weight(self) -> float:
        return 1 / self.n

    def max_exact(self, vocab_size: int) -> int:
        return 0

    def max_drawn(self, vocab_size: int) -> int:
        return min(self.n, vocab_size)


class FullCodec(_Codec):
    """Keep all V ids; ids are implied."""

    name: Literal["full"] = "full"

    @property
    def has_tail(self) -> bool:
        return False

    def max_exact(self, vocab_size: int) -> int:
        return vocab_size


Codec = Annotated[
    ThresholdCodec | TopKCodec | NucleusCodec | SampledCodec | FullCodec,
    Field(discriminator="name"),
]
