"""The part of a recipe that says what the teacher says: one section per kind of signal."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from kdcache.formats.codec import Codec, ThresholdCodec
from kdcache.recipe.section import Identifier, Number, PositiveInt, Section, Share

Side = Literal["encoder", "decoder"]
Layers = Literal["all"] | Annotated[list[StrictInt], Field(min_length=1)]
TeacherName = Annotated[
    Identifier | None,
    Field(description="A name under dump.teachers; dump.teacher without it."),
]


#: Where labels are at masked tokens.
_OF_MASKS = ("masked", "segment", "segment_in_place")


class LogitsSignal(Section):
    """The teacher's distribution over its vocabulary, position by position."""

    kind: Literal["logits"] = Field("logits", description="Which kind this is.")
    teacher: TeacherName = None
    at: Literal["targets", "positions", "masked", "segment", "segment_in_place"] = Field(
        "targets",
        description="targets: every token of `stream`, the decoder's side of an encoder-decoder. "
        "positions: every token of `stream` but the first, under a causal model (those of the "
        "loss mask alone, where the stream has one). masked: the masked tokens of `stream`, "
        "under a masked model. segment: the masked segment of `stream`, written by the decoder "
        "of an encoder-decoder that reads the rest, as a text of its own. segment_in_place: "
        "the same with each of its tokens at its position in `stream` (MASS).",
    )
    source: Identifier | None = Field(
        None,
        description="Stream that an encoder-decoder's encoder reads; src without it. For targets "
        "alone.",
    )
    stream: Identifier = Field("tgt", description="Stream whose tokens are labelled.")
    masks: Identifier | None = Field(
        None, description="A masks signal over `stream`, for masked and segments."
    )
    hypotheses: Identifier | None = Field(
        None,
        description="A beams signal whose hypotheses are labelled in place of the reference.",
    )
    hypothesis: Literal["all"] | Annotated[StrictInt, Field(ge=0)] = Field(
        0, description="Which hypothesis, 0 the best, or all of them."
    )
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
    def _fits(self) -> LogitsSignal:
        if 1.0 not in self.temperatures or sorted(set(self.temperatures)) != self.temperatures:
            raise ValueError("temperatures must ascend without repeats and contain 1")
        missing = [t for t in self.codec.drawn_temperatures if t not in self.temperatures]
        if missing:
            found = ", ".join(f"{t:g}" for t in missing)
            raise ValueError(f"codec.temperatures {found} must be among the signal's temperatures")
        if (self.masks is not None) != (self.at in _OF_MASKS):
            raise ValueError(
                f"masks goes with `at: {'`, `at: '.join(_OF_MASKS)}`, and they need it"
            )
        if self.at != "targets" and (self.source is not None or self.hypotheses is not None):
            raise ValueError("source and hypotheses go with `at: targets` alone")
        return self

    @property
    def source_stream(self) -> str | None:
        """Stream the encoder reads, where it is not the labelled one."""
        return (self.source or "src") if self.at == "targets" else None


class _DenseSignal(Section):
    """What hidden states and attentions share."""

    teacher: TeacherName = None
    side: Side = Field(
        "encoder",
        description="encoder, or decoder: a causal model's only side, and the teacher-forced "
        "target side of an encoder-decoder.",
    )
    stream: Identifier = Field("src", description="Stream whose tokens are described.")
    source: Identifier | None = Field(
        None,
        description="Stream that the encoder reads, where the decoder of an encoder-decoder is "
        "described, and needed there.",
    )

    @model_validator(mode="after")
    def _source_fits(self) -> _DenseSignal:
        if self.side == "encoder" and self.source is not None:
            raise ValueError("source goes with `side: decoder` alone; the encoder reads stream")
        return self


class HiddenSignal(_DenseSignal):
    """Hidden states of chosen layers."""

    kind: Literal["hidden"] = Field(description="Which kind this is.")
    layers: Layers = Field(
        "all",
        description="all, or a list: 0 is the embedding output, n the output of layer n, -1 the "
        "last. They are kept in ascending order.",
    )
    pool: Literal["none", "cls", "mean"] = Field(
        "none",
        description="none: every token; cls: the first token, of an encoder alone; mean: over all "
        "tokens, special ones too.",
    )
    values: Literal["float16", "bfloat16", "int8"] = Field(
        "float16",
        description="How they are stored. float16 holds up to 65504; int8 has a scale per token "
        "and layer, and is off by under 1% where no feature is far above the others.",
    )
    masks: Identifier | None = Field(
        None, description="A masks signal over `stream`: an encoder reads the masked tokens."
    )

    @model_validator(mode="after")
    def _encoder_alone(self) -> HiddenSignal:
        # A decoder's first state has read nothing of what follows, and its input is no stream
        # that was masked.
        for key, given in (("pool cls", self.pool == "cls"), ("masks", self.masks is not None)):
            if given and self.side == "decoder":
                raise ValueError(f"{key} goes with `side: encoder` alone")
        return self


class AttentionSignal(_DenseSignal):
    """Self-attention probabilities of chosen layers."""

    kind: Literal["attention"] = Field(description="Which kind this is.")
    layers: Layers = Field("all", description="all, or a list: 1 is the first layer, -1 the last.")
    heads: Literal["mean", "all"] = Field(
        "mean", description="mean: averaged over heads; all: every head by itself."
    )
    values: Literal["float16", "bfloat16"] = Field("float16", description="How they are stored.")


#: Most tokens of a hypothesis; their number has two bytes.
MAX_HYPOTHESIS = 2**16 - 1


class BeamsSignal(Section):
    """Hypotheses that the teacher writes, as transformers' own generate finds them.

    Of the checkpoint's generation config only the ids are used that begin, end and fill what the
    model writes, and those that it must not write.
    """

    kind: Literal["beams"] = Field(description="Which kind this is.")
    teacher: TeacherName = None
    source: Identifier = Field(
        "src",
        description="Stream that is read: an encoder's, or the prompt of a causal model.",
    )
    stream: Identifier = Field(
        "tgt", description="Stream whose tokenizer the hypotheses are written in."
    )
    mode: Literal["beam", "greedy", "sample"] = Field("beam", description="How they are found.")
    num_beams: PositiveInt = Field(5, description="Width of the beam, for mode beam.")
    num_hypotheses: PositiveInt = Field(
        1, description="Hypotheses kept for each sample, best first; in mode sample, drawn."
    )
    max_length: Annotated[StrictInt, Field(ge=1, le=MAX_HYPOTHESIS)] | None = Field(
        None,
        description="Most tokens of a hypothesis, end token included; 2 x source tokens + 10 "
        "without it, for every sample by itself (and never more than the teacher's positions).",
    )
    length_penalty: Number = Field(
        1.0,
        description="Exponent of the length in a hypothesis' score: log_prob / tokens ** "
        "length_penalty.",
    )
    early_stopping: StrictBool = Field(
        False, description="End a beam at `num_beams` finished hypotheses."
    )
    temperature: Annotated[Number, Field(gt=0)] = Field(1.0, description="For mode sample.")
    top_k: Annotated[StrictInt, Field(ge=0)] = Field(0, description="For mode sample; 0: all.")
    top_p: Annotated[Share, Field(gt=0)] = Field(1.0, description="For mode sample; 1: all.")
    forced_bos: str | None = Field(
        None,
        description="Token that every hypothesis begins with: the target language of mBART, "
        "M2M100 or NLLB; the checkpoint's forced_bos_token_id without it.",
    )

    @model_validator(mode="after")
    def _mode_fits(self) -> BeamsSignal:
        if self.mode == "greedy" and self.num_hypotheses > 1:
            raise ValueError("mode greedy has one hypothesis")
        if self.mode == "beam" and self.num_hypotheses > self.num_beams:
            raise ValueError(
                f"num_hypotheses {self.num_hypotheses} is more than num_beams {self.num_beams}"
            )
        if self.mode != "beam" and self.early_stopping:
            raise ValueError("early_stopping goes with mode beam alone")
        if self.mode != "sample" and (self.temperature, self.top_k, self.top_p) != (1, 0, 1):
            raise ValueError("temperature, top_k and top_p go with mode sample alone")
        return self


class ClassesSignal(Section):
    """Logits of a classifier, or scores of a regressor."""

    kind: Literal["classes"] = Field(description="Which kind this is.")
    teacher: TeacherName = None
    stream: Identifier = Field("text", description="Stream that is read.")
    task: str | None = Field(
        None, description="Label the samples of this task alone; all samples without it."
    )
    values: Literal["float32", "float16"] = Field("float32", description="How they are stored.")
    masks: Identifier | None = Field(
        None, description="A masks signal over `stream`: the model reads the masked tokens."
    )


class MasksSignal(Section):
    """Which tokens of a stream are masked, and what stands in their place."""

    kind: Literal["masks"] = Field(description="Which kind this is.")
    stream: Identifier = Field("text", description="Stream that is masked.")
    scheme: Literal["bert", "whole_word", "span", "segment", "word"] = Field(
        "bert",
        description="bert: single tokens; whole_word: all pieces of a word; span: SpanBERT's "
        "geometric spans of whole words; segment: one contiguous piece (MASS); word: every word "
        "by itself with this probability (MKD's augmentation).",
    )
    probability: Annotated[Share, Field(gt=0)] | None = Field(
        None,
        description="Share of tokens (words for scheme word) that are chosen; 0.15 without it, "
        "0.5 for segment, 0.1 for word.",
    )
    replicas: PositiveInt = Field(1, description="Maskings of every sample.")
    mask_share: Share = Field(
        0.8,
        description="Share of the chosen tokens that become the mask token (for spans, of "
        "spans); always 1 for word.",
    )
    random_share: Share = Field(
        0.1, description="Share that become a random token; the rest keep their own."
    )
    span_p: Annotated[Share, Field(gt=0)] = Field(
        0.2, description="Geometric parameter of span lengths in words."
    )
    span_max: PositiveInt = Field(10, description="Longest span in words.")

    @model_validator(mode="after")
    def _shares_fit(self) -> MasksSignal:
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError("mask_share and random_share are together more than 1")
        return self


Signal = Annotated[
    LogitsSignal | HiddenSignal | AttentionSignal | BeamsSignal | ClassesSignal | MasksSignal,
    Field(discriminator="kind"),
]
