"""A student and its objective as one module: what a step takes the gradients of.

One module, so that what wraps it for several ranks sees every parameter and every use of it.
"""

# B samples, N target positions, R rows of a signal, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.formats.signals import AttentionRecord, ClassesRecord, HiddenRecord
from kdcache.labels import CodedLabels
from kdcache.recipe import CrossEntropyTerm, LayersTerm, ScoreMSETerm, SoftTerm, Term
from kdcache.train.batches.batch import Batch, DenseRows, Scores
from kdcache.train.losses.fused_loss import LossTerm, fused_loss, hard_target
from kdcache.train.losses.layer_terms import LayersLoss, ScoresLoss
from kdcache.train.losses.linear_loss import DivergenceTerm, linear_losses
from kdcache.train.losses.objective import Moment, Objective, weighing_signal
from kdcache.train.losses.soft_terms import DIVERGENCES, sample_factors, soft_target
from kdcache.train.students.student import output_rows
from kdcache.train.students.student_outputs import (
    Layers,
    StudentOutputs,
    projects_linearly,
    run_student,
)


class Distillation(nn.Module):
    """A student, what some terms learn beside it, and the losses of both.

    Args:
        student: a transformers encoder-decoder.
        objective: which losses there are.
        seed: recipe seed, of what is learned beside the student.

    Attributes:
        student: as given.
        beside: what terms over layers learn, by the term's number.
        layers: dense signal to the teacher's numbers of the layers that are read.

    Raises:
        RecipeError: a term wants a layer that there is not.
        IdentityError: a term's signal describes a stream that the student does not read.
    """

    def __init__(self, student: Any, objective: Objective, seed: int) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self._linear = projects_linearly(student)
        self.vocab_size = objective.vocab_size(output_rows(student))
        self.beside = nn.ModuleDict()
        self.layers: dict[str, list[int]] = {}
        self._wanted: dict[int, Layers] = {}
        sides = {"encoder": objective.source, "decoder": objective.target}
        for number, (where, term) in enumerate(zip(objective.paths, objective.terms, strict=True)):
            if isinstance(term, LayersTerm):
                record = objective.records[term.signal]
                assert isinstance(record, HiddenRecord | AttentionRecord)
                loss = LayersLoss(where, term, record, sides, student.config, seed)
                self.beside[str(number)] = loss
                self._wanted[number] = loss.wanted
                read = {*self.layers.get(term.signal, []), *loss.layers}
                self.layers[term.signal] = sorted(read)
            elif isinstance(term, ScoreMSETerm):
                classes = objective.records[term.signal]
                assert isinstance(classes, ClassesRecord)
                width = int(getattr(student.config, "d_model", None) or student.config.hidden_size)
                self.beside[str(number)] = ScoresLoss(term, classes, objective.source, width, seed)
        if any(kind == "attention" for _, kind in self._wanted.values()):
            student.set_attn_implementation("eager")  # the others keep no probabilities

    def forward(
        self, micro: Batch, counts: Mapping[str, int], moments: Sequence[Moment]
    ) -> tuple[Tensor, Tensor]:
        """The losses of a micro-batch, as parts of the means over its global batch.

        Every unit weighs 1 / (those of the global batch), so the losses of all micro-batches add
        up to the mean, however it was cut.

        Args:
            micro: on the student's device.
            counts: units of the global batch, see `GlobalBatch`.
            moments: the terms that count now.

        Returns:
            The weighted total, a scalar, and [terms] detached values before their weights, 0 for
            those that do not count now.
        """
        target = micro.streams[self.objective.target]
        read = [self._wanted[one.number] for one in moments if one.number in self._wanted]
        wanted = list(dict.fromkeys(read))
        outputs = run_student(
            self.student,
            micro.streams[self.objective.source],
            target,
            list(dict.fromkeys(wanted)),
            self._linear,
        )
        total = torch.zeros((), device=target.flat.device)
        values: dict[int, Tensor] = {}
        over_ids = [one for one in moments if str(one.number) not in self.beside]
        if over_ids:
            total, found = self._over_ids(micro, counts, over_ids, outputs)
            values |= {one.number: value for one, value in zip(over_ids, found, strict=True)}
        for one in moments:
            if str(one.number) not in self.beside:
                continue
            term = self.objective.terms[one.number]
            count = counts[term.signal]  # type: ignore[union-attr]
            factors = self._factors(term, micro)
            value = self.beside[str(one.number)](outputs, micro, factors, count)
            total = total + one.weight * value
            values[one.number] = value.detach()
        none = total.detach().new_zeros(())
        return total, torch.stack([values.get(n, none) for n in range(len(self.objective.terms))])

    def _over_ids(
        self,
        micro: Batch,
        counts: Mapping[str, int],
        moments: Sequence[Moment],
        outputs: StudentOutputs,
    ) -> tuple[Tensor, Tensor]:
        """Total and values of the terms over the vocabulary, in the order of the moments."""
        labels = micro.streams[self.objective.target].flat
        share = 1 / max(1, counts[self.objective.target])
        sums: list[LossTerm] = []
        others: list[DivergenceTerm] = []
        places: list[tuple[bool, int]] = []  # whether among the others, and which of them
        for one in moments:
            term = self.objective.terms[one.number]
            if isinstance(term, CrossEntropyTerm):
                target = hard_target(labels, self.vocab_size, term.label_smoothing)
            else:
                assert isinstance(term, SoftTerm)
                coded = micro.signals[term.signal]
                assert isinstance(coded, CodedLabels)
                target = soft_target(coded, term, one.temperature, self.vocab_size)
            row_weight = torch.full((len(labels),), share, device=labels.device)
            factors = self._factors(term, micro)
            row_weight = row_weight if factors is None else row_weight * factors
            made = LossTerm(target, one.temperature, one.weight, row_weight)
            rows = DIVERGENCES.get(term.loss)
            places.append((rows is not None, len(sums) if rows is None else len(others)))
            if rows is None:
                sums.append(made)
            else:
                others.append(DivergenceTerm(rows, made))
        total, found = self._mixed(outputs, sums, others)
        order = [number + len(sums) * late for late, number in places]
        return total, found[order]

    def _mixed(
        self, outputs: StudentOutputs, sums: list[LossTerm], others: list[DivergenceTerm]
    ) -> tuple[Tensor, Tensor]:
        """The losses over logits that are made piece by piece, where the student allows that."""
        if outputs.projected is not None:
            projected = outputs.projected.narrowed(self.vocab_size)
            weight, bias = projected.weight, projected.bias
            return linear_losses(projected.hidden, weight, bias, sums, others)
        assert outputs.logits is not None
        logits = outputs.logits
        if logits.shape[1] > self.vocab_size:
            logits = logits[:, : self.vocab_size].contiguous()
        if not others:
            return fused_loss(logits, sums, inplace=True)
        total, values = logits.new_zeros((), dtype=torch.float32), []
        if sums:
            total, found = fused_loss(logits, sums)
            values = list(found)
        for one in others:
            row_weight = one.term.row_weight
            assert row_weight is not None
            losses = one.rows(logits, one.term.target, one.term.temperature)
            value = (losses * row_weight).sum()
            total = total + one.term.weight * value
            values.append(value.detach())
        return total, torch.stack(values)

    def _factors(self, term: Term, micro: Batch) -> Tensor | None:
        """[R] factors of the units of a term; None where all count alike."""
        weighing = weighing_signal("", term)
        if weighing is None or term.sample_weight is None:
            return None
        coded = micro.signals[weighing]
        assert isinstance(coded, CodedLabels)
        mask = micro.streams[self.objective.target].mask
        factors = sample_factors(term.sample_weight, coded, mask)  # [B]
        if isinstance(term, CrossEntropyTerm | SoftTerm):
            counts = mask.sum(1)
        else:
            described = micro.signals[term.signal]
            assert isinstance(described, DenseRows | Scores)
            counts = described.counts
            if isinstance(described, Scores):
                counts = counts // len(described.labels)
        return torch.repeat_interleave(factors, counts)
