"""Recipes: one YAML file that says what to dump, what to train and how to score.

A recipe is a tree of frozen, documented models. Unknown keys, duplicate keys and wrong
types are refused with their path. Dotted overrides (`--train.objective.0.weight 0.3`)
edit the YAML tree before it is validated, so an override is checked like the file is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError

from kdcache.errors import RecipeError
from kdcache.recipe.corpus import CorpusSection, TaskSection
from kdcache.recipe.dump import (
    DumpSection,
    PretrainedTokenizer,
    SentencePieceTokenizer,
    StreamSection,
    TokenizerSection,
    signal_streams,
)
from kdcache.recipe.faults import describe
from kdcache.recipe.files import builtin_names, read_file
from kdcache.recipe.objective import (
    AttentionMSETerm,
    ClassifierTerm,
    CrossEntropyTerm,
    ForwardKLTerm,
    HiddenCosineTerm,
    HiddenMSETerm,
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
    Term,
    TermSection,
    TotalVariationTerm,
    ValueSchedule,
)
from kdcache.recipe.section import Section
from kdcache.recipe.signals import (
    AttentionSignal,
    BeamsSignal,
    ClassesSignal,
    HiddenSignal,
    LogitsSignal,
    MasksSignal,
    Signal,
)
from kdcache.recipe.sweep import SweepSection
from kdcache.recipe.teacher import TeacherSection
from kdcache.recipe.train import (
    CacheShare,
    CheckpointSection,
    EvaluateSection,
    GateSection,
    KeptLayers,
    OptimizerSection,
    ScheduleSection,
    StudentSection,
    TrainSection,
    ValidationSection,
)
from kdcache.recipe.tree import override, write_yaml

__all__ = [
    "AttentionMSETerm",
    "AttentionSignal",
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
    "PretrainedTokenizer",
    "Recipe",
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
    "TaskSection",
    "TeacherSection",
    "Term",
    "TermSection",
    "TokenizerSection",
    "TotalVariationTerm",
    "TrainSection",
    "ValidationSection",
    "ValueSchedule",
    "builtin_names",
    "dump_recipe",
    "load_recipe",
    "load_tree",
    "parse_recipe",
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


def load_recipe(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe file, or a built-in recipe by name, and apply overrides.

    Args:
        name_or_path: a YAML file, or a name from `builtin_names`, whose `-small` may be left out.
        overrides: (dotted path, YAML text) pairs, applied in order.

    Raises:
        RecipeError: with file and path of every fault.
    """
    return parse_recipe(load_tree(name_or_path, overrides), where=name_or_path)


def load_tree(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """What `load_recipe` validates: plain values of a recipe file with overrides applied.

    Args:
        name_or_path: as for `load_recipe`.
        overrides: likewise.

    Raises:
        RecipeError: there is no such file, it is no mapping in YAML, or an override leads nowhere.
    """
    tree = read_file(name_or_path)
    for dotted, text in overrides:
        override(tree, dotted, text)
    return tree


def parse_recipe(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a tree of plain values.

    Args:
        tree: what a recipe file holds.
        where: what to call it in an error.

    Raises:
        RecipeError: one line that names every fault by its path.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe(error, Recipe)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return write_yaml(recipe.model_dump(mode="json"))
