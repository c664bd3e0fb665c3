"""The part of a recipe that says what to dump: corpus, teacher, tokenizers, streams, signals."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    model_validator,
)

from kdcache.formats.codec import Codec, ThresholdCodec


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
