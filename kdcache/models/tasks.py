"""Tasks of a model that has several heads: what each says."""

# C scores of a task

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

TaskKind = Literal["classification", "similarity", "ranking"]


@dataclass(frozen=True)
class Task:
    """What a head says.

    Attributes:
        kind: classification: which of C classes a text is of. similarity: a number. ranking: a
            number, the higher the more relevant the second text is to the first.
        labels: names of the classes; of a ranking two, the last is that of what is relevant; of a
            similarity none.
        range: of a similarity, the lowest and the highest number; None: any.
    """

    kind: TaskKind = "classification"
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None

    @property
    def num_scores(self) -> int:
        """C."""
        return len(self.labels) if self.kind == "classification" else 1

    @property
    def score_names(self) -> list[str]:
        """C names of its scores; of a number the name means nothing."""
        if self.kind == "classification":
            return list(self.labels)
        return [self.labels[-1] if self.labels else "score"]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Task:
        """The task of plain values, as a config has them."""
        bounds = tree.get("range")
        return cls(
            kind=tree.get("kind", "classification"),
            labels=tuple(tree.get("labels") or ()),
            range=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        tree = asdict(self)
        bounds = None if self.range is None else list(self.range)
        return tree | {"labels": list(self.labels), "range": bounds}
