"""Where training on several caches stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kdcache.errors import IdentityError, TrainingError
from kdcache.train.batches.order import OrderState


@dataclass(frozen=True)
class MixState:
    """Where training on several caches stands.

    Attributes:
        digest: of the weights and of all that fixes the batches of each cache.
        seed: recipe seed.
        counts: global batches drawn from each cache so far.
        orders: where the stream of each cache stands.
    """

    digest: str
    seed: int
    counts: tuple[int, ...]
    orders: tuple[OrderState, ...]

    @property
    def step(self) -> int:
        """Global batches drawn so far."""
        return sum(self.counts)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> MixState:
        """The state whose fields are given, as `dataclasses.asdict` has them.

        Raises:
            TrainingError: they are not those of a state.
        """
        try:
            return cls(
                digest=str(found["digest"]),
                seed=int(found["seed"]),
                counts=tuple(map(int, found["counts"])),
                orders=tuple(map(OrderState.from_dict, found["orders"])),
            )
        except (ValueError, TypeError, KeyError):
            raise TrainingError(
                f"order state: not a state of several caches: {str(found)[:80]!r}"
            ) from None

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    def check(self, digest: str, seed: int) -> None:
        """Refuse to go on in another order.

        Raises:
            IdentityError: if digest or seed differ, with both sides.
        """
        if (self.digest, self.seed) != (digest, seed):
            raise IdentityError(
                f"order state: of caches mixed by {self.digest} and seed {self.seed}, these caches "
                f"and this recipe give {digest} and {seed}; resume with the same caches in the "
                "same order, weights, batch size, window and seed, or start a new run"
            )


def state_from_dict(found: Mapping[str, Any]) -> OrderState | MixState:
    """The state of one cache or of several, from its fields.

    Raises:
        TrainingError: they are not those of a state.
    """
    several = isinstance(found, Mapping) and "orders" in found
    return MixState.from_dict(found) if several else OrderState.from_dict(found)
