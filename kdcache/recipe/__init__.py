"""Recipes: one YAML file that says what to dump, what to train and how to score.

A recipe is a tree of frozen, documented models. Unknown keys, duplicate keys and wrong
types are refused with their path. Dotted overrides (`--train.objective.0.weight 0.3`)
edit the YAML tree before it is validated, so an override is checked like the file is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, StrictBool, ValidationError, model_validator

from kdcache.errors import RecipeError
from kdcache.recipe.corpus import AugmentSection, CorpusSection, TaskSection
from kdcache.recipe.dump import (
    DumpSection,
    PretrainedTokenizer,
    SentencePieceTokenizer,
    StreamSection,
    TokenizerSection,
    WordPieceTokenizer,
    signal_streams,
)
from kdcache.recipe.evaluate import EvaluateSection, PerturbSection
from kdcache.recipe.faults import describe
from kdcache.recipe.files import builtin_names
from kdcache.recipe.objective import (
    AttentionMSETerm,
    ClassifierTerm,
    CrossEntropyTerm,
    ForwardKLTerm,
    HiddenCosineTerm,
    HiddenMSETerm,
    HiddenTerm,
    JensenShannonTerm,
    LabelCrossEntropyTerm,
    LabelMSETerm,
    LayerPair,
    LayersTerm,
    LogitMSETerm,
    MaskedKLTerm,
    ReverseKLTerm,
    SampleWeight,
    ScoreKLTerm,
    ScoreMSETerm,
    SoftTerm,
    TaskLossTerm,
    Term,
    TermSection,
    TotalVariationTerm,
    ValueSchedule,
    WalkedTerm,
)
from kdcache.recipe.section import Identifier, Section
from kdcache.recipe.signals import (
    AttentionSignal,
    BeamsSignal,
    ClassesSignal,
    HiddenSignal,
    LogitsSignal,
    MasksSignal,
    Signal,
)
from kdcache.recipe.stages import override_all, read_recipe, whole_stages
from kdcache.recipe.sweep import SweepSection
from kdcache.recipe.teacher import TeacherSection
from kdcache.recipe.train import (
    CacheShare,
    CheckpointSection,
    GateSection,
    KeptLayers,
    OptimizerSection,
    Replicas,
    ScheduleSection,
    StudentSection,
    TaskHead,
    TrainSection,
    ValidationSection,
)
from kdcache.recipe.tree import write_yaml

__all__ = [
    "AttentionMSETerm",
    "AttentionSignal",
    "AugmentSection",
    "BeamsSignal",
    "CacheShare",
    "CheckpointSection",
    "ClassesSignal",
    "ClassifierTerm",
    "CorpusSection",
    "CrossEntropyTerm",
    "DumpSection",
    "EvaluateSection",
    "ForwardKLTerm",
    "GateSection",
    "HiddenCosineTerm",
    "HiddenMSETerm",
    "HiddenSignal",
    "HiddenTerm",
    "JensenShannonTerm",
    "KeptLayers",
    "LabelCrossEntropyTerm",
    "LabelMSETerm",
    "LayerPair",
    "LayersTerm",
    "LogitMSETerm",
    "LogitsSignal",
    "MaskedKLTerm",
    "MasksSignal",
    "OptimizerSection",
    "PerturbSection",
    "PretrainedTokenizer",
    "Recipe",
    "Replicas",
    "ReverseKLTerm",
    "SampleWeight",
    "ScheduleSection",
    "ScoreKLTerm",
    "ScoreMSETerm",
    "Section",
    "SentencePieceTokenizer",
    "Signal",
    "SoftTerm",
    "StreamSection",
    "StudentSection",
    "SweepSection",
    "TaskHead",
    "TaskLossTerm",
    "TaskSection",
    "TeacherSection",
    "Term",
    "TermSection",
    "TokenizerSection",
    "TotalVariationTerm",
    "TrainSection",
    "ValidationSection",
    "ValueSchedule",
    "WalkedTerm",
    "WordPieceTokenizer",
    "builtin_names",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_tree",
    "signal_streams",
]


class Recipe(Section):
    """A whole recipe. Each command uses its own sections."""

    name: str = Field(description="A short name, shown in tables.")
    description: str = Field("", description="What it does, in a sentence.")
    corpus: CorpusSection | None = Field(None, description="What is dumped.")
    dump: DumpSection = Field(
        default_factory=lambda: DumpSection(), description="What `kdcache dump` writes."
    )
    train: TrainSection = Field(
        default_factory=lambda: TrainSection(), description="What `kdcache train` does."
    )
    evaluate: EvaluateSection = Field(
        default_factory=lambda: EvaluateSection(), description="How `kdcache evaluate` scores."
    )
    sweep: SweepSection | None = Field(None, description="Which runs `kdcache sweep` makes.")
    stages: dict[Identifier, Recipe] = Field(
        default_factory=dict,
        description="Trainings one after another, by name, each of which begins with the best "
        "weights of the one before. A stage has the keys of a recipe; what it does not say "
        "it takes from the sections above. `NAME:STAGE` is one stage as a recipe of its own.",
    )
    skip: StrictBool = Field(
        False,
        description="Of a stage: leave it out. The one after it begins as its own `train.student` "
        "says, or from the stage before.",
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        if nested := [name for name, stage in self.stages.items() if stage.stages]:
            raise ValueError(f"stages.{nested[0]} has stages of its own; put them in one row")
        if self.stages and not self.kept:
            raise ValueError("skip is true in all stages; keep one")
        return self

    @property
    def kept(self) -> dict[str, Recipe]:
        """The stages that are not left out, in order; empty where it has no stages."""
        return {name: stage for name, stage in self.stages.items() if not stage.skip}

    def single(self) -> Recipe:
        """The recipe itself.

        Raises:
            RecipeError: it is of several stages, each of which is asked for by itself, or left out.
        """
        if self.skip:
            raise RecipeError(f"{self.name}: skip is true, of which a recipe's stages are left out")
        if self.stages:
            names = ", ".join(f"{self.name}:{name}" for name in self.stages)
            raise RecipeError(f"{self.name}: has {len(self.stages)} stages; name one of {names}")
        return self


def load_recipe(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe file, or a built-in recipe by name, and apply overrides.

    Args:
        name_or_path: a YAML file, or a name from `builtin_names`, whose `-small` may be left out;
            with `:STAGE` behind it, that stage alone.
        overrides: (dotted path, YAML text) pairs, applied in order; to every stage, where the path
            does not begin with that of one.

    Raises:
        RecipeError: with file and path of every fault.
    """
    tree, stage = read_recipe(name_or_path)
    for dotted, text in overrides:
        override_all(tree, dotted, text, stage)
    return parse_recipe(tree, where=name_or_path)


def parse_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a tree of plain values.

    Args:
        tree: what a recipe file holds.
        where: what to call it in an error.

    Raises:
        RecipeError: one line that names every fault by its path.
    """
    try:
        return Recipe.model_validate(whole_stages(tree))
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe(error, Recipe)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return write_yaml(recipe_tree(recipe))


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values; where it has stages they alone say what is done."""
    if not recipe.stages:
        left_out = {"stages"} if recipe.skip else {"stages", "skip"}
        return recipe.model_dump(mode="json", exclude=left_out)
    tree = recipe.model_dump(mode="json", include={"name", "description", "sweep"})
    return tree | {"stages": {name: recipe_tree(stage) for name, stage in recipe.stages.items()}}
