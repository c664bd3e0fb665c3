"""What every section of a recipe shares: a closed, frozen base and the types of its values."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt


def _no_boolean(value: object) -> object:
    """Pydantic would read true as 1.0."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]
Device = Annotated[str, Field(description="auto (cuda, mps, then cpu) or a torch device name.")]
Rate = Annotated[Number, Field(ge=0, lt=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]
Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
