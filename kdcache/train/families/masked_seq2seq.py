"""Students that read a text with a segment masked, and write the segment: MASS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.errors import RecipeError
from kdcache.formats.signals import SignalRecord
from kdcache.recipe import TrainSection
from kdcache.train.families.masked_lm import MaskedLM
from kdcache.train.losses.masked_objective import SegmentObjective
from kdcache.train.losses.objective import Objective
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.masked_seq2seq import SegmentDistillation


class MaskedSeq2Seq(MaskedLM):
    """Its encoder reads train.source with a segment masked, its decoder predicts the segment."""

    def objective(self, section: TrainSection, signals: Mapping[str, SignalRecord]) -> Objective:
        """See `SegmentObjective`."""
        if section.source != section.target:
            raise RecipeError(
                f"train.source is {section.source!r} and train.target {section.target!r}; a "
                "masked_seq2seq predicts segments of what it reads: give both the same stream"
            )
        return SegmentObjective(section.objective, signals, section.source)

    def distillation(self, student: Any, objective: Objective, seed: int) -> Distillation:
        """See `SegmentDistillation`."""
        return SegmentDistillation(student, objective, seed)
