"""Codecs: how a teacher's distribution over V ids becomes a few entries, as records.

A codec here is its name, its parameters and what follows from them for the bytes on
disk. Selection on the device is `kdcache.dump.select`, decoding `kdcache.train.labels`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

Values = Literal["uint8", "float16", "float32"]

#: Range in nats of a uint8 code that no codec narrows, and of the gold log-prob.
WIDE_RANGE_NATS = 25.0


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
        """Weight of a drawn entry (times its count where counts are stored)."""
        raise AssertionError("no drawn entries")

    @abstractmethod
    def max_exact(self, vocab_size: int) -> int:
        """Most exact entries a position can have."""

    def max_drawn(self, vocab_size: int) -> int:
        """Most drawn entries a position can have."""
        return 0


class ThresholdCodec(_Codec):
    """Keep every id with t >= c exactly; draw the others systematically with weight c."""

    name: Literal["threshold"] = "threshold"
    c: FractionFloat = Field(
        1 / 16,
        gt=0,
        lt=1,
        description="Ids with at least this probability are kept exactly; each of the others "
        "is drawn with probability t/c and then weighs c. Smaller c: less noise, more bytes. "
        "A number or a fraction such as 1/16.",
    )

    @property
    def range_nats(self) -> float:
        return -math.log(self.c)

    @property
    def has_drawn(self) -> bool:
        return True

    @property
    def drawn_weight(self) -> float:
        return self.c

    def max_exact(self, vocab_size: int) -> int:
        return min(vocab_size, math.floor(1 / self.c) + 1)

    def max_drawn(self, vocab_size: int) -> int:
        return min(vocab_size, math.floor(1 / self.c) + 1)


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
