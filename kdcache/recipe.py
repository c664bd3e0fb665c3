"""Recipes: one YAML file that says what to dump, what to train and how to score.

A recipe is a tree of frozen, documented models. Unknown keys, duplicate keys and wrong
types are refused with their path. Dotted overrides (`--train.objective.0.weight 0.3`)
edit the YAML tree before it is validated, so an override is checked like the file is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    model_validator,
)

from kdcache.errors import RecipeError
from kdcache.formats.codec import Codec, ThresholdCodec
from kdcache.recipe_faults import describe
from kdcache.recipe_tree import override, read_yaml, write_yaml


def _no_boolean(value: object) -> object:
    """Pydantic would read true as 1.0."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]
Device = Annotated[str, Field(description="auto (cuda, mps, then cpu) or a torch device name.")]
Rate = Annotated[Number, Field(ge=0, lt=1)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]
Identifier = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CorpusSection(Section):
    """Where text comes from. Row n of every field belongs together."""

    format: Literal["text", "tsv", "jsonl", "parquet"] = Field(
        "text",
        description="text: one file per field, a line a row (.gz is read as it is); tsv: a header "
        "line and no quoting; jsonl: an object per line; parquet.",
    )
    path: str | None = Field(
        None, description="The file of a tsv, jsonl or parquet corpus; none for text."
    )
    fields: dict[Identifier, str] = Field(
        default_factory=dict,
        min_length=1,
        description="Field name to its file (text) or column (other formats). "
        "Translation uses src and tgt.",
    )
    limit: PositiveInt | None = Field(None, description="Read this many rows; all without it.")
    empty: Literal["drop", "keep", "error"] = Field(
        "drop",
        description="What happens to a row with a field that is empty or white space: left out "
        "and counted, kept, or refused with its row number.",
    )

    @model_validator(mode="after")
    def _path_fits_format(self) -> CorpusSection:
        if self.format == "text" and self.path is not None:
            raise ValueError("a text corpus has one file per field; leave out path")
        if self.format != "text" and self.path is None:
            raise ValueError(f"a {self.format} corpus needs path")
        return self


class TeacherSection(Section):
    """The model that is run once."""

    path: str = Field(description="A transformers model directory, or a hub id.")
    revision: str | None = Field(None, description="Hub revision; the default branch without it.")
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto keeps the checkpoint's own."
    )
    attention: str | None = Field(
        None, description="transformers' attn_implementation; its default without it."
    )


class PretrainedTokenizer(Section):
    """A transformers tokenizer."""

    kind: Literal["pretrained"] = Field("pretrained", description="Which kind this is.")
    path: str | None = Field(
        None, description="Directory or hub id; the teacher's own tokenizer without it."
    )


class SentencePieceTokenizer(Section):
    """A SentencePiece model trained on the corpus being dumped."""

    kind: Literal["sentencepiece"] = Field("sentencepiece", description="Which kind this is.")
    vocab_size: PositiveInt = Field(8000, description="Pieces, the four special ones included.")
    model_type: Literal["unigram", "bpe"] = Field(
        "unigram", description="How SentencePiece finds its pieces."
    )
    fields: list[Identifier] = Field(
        default_factory=lambda: ["src", "tgt"], description="Corpus fields to train on."
    )
    character_coverage: Number = Field(
        1.0, gt=0, le=1, description="Share of the characters that get a piece of their own."
    )
    max_sentences: PositiveInt = Field(
        1_000_000, description="Train on the first this many lines of each field."
    )


TokenizerSection = Annotated[
    PretrainedTokenizer | SentencePieceTokenizer, Field(discriminator="kind")
]


def _teacher_tokenizer() -> dict[str, PretrainedTokenizer | SentencePieceTokenizer]:
    return {"teacher": PretrainedTokenizer()}


class StreamSection(Section):
    """One field of the corpus under one tokenizer."""

    field: Identifier = Field(description="The corpus field.")
    tokenizer: Identifier = Field("teacher", description="A name under dump.tokenizers.")
    target: StrictBool = Field(
        False,
        description="Tokenise as a target (a tokenizer with two sides, such as Marian's, "
        "then uses its target side).",
    )


class LogitsSignal(Section):
    """The teacher's distribution at every target position."""

    kind: Literal["logits"] = Field("logits", description="Which kind this is.")
    source: Identifier = Field("src", description="Stream the teacher's encoder reads.")
    stream: Identifier = Field("tgt", description="Stream whose positions are labelled.")
    codec: Codec = Field(
        default_factory=lambda: ThresholdCodec(),
        description="How a distribution becomes a few entries.",
    )
    temperatures: list[Annotated[Number, Field(gt=0)]] = Field(
        default_factory=lambda: [0.5, 1.0, 2.0, 5.0],
        description="Temperatures whose tail sums are stored, ascending, 1 among them. "
        "Any temperature between the smallest and infinity can be used later.",
    )

    @model_validator(mode="after")
    def _temperatures_fit(self) -> LogitsSignal:
        if 1.0 not in self.temperatures or sorted(set(self.temperatures)) != self.temperatures:
            raise ValueError("temperatures must ascend without repeats and contain 1")
        return self


class DumpSection(Section):
    """What `kdcache dump` writes."""

    teacher: TeacherSection | None = Field(
        None, description="The model to run; without it a cache of tokenised samples alone."
    )
    tokenizers: dict[Identifier, TokenizerSection] = Field(
        default_factory=_teacher_tokenizer,
        description="Tokenizer name to where it comes from.",
    )
    streams: dict[Identifier, StreamSection] = Field(
        default_factory=lambda: {
            "src": StreamSection(field="src"),
            "tgt": StreamSection(field="tgt", target=True),
        },
        description="Stream name to the field and tokenizer it is made of.",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="Longest stream of a sample; the teacher's positions without it.",
    )
    too_long: Literal["drop", "error"] = Field(
        "drop",
        description="What happens to a sample that is longer: left out and counted, or refused "
        "with its row number. Nothing is truncated.",
    )
    shard_tokens: PositiveInt = Field(2**20, description="Tokens per shard, all streams counted.")
    batch_tokens: PositiveInt = Field(
        4096, description="Padded source plus target tokens in one teacher forward."
    )
    seed: StrictInt = Field(1, ge=0, description="Seed of drawn entries and stochastic rounding.")
    signals: dict[Identifier, LogitsSignal] = Field(
        default_factory=dict, description="Signal name to what the teacher says."
    )

    @model_validator(mode="after")
    def _names_resolve(self) -> DumpSection:
        for name, stream in self.streams.items():
            if stream.tokenizer not in self.tokenizers:
                raise ValueError(
                    f"streams.{name}.tokenizer is {stream.tokenizer!r}; tokenizers has "
                    f"{sorted(self.tokenizers)}"
                )
        for name, signal in self.signals.items():
            for role in ("source", "stream"):
                stream_name = getattr(signal, role)
                if stream_name not in self.streams:
                    raise ValueError(
                        f"signals.{name}.{role} is {stream_name!r}; streams has "
                        f"{sorted(self.streams)}"
                    )
        return self


class StudentSection(Section):
    """The model that is trained."""

    path: str | None = Field(None, description="Start from this transformers directory.")
    config: dict[str, Any] | None = Field(
        None,
        description="Or build from a transformers config: model_type and its own keys. Vocabulary "
        "size and special ids are filled in from the cache's tokenizer.",
    )
    init: Literal["glorot", "transformers"] = Field(
        "glorot",
        description="How a student from a config starts: Glorot-uniform matrices and embeddings "
        "N(0, 1/sqrt(d)), as the Transformer papers do, or transformers' own default.",
    )

    @model_validator(mode="after")
    def _one_of(self) -> StudentSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path and config")
        return self


WEIGHT = "Factor of the term in the sum; a term of weight 0 is not built."


class CrossEntropyTerm(Section):
    """Mean cross-entropy with the reference tokens."""

    loss: Literal["cross_entropy"] = Field("cross_entropy", description="Which term this is.")
    weight: Number = Field(1.0, ge=0, description=WEIGHT)
    label_smoothing: Number = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over all ids."
    )


class ForwardKLTerm(Section):
    """Mean KL(teacher || student) with the cached labels of one signal."""

    loss: Literal["forward_kl"] = Field("forward_kl", description="Which term this is.")
    weight: Number = Field(1.0, ge=0, description=WEIGHT)
    signal: Identifier = Field("logits", description="Name of a logits signal in the cache.")
    temperature: Number = Field(
        1.0, gt=0, description="Both distributions are softmax(logits / temperature)."
    )
    temperature_squared: StrictBool = Field(
        True, description="Multiply by the temperature squared (Hinton); the NeMo slides do not."
    )
    tail: Literal["auto", "sampled", "uniform", "bucket", "renormalise"] = Field(
        "auto",
        description="What stands for the ids the cache left out. auto: sampled where entries were "
        "drawn and the temperature is 1, else uniform.",
    )


Term = Annotated[CrossEntropyTerm | ForwardKLTerm, Field(discriminator="loss")]


class OptimizerSection(Section):
    """Adam, or AdamW with decoupled weight decay."""

    name: Literal["adam", "adamw"] = Field(
        "adam", description="adam adds weight decay to the gradient, adamw to the update."
    )
    lr: Number = Field(7e-4, gt=0, description="Peak learning rate.")
    betas: tuple[Rate, Rate] = Field(
        (0.9, 0.98), description="Decay of the running means of gradient and square."
    )
    eps: Number = Field(1e-9, gt=0, description="Added to the root of the mean square.")
    weight_decay: Number = Field(0.0, ge=0, description="Pull of the weights towards zero.")


class ScheduleSection(Section):
    """Learning rate over steps: linear warm-up, then the named decay."""

    name: Literal["inverse_sqrt", "cosine", "constant"] = Field(
        "inverse_sqrt", description="Decay after the warm-up."
    )
    warmup_steps: StrictInt = Field(500, ge=0, description="Steps of linear rise to the peak rate.")
    final_ratio: Number = Field(
        0.0, ge=0, le=1, description="Cosine ends at this share of the peak rate."
    )


class ValidationSection(Section):
    """Development set scored during training."""

    corpus: CorpusSection | None = Field(None, description="The development set; no validation without it.")
    every_steps: PositiveInt = Field(500, description="Optimiser steps between scorings.")
    limit_tokens: PositiveInt = Field(
        100_000, description="Score at most this many target tokens each time."
    )


class CheckpointSection(Section):
    """What a run keeps."""

    every_steps: PositiveInt = Field(500, description="Resume point and candidate for averaging.")
    average_last: StrictInt = Field(
        5, ge=0, description="Write the mean of this many last checkpoints; 0: none."
    )


class TrainSection(Section):
    """What `kdcache train` does."""

    student: StudentSection | None = Field(None, description="The model that is trained.")
    source: Identifier = Field("src", description="Stream the student's encoder reads.")
    target: Identifier = Field("tgt", description="Stream the student predicts.")
    objective: list[Term] = Field(
        default_factory=list, description="Terms of the loss, which is their weighted sum."
    )
    max_steps: PositiveInt = Field(10_000, description="Optimiser steps.")
    max_epochs: PositiveInt | None = Field(
        None, description="Stop after this many passes, if that comes before max_steps."
    )
    batch_tokens: PositiveInt = Field(
        4096, description="Padded target tokens of one optimiser step (global batch)."
    )
    accumulate: PositiveInt = Field(
        1, description="Micro-batches a global batch is computed in; gradients stay exact."
    )
    optimizer: OptimizerSection = Field(
        default_factory=lambda: OptimizerSection(), description="How weights move."
    )
    schedule: ScheduleSection = Field(
        default_factory=lambda: ScheduleSection(), description="How the learning rate moves."
    )
    clip_norm: Number | None = Field(1.0, gt=0, description="Gradient norm; none: no clipping.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on cuda, float32 elsewhere."
    )
    device: Device = "auto"
    seed: StrictInt = Field(1, ge=0, description="Seed of weights, dropout and order.")
    window_shards: PositiveInt = Field(4, description="Shards shuffled together.")
    validation: ValidationSection = Field(
        default_factory=lambda: ValidationSection(), description="Scores during training."
    )
    checkpoints: CheckpointSection = Field(
        default_factory=lambda: CheckpointSection(), description="What a run keeps."
    )
    log_every: PositiveInt = Field(50, description="Steps between lines of metrics.jsonl.")


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


RECIPES = Path(__file__).parent / "recipes"


def builtin_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """Read a recipe file, or a built-in recipe by name, and apply overrides.

    Args:
        name_or_path: a YAML file, or a name from `builtin_names`.
        overrides: (dotted path, YAML text) pairs, applied in order.

    Raises:
        RecipeError: with file and path of every fault.
    """
    path = Path(name_or_path)
    if name_or_path in builtin_names() and not path.is_file():
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"{name_or_path}: no such file and no built-in recipe of that name; "
            f"built in: {', '.join(builtin_names())}"
        )
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name_or_path}: not UTF-8 at byte {error.start}") from None
    except RecipeError as error:
        raise RecipeError(f"{name_or_path}: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{name_or_path}: a recipe is a mapping, found {type(tree).__name__}")
    for dotted, text in overrides:
        override(tree, dotted, text)
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
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{where}: {describe(error, Recipe)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return write_yaml(recipe.model_dump(mode="json"))
