"""A classifier and its objective as one module."""

# B samples, S positions, C classes

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.formats.signals import AttentionRecord, HiddenRecord
from kdcache.recipe import (
    LabelCrossEntropyTerm,
    LabelMSETerm,
    LayersTerm,
    ScoreKLTerm,
    ScoreMSETerm,
)
from kdcache.train.batches.batch import Batch, Scores, Tokens
from kdcache.train.losses.class_losses import label_cross_entropy, label_mse
from kdcache.train.losses.classifier_objective import ClassifierObjective
from kdcache.train.losses.layer_terms import LayersLoss
from kdcache.train.losses.objective import Moment
from kdcache.train.losses.score_terms import scores_loss
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.student_outputs import Layers, StudentOutputs


class ClassifierDistillation(Distillation):
    """A sequence classification model, and the losses of its scores and layers.

    Args:
        student: a transformers sequence classification model.
        objective: which losses there are.
        seed: recipe seed, of what terms over layers learn beside the student.

    Raises:
        RecipeError: a term wants a layer that there is not.
        IdentityError: a term's signal describes another stream than the student reads.
    """

    objective: ClassifierObjective

    def __init__(self, student: Any, objective: ClassifierObjective, seed: int) -> None:
        nn.Module.__init__(self)  # there is no vocabulary
        self.student, self.objective = student, objective
        self.beside = nn.ModuleDict()
        self.layers, self._wanted = {}, {}
        for number, (where, term) in enumerate(zip(objective.paths, objective.terms, strict=True)):
            if not isinstance(term, LayersTerm):
                continue
            record = objective.records[term.signal]
            assert isinstance(record, HiddenRecord | AttentionRecord)
            reads = {"encoder": objective.source}
            loss = LayersLoss(where, term, record, reads, student.config, seed)
            self.beside[str(number)], self._wanted[number] = loss, loss.wanted
            read = {*self.layers.get(term.signal, []), *loss.layers}
            self.layers[term.signal] = sorted(read)
        if any(kind == "attention" for _, kind in self._wanted.values()):
            student.set_attn_implementation("eager")  # the others keep no probabilities

    def split(
        self, micro: Batch, counts: Mapping[str, int], groups: Sequence[Sequence[Moment]]
    ) -> tuple[list[Tensor], Tensor]:
        """As of an encoder-decoder, over the samples that a term has a label or scores of."""
        numbers = {one.number for group in groups for one in group}
        wanted = [layers for number, layers in self._wanted.items() if number in numbers]
        outputs = class_outputs(self.student, micro.streams[self.objective.source], wanted)
        logits = outputs.logits
        assert logits is not None
        totals, values = [], logits.new_zeros(len(self.objective.terms), dtype=torch.float32)
        for group in groups:
            total = (logits.float() * 0.0).sum()  # a step without any label moves nothing
            for one in group:
                count = self.objective.count(one.number, counts)
                if str(one.number) in self.beside:
                    loss = self.beside[str(one.number)](outputs, micro, None, count)
                else:
                    loss = self._loss(one, logits, micro, 1 / count)
                total = total + one.weight * loss
                values[one.number] = loss.detach()
            totals.append(total)
        return totals, values

    def _loss(self, moment: Moment, logits: Tensor, micro: Batch, share: float) -> Tensor:
        """A term before its weight, every sample by a factor."""
        term = self.objective.terms[moment.number]
        if isinstance(term, LabelCrossEntropyTerm | LabelMSETerm):
            assert micro.gold is not None
            hard = label_mse if isinstance(term, LabelMSETerm) else label_cross_entropy
            return hard(logits, micro.gold, share)
        assert isinstance(term, ScoreMSETerm | ScoreKLTerm)
        scores = micro.signals[term.signal]
        assert isinstance(scores, Scores)
        return scores_loss(term, logits, scores, moment.temperature, share)


def class_scores(model: Any, tokens: Tokens) -> Tensor:
    """[B, C] scores of B texts or pairs, see `class_outputs`."""
    scores = class_outputs(model, tokens, ()).logits
    assert scores is not None
    return scores


def class_outputs(model: Any, tokens: Tokens, wanted: Sequence[Layers]) -> StudentOutputs:
    """[B, C] scores of B texts or pairs as logits, and what lies on the way.

    Args:
        model: a transformers sequence classification model.
        tokens: what it reads; token types go in where its forward takes them.
        wanted: layers to keep, all of the encoder.

    Raises:
        ModelError: a token type has no row.
    """
    more: dict[str, Any] = {}
    if tokens.segments is not None and takes_segments(model):
        known = getattr(model.config, "type_vocab_size", None)
        if known is not None and int(tokens.segments.max()) >= known:
            raise ModelError(
                f"student: has {known} token types, its stream has type "
                f"{int(tokens.segments.max())}; set train.student.config.type_vocab_size, or "
                "dump with a tokenizer of the student's kind"
            )
        more["token_type_ids"] = tokens.segments
    kinds = {kind for _, kind in wanted}
    more |= {"output_hidden_states": True} if "hidden" in kinds else {}
    more |= {"output_attentions": True} if "attention" in kinds else {}
    out = model(input_ids=tokens.ids, attention_mask=tokens.mask.long(), **more)
    kept = {"hidden": "hidden_states", "attention": "attentions"}
    layers = {layer: tuple(out[kept[layer[1]]]) for layer in wanted}
    return StudentOutputs(None, out.logits, layers, out.logits.new_zeros(0))


def takes_segments(model: Any) -> bool:
    """Whether a model reads token types."""
    return "token_type_ids" in inspect.signature(model.forward).parameters
