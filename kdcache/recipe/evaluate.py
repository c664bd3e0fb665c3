"""The part of a recipe that says how to score what was trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt

from kdcache.recipe.corpus import CorpusSection
from kdcache.recipe.section import Device, Number, PositiveInt, Section


class PerturbSection(Section):
    """Noise on the weights of a model, and what it costs (LightPAFF, section 6.2)."""

    sigmas: list[Annotated[Number, Field(ge=0)]] = Field(
        min_length=1,
        description="Standard deviations of the noise, in units of what `over` says.",
    )
    over: Literal["mean", "mean_abs"] = Field(
        "mean",
        description="Of every named parameter by itself: its mean, as published, or the mean of "
        "its absolute values, since means are near zero.",
    )
    seeds: list[Annotated[StrictInt, Field(ge=0)]] = Field(
        default_factory=lambda: [1, 2, 3], min_length=1, description="One draw for each."
    )


class EvaluateSection(Section):
    """How `kdcache evaluate` scores."""

    corpus: CorpusSection | None = Field(None, description="The test set.")
    checkpoint: Literal["best", "averaged", "last"] = Field(
        "best", description="Which weights of a run: best on validation, averaged, or last."
    )
    num_beams: PositiveInt = Field(4, description="Beam width; 1 is greedy search.")
    length_penalty: Number = Field(
        1.0, description="Exponent of the length that a beam's score is divided by."
    )
    max_length_ratio: Number = Field(
        2.0, gt=0, description="Hypotheses stop at this many times the source tokens, plus 10."
    )
    batch_tokens: PositiveInt = Field(4096, description="Padded source tokens x beams per batch.")
    device: Device = "auto"
    bootstrap_samples: PositiveInt = Field(
        1000, description="Resamplings of the paired bootstrap between two runs."
    )
    latency_sentences: StrictInt = Field(
        50, ge=0, description="Sentences timed one at a time; 0: none."
    )
    latency_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of the text that is timed, of students that do not translate; null: "
        "128, of a causal LM 512, and never more than its positions.",
    )
    perturb: PerturbSection | None = Field(
        None, description="Score the model with noise on its weights too; null: not."
    )
