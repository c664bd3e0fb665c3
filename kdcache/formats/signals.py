"""Signal records: signals/NAME.json, what a teacher says about one stream, by kind."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import xxhash
from pydantic import AfterValidator, Field, model_validator

from kdcache.formats.codec import Codec
from kdcache.formats.manifest import Count, Digest, Name, SignalName, VocabSize
from kdcache.formats.record import Record

Temperature = Annotated[float, Field(gt=0)]
Few = Annotated[int, Field(ge=1, lt=1 << 16)]
Side = Literal["encoder", "decoder"]


#: Kind of a teacher that others ran: its labels were imported, and it cannot be run again.
IMPORTED = "imported"


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers {list(layers)} do not ascend")
    return layers


LayerNumbers = Annotated[
    tuple[Count, ...],
    Field(strict=False, min_length=1, max_length=4096),
    AfterValidator(_ascending),
]


class TeacherRecord(Record):
    """The model that spoke: where it came from and what identifies it.

    Of an ensemble, `path` joins the members' and the digests are over theirs; `members` lists
    them and `average` says what was averaged.
    """

    path: str
    revision: str | None
    digest: Digest
    config_digest: Digest
    model_type: str
    kind: str
    dtype: str
    average: Literal["probabilities", "parameters"] | None = None
    members: list[TeacherRecord] = Field(default_factory=list)


class SignalRecord(Record):
    """What all kinds share.

    `source` is the stream an encoder reads, where it is not `stream`; `masks` and `hypotheses`
    name signals of the cache that this one was made from.
    """

    name: SignalName
    kind: str
    stream: Name
    stream_digest: Digest
    source: Name | None = None
    source_digest: Digest | None = None
    masks: Name | None = None
    hypotheses: Name | None = None
    seed: Count
    teacher: TeacherRecord | None
    recipe: dict[str, Any]
    versions: dict[str, str]

    #: What of `masks` and `hypotheses` a signal of this kind may name.
    may_name: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _inputs_fit(self) -> Self:
        for role in ("masks", "hypotheses"):
            if getattr(self, role) is not None and role not in self.may_name:
                raise ValueError(f"{role}: {getattr(self, role)!r}, a {self.kind} signal has none")
        return self

    @cached_property
    def digest(self) -> str:
        """32 hex digits over all that its labels depend on.

        Left out are the recipe, the library versions and where the teacher lay.
        """
        tree = self.model_dump(mode="json", exclude={"recipe", "versions"})
        for teacher in [tree["teacher"], *(tree["teacher"] or {}).get("members", [])]:
            for key in ("path", "revision"):
                (teacher or {}).pop(key, None)
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return xxhash.xxh3_128_hexdigest(text.encode())

    @property
    def imported(self) -> bool:
        """Whether its labels come from another project's files."""
        return self.teacher is not None and self.teacher.kind == IMPORTED

    @property
    def inputs(self) -> list[str]:
        """Signals that this one was made from."""
        return [name for name in (self.masks, self.hypotheses) if name is not None]


class LogitsRecord(SignalRecord):
    """Soft labels: the teacher's distribution over V ids, coded."""

    may_name = frozenset({"masks", "hypotheses"})

    kind: Literal["logits"] = "logits"
    at: Literal["targets", "positions", "masked", "segment", "segment_in_place"]
    hypothesis: Literal["all"] | Count = 0
    vocab_size: VocabSize
    codec: Codec
    temperatures: Annotated[tuple[Temperature, ...], Field(strict=False, max_length=64)]

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            self.codec.max_exact(self.vocab_size)
        except OverflowError:
            raise ValueError("codec: its parameters are out of range") from None
        if (self.masks is not None) != (self.at in ("masked", "segment", "segment_in_place")):
            raise ValueError(f"at {self.at!r} with masks {self.masks!r}")
        if self.hypotheses is not None and self.at != "targets":
            raise ValueError(f"at {self.at!r} with hypotheses {self.hypotheses!r}")
        if list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError(f"temperatures {list(self.temperatures)} do not ascend")
        served = self.codec.drawn_temperatures
        if self.codec.has_drawn_log_probs and not set(served) <= set(self.temperatures):
            raise ValueError(f"codec draws for {list(served)}, not all of them in temperatures")
        return self


class HiddenRecord(SignalRecord):
    """Hidden states: [rows, layers, width], one row per token, or per sample where pooled.

    With masks there are as many rows again for every replica, a sample's replicas together.
    """

    may_name = frozenset({"masks"})

    kind: Literal["hidden"] = "hidden"
    side: Side
    layers: LayerNumbers
    width: Annotated[int, Field(ge=1, lt=1 << 24)]
    pool: Literal["none", "cls", "mean"]
    values: Literal["float16", "bfloat16", "int8"]


class AttentionRecord(SignalRecord):
    """Self-attention: [rows, layers, heads], one row per query and key, queries outermost."""

    kind: Literal["attention"] = "attention"
    side: Side
    layers: LayerNumbers
    heads: Few
    averaged: bool
    values: Literal["float16", "bfloat16"]


class BeamsRecord(SignalRecord):
    """Hypotheses, best first, in the ids of `stream`'s tokenizer."""

    kind: Literal["beams"] = "beams"
    vocab_size: VocabSize
    num_hypotheses: Few
    decoding: dict[str, Any]


class ClassesRecord(SignalRecord):
    """Class logits or regression scores: as many as `labels` for each sample (and replica)."""

    may_name = frozenset({"masks"})

    kind: Literal["classes"] = "classes"
    task: str | None
    problem: Literal["classification", "regression", "multi_label"]
    labels: Annotated[list[str], Field(min_length=1)]
    values: Literal["float32", "float16"]


class MasksRecord(SignalRecord):
    """Masked positions of every replica, and the ids that stand there."""

    kind: Literal["masks"] = "masks"
    scheme: Literal["bert", "whole_word", "span", "segment", "word"]
    replicas: Few
    vocab_size: VocabSize
    mask_id: Count
    parameters: dict[str, float]


AnySignalRecord = (
    LogitsRecord | HiddenRecord | AttentionRecord | BeamsRecord | ClassesRecord | MasksRecord
)


def signal_class(tree: dict[str, Any]) -> type[SignalRecord]:
    """The class of a signal's record from its JSON.

    Raises:
        ValueError: its kind is none that this version knows.
    """
    kind = tree.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: {kind!r}, expected one of {sorted(KINDS)}")
    return KINDS[kind]


#: Kind to the class of its record.
KINDS: dict[str, type[SignalRecord]] = {
    "logits": LogitsRecord,
    "hidden": HiddenRecord,
    "attention": AttentionRecord,
    "beams": BeamsRecord,
    "classes": ClassesRecord,
    "masks": MasksRecord,
}
