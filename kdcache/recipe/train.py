"""The part of a recipe that says what to train."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from kdcache.recipe.corpus import CorpusSection
from kdcache.recipe.objective import Term
from kdcache.recipe.section import Device, Identifier, Number, PositiveInt, Rate, Section

#: Which of several maskings of a sample are read.
Replicas = Literal["by_epoch", "all"]


class KeptLayers(Section):
    """Layers of a model that a student keeps, each side in the order given."""

    encoder: list[PositiveInt] | None = Field(
        None, min_length=1, description="Numbers from 1; null: all."
    )
    decoder: list[PositiveInt] | None = Field(
        None, min_length=1, description="Numbers from 1; null: all."
    )


class TaskHead(Section):
    """What a student of several tasks says of one of them."""

    kind: Literal["classification", "similarity", "ranking"] = Field(
        "classification",
        description="classification: which class a text or a pair is of. similarity: a number. "
        "ranking: how relevant the second text of a pair is to the first, its query.",
    )
    labels: Annotated[list[str], Field(min_length=2)] | None = Field(
        None,
        description="Of a classification its classes, in the order of its scores and as the gold "
        "labels name them; of a ranking two, the last is that of what is relevant. null: those of "
        "the model at path, else of the objective's signals (classification), else all that the "
        "gold labels of the cache have, sorted.",
    )
    range: tuple[Number, Number] | None = Field(
        None,
        description="Of a similarity, the lowest and the highest gold number; another is refused "
        "with its row. null: any number.",
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> TaskHead:
        if self.range is not None and (self.kind != "similarity" or self.range[0] >= self.range[1]):
            raise ValueError("range is [lowest, highest] of a similarity")
        if self.labels is not None and self.kind == "similarity":
            raise ValueError("a similarity is a number and has no labels")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels names one twice: {self.labels}")
        if self.labels is not None and self.kind == "ranking" and len(self.labels) != 2:
            raise ValueError(f"a ranking has two labels, found {len(self.labels)}")
        return self


StudentKind = Literal[
    "encoder_decoder", "masked_lm", "masked_seq2seq", "causal_lm", "classifier", "multi_task"
]


class StudentSection(Section):
    """The model that is trained."""

    kind: StudentKind = Field(
        "encoder_decoder",
        description="What the model is. All but an encoder_decoder read train.source, which is "
        "train.target too. masked_lm: with tokens masked, and predicts what stood there (BERT). "
        "masked_seq2seq: an encoder-decoder that reads with a segment masked, and predicts the "
        "segment (MASS). causal_lm: predicts every token but the first from those before it, of a "
        "chat those that the assistant wrote (GPT-2, Llama). classifier: says of a whole text or "
        "pair which class it is of, or a number. multi_task: an encoder with a head for each of "
        "several tasks.",
    )
    labels: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Of a classifier: its classes, in the order of its scores and as the gold "
        "labels name them; a single one makes it a regressor. null: those of the objective's "
        "classes signals, else of the classifier at path, else of the first such signal in the "
        "cache that a term of weight zero names.",
    )
    task: Identifier | None = Field(
        None,
        description="Of a classifier on a cache with tasks: only gold labels of this task count. "
        "null: of the task of the objective's classes signals, else of all.",
    )
    range: tuple[Number, Number] | None = Field(
        None,
        description="Of a classifier with a single label, the lowest and the highest gold number; "
        "another is refused with its row. null: any number.",
    )
    tasks: dict[Identifier, TaskHead] = Field(
        default_factory=dict,
        description="Of a multi_task student, its tasks by their names in the cache. Empty: those "
        "of the multi_task model at path.",
    )
    pooling: Literal["cls", "mean_cls"] | None = Field(
        None,
        description="Of a multi_task student, what heads read of a transformers encoder. cls: the "
        "last layer's state of the first token; mean_cls: the mean of all layers' (MKD's "
        "student). null: that of the multi_task model at path, else cls.",
    )
    head_size: Annotated[StrictInt, Field(ge=0)] | None = Field(
        None,
        description="Of a multi_task student, the width between a head's two linear layers, with "
        "ReLU; 0: a head is one linear layer. null: that of the multi_task model at path, else "
        "512.",
    )
    path: str | None = Field(
        None,
        description="Start from this transformers directory. Its tokenizer must be the cache's, "
        "or a prefix or padding of it.",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Or build from a transformers config: model_type and its own keys. Vocabulary "
        "size and special ids are filled in from the cache's tokenizer.",
    )
    layers: KeptLayers | None = Field(
        None,
        description="With path: keep these layers of the model, as DistilBERT's student keeps one "
        "of every two of its teacher's; null: all.",
    )
    init: Literal["glorot", "transformers"] = Field(
        "glorot",
        description="How a student from a config starts: Glorot-uniform matrices and embeddings "
        "N(0, 1/sqrt(d)), as the Transformer papers do, or transformers' own default.",
    )

    @model_validator(mode="after")
    def _of_a_classifier(self) -> StudentSection:
        given = [name for name in ("labels", "task", "range") if getattr(self, name) is not None]
        if given and self.kind != "classifier":
            raise ValueError(f"{given[0]} goes with kind classifier; kind is {self.kind}")
        if len(set(self.labels or ())) < len(self.labels or ()):
            raise ValueError(f"labels names one twice: {self.labels}")
        low, high = self.range or (0, 1)
        if low >= high or (self.range is not None and len(self.labels or [""]) > 1):
            raise ValueError("range is [lowest, highest] of a classifier with a single label")
        return self

    @model_validator(mode="after")
    def _of_several_tasks(self) -> StudentSection:
        keys = {"tasks": self.tasks or None, "pooling": self.pooling, "head_size": self.head_size}
        given = [name for name, value in keys.items() if value is not None]
        if given and self.kind != "multi_task":
            raise ValueError(f"{given[0]} goes with kind multi_task; kind is {self.kind}")
        if self.kind == "multi_task" and not self.tasks and self.path is None:
            raise ValueError("kind multi_task needs tasks; name at least one")
        return self

    @model_validator(mode="after")
    def _one_of(self) -> StudentSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of path and config")
        if self.layers is not None and self.path is None:
            raise ValueError("layers are those of a model at path; a config says how many it has")
        return self


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

    corpus: CorpusSection | None = Field(
        None, description="The development set; no validation without it."
    )
    every_steps: PositiveInt = Field(500, description="Optimiser steps between scorings.")
    limit_tokens: PositiveInt = Field(
        100_000, description="Score at most this many target tokens each time."
    )
    metric: str = Field(
        "dev_loss",
        description="What chooses the best weights: a score of the development set by its name in "
        "metrics.jsonl, as dev_accuracy, or dev_score of several tasks. Losses and perplexities "
        "are better the lower they are, all else the higher.",
    )


class CheckpointSection(Section):
    """What a run keeps."""

    every_steps: PositiveInt = Field(500, description="Resume point and candidate for averaging.")
    average_last: StrictInt = Field(
        5, ge=0, description="Write the mean of this many last checkpoints; 0: none."
    )


class CacheShare(Section):
    """One of several caches that are trained on."""

    path: str = Field(description="The cache, a directory or URL.")
    weight: Number = Field(
        1.0, gt=0, description="Its share of the optimiser steps, relative to the others'."
    )


class GateSection(Section):
    """Where distillation works against the rest of the objective, it is left out.

    For every module of the encoder by itself: the gradient of the gated terms counts where its
    inner product with that of all other terms is above 0 (the gradient optimisation mechanism).
    Decoder, output projection, what is shared with them and what terms learn beside the student
    take all gradients.
    """

    terms: list[StrictInt | Identifier] = Field(
        description="The gated terms, by number in train.objective, from 0, or by the name of "
        "their loss, which is all of that name.",
    )
    module: Literal["parameter", "sublayer", "layer"] = Field(
        "sublayer",
        description="What is tested by itself: every tensor, every attention and feed-forward "
        "block with its norm, or every layer. What lies outside the layers and is the encoder's "
        "own (embeddings, a last norm) is a module each.",
    )

    @model_validator(mode="after")
    def _names_a_term(self) -> GateSection:
        if not self.terms:
            raise ValueError("terms is empty; name those of train.objective that are gated")
        return self


class TrainSection(Section):
    """What `kdcache train` does."""

    student: StudentSection | None = Field(None, description="The model that is trained.")
    caches: list[CacheShare] = Field(
        default_factory=list,
        description="Train on these instead of --cache: every global batch is of one of them, in "
        "turns by weight. They must agree in tokenizers, streams and signals. Their passes differ "
        "in size, so max_steps alone ends the run.",
    )
    source: Identifier = Field("src", description="Stream the student's encoder reads.")
    target: Identifier = Field("tgt", description="Stream the student predicts.")
    tasks: list[Identifier] | None = Field(
        None,
        description="With a multi_task student: train these of its tasks alone, and build no other "
        "heads. null: all of them.",
    )
    objective: list[Term] = Field(
        default_factory=list, description="Terms of the loss, which is their weighted sum."
    )
    gate: GateSection | None = Field(
        None, description="Keep distillation where it does not work against the rest; null: always."
    )
    max_steps: PositiveInt = Field(10_000, description="Optimiser steps.")
    max_epochs: PositiveInt | None = Field(
        None, description="Stop after this many passes, if that comes before max_steps."
    )
    while_dumping: StrictBool = Field(
        False,
        description="Train on a cache whose dump is still on its way: every epoch is drawn from "
        "the shards, from the first without a gap, that are committed when it begins. The first "
        "epoch waits for the first shard. Passes differ in size then, so max_steps alone ends the "
        "run.",
    )
    batch_tokens: PositiveInt = Field(
        4096,
        description="Padded tokens of one optimiser step (global batch): at most so many in the "
        "source, in the target and in each hypothesis that a term is over.",
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
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16 autocast on cuda, float32 elsewhere. float16: autocast with a "
        "loss scale; a step whose gradients overflow is left out.",
    )
    activation_checkpointing: StrictBool = Field(
        False,
        description="Keep only what each layer reads, and compute the rest again in the backward "
        "pass: less memory, a third more time, the same gradients.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="Over several ranks: ddp keeps the whole student on each; fsdp spreads "
        "weights, gradients and optimiser state over them (FSDP2).",
    )
    device: Device = "auto"
    seed: StrictInt = Field(1, ge=0, description="Seed of weights, dropout and order.")
    window_shards: PositiveInt = Field(4, description="Shards shuffled together.")
    replicas: Replicas = Field(
        "by_epoch",
        description="Of a sample with several maskings: by_epoch reads the next one in every "
        "epoch, and the first again after the last; all reads all of them in every step, each as "
        "a row of its own.",
    )
    validation: ValidationSection = Field(
        default_factory=lambda: ValidationSection(), description="Scores during training."
    )
    checkpoints: CheckpointSection = Field(
        default_factory=lambda: CheckpointSection(), description="What a run keeps."
    )
    log_every: PositiveInt = Field(50, description="Steps between lines of metrics.jsonl.")
    log: Literal["tensorboard"] | None = Field(
        None,
        description="tensorboard: write the metrics as TensorBoard's events too, in the run's "
        "`tensorboard` folder (needs `pip install tensorboard`).",
    )

    @model_validator(mode="after")
    def _known_tasks(self) -> TrainSection:
        if self.tasks is None or self.student is None:
            return self
        if self.student.kind != "multi_task":
            raise ValueError("tasks goes with a student of kind multi_task")
        known = self.student.tasks
        if not self.tasks or (known and not set(self.tasks) <= set(known)):
            raise ValueError(f"tasks is {self.tasks}; the student has {sorted(known)}")
        return self

    @model_validator(mode="after")
    def _common_end(self) -> TrainSection:
        if len(self.caches) > 1 and self.max_epochs is not None:
            raise ValueError(
                f"max_epochs is {self.max_epochs} and caches has {len(self.caches)}: passes over "
                "several caches differ in size; set max_epochs null and bound the run by max_steps"
            )
        return self

    @model_validator(mode="after")
    def _definite_end(self) -> TrainSection:
        if self.while_dumping and self.max_epochs is not None:
            raise ValueError(
                f"max_epochs is {self.max_epochs} and while_dumping is set: passes over a growing "
                "cache differ in size; set max_epochs null and bound the run by max_steps"
            )
        return self
