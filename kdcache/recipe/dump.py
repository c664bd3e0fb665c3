"""The part of a recipe that says what to dump: teacher, tokenizers, streams, signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, model_validator

from kdcache.formats.manifest import RESERVED
from kdcache.recipe.section import Identifier, Number, PositiveInt, Section
from kdcache.recipe.signals import Signal
from kdcache.recipe.teacher import TeacherSection


class PretrainedTokenizer(Section):
    """A transformers tokenizer."""

    kind: Literal["pretrained"] = Field("pretrained", description="Which kind this is.")
    path: str | None = Field(
        None, description="Directory or hub id; the teacher's own tokenizer without it."
    )


class SentencePieceTokenizer(Section):
    """A SentencePiece model trained on the corpus being dumped."""

    kind: Literal["sentencepiece"] = Field("sentencepiece", description="Which kind this is.")
    vocab_size: PositiveInt = Field(8000, description="Pieces, the special ones included.")
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
    mask: StrictBool = Field(
        False,
        description="Give it a mask token, `<mask>`, which a masks signal needs; it is one piece "
        "more among the special ones.",
    )


class WordPieceTokenizer(Section):
    """A tokenizer as BERT has it, trained on the corpus being dumped.

    Texts and pairs get [CLS] and [SEP], pairs their token types.
    """

    kind: Literal["wordpiece"] = Field(description="Which kind this is.")
    vocab_size: PositiveInt = Field(
        30522, description="Most pieces, the five special ones included."
    )
    fields: list[Identifier] = Field(
        default_factory=lambda: ["text"], description="Corpus fields to train on."
    )
    lower: StrictBool = Field(True, description="Letters become small, and lose their accents.")
    words: StrictBool = Field(
        False,
        description="Whole words alone, the most frequent ones; any other is [UNK].",
    )
    max_sentences: PositiveInt = Field(
        1_000_000, description="Train on the first this many lines of each field."
    )

    @property
    def mask(self) -> bool:
        """It always has a mask token."""
        return True


TokenizerSection = Annotated[
    PretrainedTokenizer | SentencePieceTokenizer | WordPieceTokenizer, Field(discriminator="kind")
]


def _teacher_tokenizer() -> dict[str, TokenizerSection]:
    return {"teacher": PretrainedTokenizer()}


class StreamSection(Section):
    """One field of the corpus, or a pair of fields, under one tokenizer."""

    field: Identifier = Field(description="The corpus field.")
    pair: Identifier | None = Field(
        None,
        description="A second field: the tokenizer joins both as it does pairs, and the stream "
        "keeps the token types. Where its text is empty the first is encoded alone.",
    )
    template: Literal["none", "chat"] = Field(
        "none",
        description="chat: the field holds messages, which become text by the tokenizer's chat "
        "template, and the stream keeps which tokens the assistant wrote.",
    )
    tokenizer: Identifier = Field("teacher", description="A name under dump.tokenizers.")
    target: StrictBool = Field(
        False,
        description="Tokenise as a target (a tokenizer with two sides, such as Marian's, "
        "then uses its target side).",
    )

    @model_validator(mode="after")
    def _template_stands_alone(self) -> StreamSection:
        if self.template == "chat" and (self.pair is not None or self.target):
            raise ValueError("a chat template makes the whole text; leave out pair and target")
        return self


def _logits_by_default(signals: Any) -> Any:
    """A signal without a kind is one of logits."""
    if not isinstance(signals, Mapping):
        return signals
    return {
        name: {"kind": "logits", **signal} if isinstance(signal, Mapping) else signal
        for name, signal in signals.items()
    }


class DumpSection(Section):
    """What `kdcache dump` writes."""

    teacher: TeacherSection | None = Field(
        None, description="The model to run; without it a cache of tokenised samples alone."
    )
    teachers: dict[Identifier, TeacherSection] = Field(
        default_factory=dict,
        description="More models, by name, for signals that say `teacher: NAME`.",
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
    signals: Annotated[dict[Identifier, Signal], BeforeValidator(_logits_by_default)] = Field(
        default_factory=dict,
        description="Signal name to what the teacher says; kind logits where none is given.",
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
            if name in RESERVED:
                raise ValueError(
                    f"signals.{name}: {name!r} is a name of the format and cannot name a signal; "
                    "choose another"
                )
            for role, stream_name in signal_streams(signal).items():
                if stream_name not in self.streams:
                    raise ValueError(
                        f"signals.{name}.{role} is {stream_name!r}; streams has "
                        f"{sorted(self.streams)}"
                    )
            teacher = getattr(signal, "teacher", None)
            if teacher is not None and teacher not in self.teachers:
                raise ValueError(
                    f"signals.{name}.teacher is {teacher!r}; teachers has {sorted(self.teachers)}"
                )
        return self

    def teacher_of(self, signal: str) -> TeacherSection | None:
        """The teacher that makes a signal; None where it needs none, or none is given."""
        section = self.signals[signal]
        if section.kind == "masks":
            return None
        return self.teachers[section.teacher] if section.teacher else self.teacher


def signal_streams(signal: Signal) -> dict[str, str]:
    """Role (stream, source) to the streams that a signal reads."""
    roles = {"stream": signal.stream}
    if signal.kind == "logits":
        source = signal.source_stream
    elif signal.kind in ("hidden", "attention"):
        source = signal.source
    else:
        source = signal.source if signal.kind == "beams" else None
    return roles if source is None else {**roles, "source": source}
