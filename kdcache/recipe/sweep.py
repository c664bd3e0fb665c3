"""The part of a recipe that says which runs a sweep makes of it."""

from __future__ import annotations

import builtins
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from kdcache.recipe.section import Section
from kdcache.recipe.tree import read_yaml


def _values(value: object) -> object:
    """A list, which may be one value alone or, as on the command line, `1, 2, 4`."""
    if isinstance(value, str):
        return read_yaml(f"[{value}]")
    return value if isinstance(value, list) else [value]


Values = Annotated[list[Any], BeforeValidator(_values), Field(min_length=1)]
Settings = Annotated[dict[str, Any], Field(min_length=1)]
#: What an item of the list is called, among its paths.
NAME = "name"


class SweepSection(Section):
    """Runs that differ in some fields: a grid, a list, or every item of a list on the whole grid.

    Any field below `train` can be swept by its dotted path, items of a list by number, and with
    `dump.signals.NAME.codec` the codec of a logits signal: the cache is re-encoded for each. Of a
    recipe with stages `stages.NAME.train...` is a field of one, `stages.NAME.skip` leaves it out.
    """

    grid: dict[str, Values] = Field(
        default_factory=dict,
        description="Dotted path to the values that it takes, as `train.seed: [1, 2, 3]`: every "
        "combination is a run, the last path moving fastest. A codec of null is the cache's own.",
    )
    list: builtins.list[Settings] = Field(
        default_factory=builtins.list,
        description="Settings that belong together, each a mapping of dotted paths to values. With "
        "a grid too, each of them is run on the whole grid. Where each has a `name` beside its "
        "paths, tables show that in their place.",
    )
    metric: str = Field(
        "dev_loss",
        description="What the table is sorted by: dev_loss, bleu, chrf, accuracy, or any number of "
        "a run's summary or evaluation by its dotted key. Losses, perplexities, errors and seconds "
        "are better the lower they are, all else the higher.",
    )

    @model_validator(mode="after")
    def _fits(self) -> SweepSection:
        if not self.grid and not self.list:
            raise ValueError("give grid, list, or both")
        if NAME in self.grid:
            raise ValueError(f"grid.{NAME}: items of a list have names, a grid has paths alone")
        names = [settings.get(NAME) for settings in self.list if NAME in settings]
        if names and (len(names) < len(self.list) or len(set(map(str, names))) < len(names)):
            raise ValueError(f"list: names are {names}; give each item its own, or none any")
        for number, settings in enumerate(self.list):
            if both := sorted(set(settings) & set(self.grid)):
                raise ValueError(f"list.{number} and grid both set {both[0]}; keep one")
        return self
