"""The terms of a training objective: what each compares, how much it counts, and when."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StrictBool, StrictInt, model_validator

from kdcache.recipe.section import Identifier, Number, PositiveInt, Section

WEIGHT = "Factor of the term in the sum; a term of weight 0 is not built."
Tail = Literal["auto", "sampled", "uniform", "bucket", "renormalise"]


class Jump(Section):
    """A value that holds from some step on."""

    step: PositiveInt = Field(description="First optimiser step with this value, from 1.")
    value: Number = Field(description="The value.")


class ValueSchedule(Section):
    """How a number of a term moves during training, from the number that the term gives."""

    shape: Literal["linear", "cosine", "steps"] = Field(
        description="linear, or half a cosine, to `final`; steps: jumps."
    )
    final: Number | None = Field(
        None, description="Where linear and cosine end; it holds from then on."
    )
    first_step: StrictInt = Field(
        0, ge=0, description="Last step with the number that the term gives."
    )
    last_step: PositiveInt | None = Field(
        None, description="First step with `final`; null: the last of the run."
    )
    jumps: list[Jump] = Field(default_factory=list, description="Values of shape steps.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.shape == "steps":
            steps = [jump.step for jump in self.jumps]
            if not steps or steps != sorted(set(steps)):
                raise ValueError(f"shape steps needs jumps with ascending steps (found {steps})")
            if self.final is not None:
                raise ValueError("final goes with linear and cosine; shape steps has jumps")
            return self
        if self.final is None or self.jumps:
            raise ValueError(f"shape {self.shape} needs final, and has no jumps")
        if self.last_step is not None and self.last_step <= self.first_step:
            raise ValueError(
                f"last_step is {self.last_step}, first_step {self.first_step}; it comes later"
            )
        return self

    @property
    def ends(self) -> list[float]:
        """The values that it moves to or jumps to; what lies between them is between them."""
        return [jump.value for jump in self.jumps] if self.final is None else [self.final]


class SampleWeight(Section):
    """A factor for every sample: exp(-strength x (x - centre)), x in nats per target token."""

    by: Literal["teacher_loss", "teacher_entropy"] = Field(
        description="x: the teacher's cross-entropy with the reference, or its entropy; the mean "
        "over the sample's tokens."
    )
    signal: Identifier | None = Field(
        None, description="The logits signal that says so; null: the term's own."
    )
    strength: Number = Field(
        1.0, description="Above 0 what the teacher finds easy counts more, below 0 less."
    )
    centre: Number = Field(0.0, description="x of a sample that counts once.")
    limit: Number = Field(4.0, gt=0, description="No sample counts more than this.")


class TermSection(Section):
    """What all terms have."""

    loss: str
    weight: Number = Field(1.0, ge=0, description=WEIGHT)
    weight_schedule: ValueSchedule | None = Field(
        None, description="How the weight moves during training; null: it stays."
    )
    sample_weight: SampleWeight | None = Field(
        None,
        description="Factor of each sample; null: 1. The term's denominator stays the global "
        "batch's own, so factors below 1 make the term smaller.",
    )

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        if min(self.weights) < 0:
            raise ValueError(f"weight_schedule goes to {min(self.weights)}; expected 0 or more")
        return self

    @property
    def weights(self) -> list[float]:
        """The weights it has during training, and others between them."""
        return [self.weight, *(self.weight_schedule.ends if self.weight_schedule else [])]

    @property
    def used(self) -> bool:
        """Whether it counts at any time."""
        return max(self.weights) > 0


class CrossEntropyTerm(TermSection):
    """Mean cross-entropy with the reference tokens, or with those of a hypothesis."""

    loss: Literal["cross_entropy"] = Field("cross_entropy", description="Which term this is.")
    hypotheses: Identifier | None = Field(
        None,
        description="Name of a beams signal: the student predicts its hypotheses in place of the "
        "references, and the term is the mean over their tokens.",
    )
    hypothesis: StrictInt = Field(
        0,
        ge=0,
        description="Which of them, 0 the best; a sample that has fewer counts nothing.",
    )
    label_smoothing: Number = Field(
        0.0, ge=0, lt=1, description="Share of the target spread evenly over all ids."
    )
    masks: Identifier | None = Field(
        None,
        description="For students of kinds masked_lm and masked_seq2seq, which need it: name of a "
        "masks signal. The "
        "student reads the masked tokens, and the term is the mean over them.",
    )

    @model_validator(mode="after")
    def _hypothesis_of_some(self) -> Self:
        if self.hypothesis and self.hypotheses is None:
            raise ValueError(
                f"hypothesis is {self.hypothesis} and hypotheses is null; name a beams signal there"
            )
        return self


class SoftTerm(TermSection):
    """What all terms over cached labels have."""

    signal: Identifier | Annotated[list[Identifier], Field(min_length=1)] = Field(
        "logits",
        description="Name of a logits signal in the cache: of the references, or of a hypothesis "
        "(the student then predicts that). Of a list of them the term is one mean over all of "
        "their labels.",
    )
    temperature: Number = Field(
        1.0, gt=0, description="Both distributions are softmax(logits / temperature)."
    )
    temperature_schedule: ValueSchedule | None = Field(
        None, description="How the temperature moves during training; null: it stays."
    )
    temperature_squared: StrictBool = Field(
        True, description="Multiply by the temperature squared (Hinton); the NeMo slides do not."
    )
    tail: Tail = Field(
        "auto",
        description="What stands for the ids the cache left out. auto: sampled where entries were "
        "drawn for this temperature, else uniform. What the teacher gives to ids that the student "
        "lacks joins it; with sampled that is left out.",
    )

    @model_validator(mode="after")
    def _signals_differ(self) -> Self:
        if len(set(self.signals)) < len(self.signals):
            raise ValueError(f"signal names one twice: {self.signals}; give a weight instead")
        return self

    @model_validator(mode="after")
    def _temperatures_fit(self) -> Self:
        if min(self.temperatures) <= 0:
            raise ValueError(f"temperature_schedule goes to {min(self.temperatures)}; expected > 0")
        return self

    @property
    def signals(self) -> list[str]:
        """Names of its signals."""
        return [self.signal] if isinstance(self.signal, str) else list(self.signal)

    @property
    def temperatures(self) -> list[float]:
        """The temperatures it has during training, and others between them."""
        ends = self.temperature_schedule.ends if self.temperature_schedule else []
        return [self.temperature, *ends]


class ForwardKLTerm(SoftTerm):
    """Mean KL(teacher || student) with the cached labels of one signal."""

    loss: Literal["forward_kl"] = Field("forward_kl", description="Which term this is.")


class WalkedTerm(SoftTerm):
    """What terms have that walk all ids of a position with autograd."""

    compiled: StrictBool = Field(
        False,
        description="Let torch.compile fuse the walk over the ids: less time, after some seconds "
        "of compiling. It needs a C++ compiler (on a GPU Triton).",
    )


class ReverseKLTerm(WalkedTerm):
    """Mean KL(student || teacher). Not for drawn entries: give tail uniform or bucket."""

    loss: Literal["reverse_kl"] = Field("reverse_kl", description="Which term this is.")


class JensenShannonTerm(WalkedTerm):
    """Mean Jensen-Shannon divergence; drawn entries bias it upwards."""

    loss: Literal["jensen_shannon"] = Field("jensen_shannon", description="Which term this is.")


class TotalVariationTerm(WalkedTerm):
    """Mean total variation distance; drawn entries bias it upwards."""

    loss: Literal["total_variation"] = Field("total_variation", description="Which term this is.")
    temperature_squared: StrictBool = Field(
        False, description="Multiply by the temperature squared."
    )


class LogitMSETerm(SoftTerm):
    """Mean squared difference of centred logits over the listed ids. Not for drawn entries."""

    loss: Literal["logit_mse"] = Field("logit_mse", description="Which term this is.")
    temperature_squared: StrictBool = Field(
        False, description="Multiply by the temperature squared."
    )


class MaskedKLTerm(SoftTerm):
    """Mean KL(teacher || classifier) at masked source tokens (the mask task).

    The student's encoder reads what the teacher read: a second pass over the masked source, or
    none where the masks change no token. A linear classifier over the teacher's vocabulary stands
    on its last states and is learned beside the student.
    """

    loss: Literal["masked_kl"] = Field("masked_kl", description="Which term this is.")
    signal: Identifier = Field(
        description="Name of a logits signal at masked tokens of the stream that the encoder reads."
    )


def _listed(value: object) -> object:
    """One layer is a list of one."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Layer = Annotated[StrictInt, Field(ge=0)]


class LayerPair(Section):
    """A layer of the student beside one or several of the teacher; 0 is what the first reads."""

    student: Layer = Field(description="The student's layer.")
    teacher: Annotated[list[Layer], BeforeValidator(_listed)] = Field(
        min_length=1,
        description="The teacher's layer, one that the signal has; or a list of them, which a "
        "learned linear layer fuses into one of the student's width (CKD).",
    )


class LayersTerm(TermSection):
    """What terms over layers have."""

    signal: Identifier = Field(description="Name of the signal in the cache.")
    layers: list[LayerPair] | None = Field(
        None,
        description="Pairs of layers. null: the student's layers evenly over those of the signal.",
    )
    over_layers: Literal["mean", "sum"] = Field(
        "mean", description="Whether the term is the mean or the sum over its pairs of layers."
    )


class HiddenTerm(LayersTerm):
    """What terms over hidden states have."""

    fuse: Literal["teacher", "student"] = Field(
        "teacher",
        description="Whose states a learned linear layer reads where a pair has several layers of "
        "the teacher: the teacher's, all into one (the published equation of CKD), or the "
        "student's, one into all (its released code). The first can be met by states that say "
        "nothing: watch the development loss.",
    )


class HiddenMSETerm(HiddenTerm):
    """Mean squared difference of hidden states, over tokens and features.

    Where the signal is of masked inputs, the student's encoder reads them too. Where it is pooled,
    the student's states are pooled alike, and the mean is over samples.
    """

    loss: Literal["hidden_mse"] = Field("hidden_mse", description="Which term this is.")


class HiddenCosineTerm(HiddenTerm):
    """Mean of 1 - cosine similarity of hidden states, over tokens; the signal as for hidden_mse."""

    loss: Literal["hidden_cosine"] = Field("hidden_cosine", description="Which term this is.")


class AttentionMSETerm(LayersTerm):
    """Mean squared difference of self-attentions, over queries, keys and heads."""

    loss: Literal["attention_mse"] = Field("attention_mse", description="Which term this is.")


class ScoreMSETerm(TermSection):
    """Mean squared difference of class scores, over the samples that the teacher scored.

    Students of kind classifier and multi_task have scores of their own. Of another a linear layer
    makes them, which reads the mean of the encoder's last states over the tokens of the source.
    """

    loss: Literal["score_mse"] = Field("score_mse", description="Which term this is.")
    signal: Identifier = Field(
        description="Name of a classes signal in the cache. Of a multi_task student, what the "
        "names of its tasks' signals begin with: scores stands for scores_TASK."
    )
    over_classes: Literal["mean", "sum"] = Field(
        "mean",
        description="Whether a sample counts the mean or the sum over its classes (MKD sums).",
    )


class ScoreKLTerm(TermSection):
    """Mean KL(teacher || student) of classes, over the samples that the teacher scored.

    For a student of kind classifier, or multi_task where all tasks are classifications.
    """

    loss: Literal["score_kl"] = Field("score_kl", description="Which term this is.")
    signal: Identifier = Field(
        description="Name of a classes signal in the cache. Of a multi_task student, what the "
        "names of its tasks' signals begin with: scores stands for scores_TASK."
    )
    temperature: Number = Field(
        1.0, gt=0, description="Both distributions are softmax(logits / temperature)."
    )
    temperature_squared: StrictBool = Field(
        True, description="Multiply by the temperature squared (Hinton)."
    )


class LabelCrossEntropyTerm(TermSection):
    """Mean cross-entropy with gold labels, over the samples that have one.

    For a student of kind classifier with several labels.
    """

    loss: Literal["label_cross_entropy"] = Field(
        "label_cross_entropy", description="Which term this is."
    )


class LabelMSETerm(TermSection):
    """Mean squared difference from gold numbers, over the samples that have one.

    For a student of kind classifier with a single label: a regressor.
    """

    loss: Literal["label_mse"] = Field("label_mse", description="Which term this is.")


class TaskLossTerm(TermSection):
    """Every task's own loss of gold labels, as a mean over the samples that have one.

    Of a classification the cross-entropy, of a similarity the squared difference, of a ranking the
    negative log-likelihood of what is relevant among the candidates of its query. For a student of
    kind multi_task.
    """

    loss: Literal["task_loss"] = Field("task_loss", description="Which term this is.")


#: Those that only a student of kind classifier has.
ClassifierTerm = ScoreKLTerm | LabelCrossEntropyTerm | LabelMSETerm


Term = Annotated[
    CrossEntropyTerm
    | ForwardKLTerm
    | ReverseKLTerm
    | JensenShannonTerm
    | TotalVariationTerm
    | LogitMSETerm
    | MaskedKLTerm
    | HiddenMSETerm
    | HiddenCosineTerm
    | AttentionMSETerm
    | ScoreMSETerm
    | ScoreKLTerm
    | LabelCrossEntropyTerm
    | LabelMSETerm
    | TaskLossTerm,
    Field(discriminator="loss"),
]
