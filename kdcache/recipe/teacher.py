"""The part of a recipe that says which model speaks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from kdcache.recipe.section import Device, Section

TeacherKind = Literal[
    "auto",
    "encoder_decoder",
    "causal_lm",
    "masked_lm",
    "classifier",
    "encoder",
    "multi_task",
    "custom",
]
ModelPath = Annotated[str, Field(min_length=1)]
Option = StrictBool | StrictInt | float | str


class TeacherSection(Section):
    """The model that is run once, or an ensemble that speaks as one."""

    path: ModelPath | Annotated[list[ModelPath], Field(min_length=1)] = Field(
        description="A transformers model directory, or a hub id; a list of them is an ensemble.",
    )
    average: Literal["probabilities", "parameters"] = Field(
        "probabilities",
        description="What an ensemble averages: its members' probabilities (scores, where they "
        "are no probabilities), or their parameters (checkpoints of one training run).",
    )
    kind: TeacherKind = Field(
        "auto",
        description="What the model is; auto reads it from the config's architecture. A "
        "classifier may be a regressor; an encoder has hidden states and attention alone; a "
        "multi_task model has a head for each task, and a classes signal names the task.",
    )
    model_class: str | None = Field(
        None,
        description="For kind custom: `module:Name` of a class that follows "
        "kdcache.dump.teacher.Teacher; its module is imported from the Python path.",
    )
    options: dict[str, Option] = Field(
        default_factory=dict,
        description="For kind custom: values that the class reads, for instance which head of a "
        "multi-task model speaks.",
    )
    revision: str | None = Field(None, description="Hub revision; the default branch without it.")
    device: Device = "auto"
    device_map: str | None = Field(
        None,
        description="transformers' device_map (needs the accelerate package), for a model that "
        "is spread over several devices; `device` is then not used.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto keeps the checkpoint's own."
    )
    attention: str | None = Field(
        None,
        description="transformers' attn_implementation; its default without it (eager where an "
        "attention signal needs it).",
    )

    @property
    def paths(self) -> list[str]:
        """Paths of the members; one for a single model."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def label(self) -> str:
        """What messages and records call it."""
        return " + ".join(self.paths)

    @model_validator(mode="after")
    def _class_fits_kind(self) -> TeacherSection:
        if (self.model_class is not None) != (self.kind == "custom"):
            raise ValueError("model_class and kind custom need each other")
        if self.options and self.kind != "custom":
            raise ValueError("options go with kind custom alone")
        if self.revision is not None and len(self.paths) > 1:
            raise ValueError("an ensemble has no single revision; name local directories")
        return self
