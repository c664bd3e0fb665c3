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
from kdcache.train.losses.objective import Moment, Objective, Part
from kdcache.train.losses.soft_terms import DIVERGENCES, sample_factors, soft_target
from kdcache.train.students.hypothesis_pass import decode_again
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
            micro: on the student's device, with the hypotheses that are predicted as streams.
            counts: units of the global batch, see `GlobalBatch`.
            moments: the terms that count now.

        Returns:
            The weighted total, a scalar, and [terms] detached values before their weights, 0 for
            those that do not count now.
        """
        read = [self._wanted[one.number] for one in moments if one.number in self._wanted]
        wanted = list(dict.fromkeys(read))
        predicted = self._predicted(moments, wanted)
        source, first = micro.streams[self.objective.source], next(iter(predicted))
        outputs = run_student(self.student, source, micro.streams[first], wanted, self._linear)
        total = torch.zeros((), device=source.flat.device)
        values: dict[int, Tensor] = {}
        for stream, terms in predicted.items():
            decoded = outputs
            if stream != first:
                target = micro.streams[stream]
                decoded = decode_again(self.student, source, outputs, target, self._linear)
            if terms:
                part, found = self._over_ids(micro, counts, stream, terms, decoded)
                total = total + part
                for (one, _), value in zip(terms, found, strict=True):
                    values[one.number] = values.get(one.number, 0) + value
        for one in moments:
            if str(one.number) not in self.beside:
                continue
            term = self.objective.terms[one.number]
            count = self.objective.count(one.number, counts)
            factors = self._factors(term, micro, None)
            value = self.beside[str(one.number)](outputs, micro, factors, count)
            total = total + one.weight * value
            values[one.number] = value.detach()
        none = total.detach().new_zeros(())
        return total, torch.stack([values.get(n, none) for n in range(len(self.objective.terms))])

    def _predicted(
        self, moments: Sequence[Moment], wanted: Sequence[Layers]
    ) -> dict[str, list[tuple[Moment, Part]]]:
        """What the decoder predicts now, stream by stream, to the terms over its vocabulary.

        The reference comes first, where anything is over it. What a decoder does on its way is
        looked at there.
        """
        found: dict[str, list[tuple[Moment, Part]]] = {}
        parts = [(one, part) for one in moments for part in self.objective.parts[one.number]]
        streams = [part.stream for _, part in parts]
        sides = [side for side, _ in wanted]
        target = self.objective.target
        if not streams or target in streams or "decoder" in sides:
            found[target] = []
        for one, part in parts:
            found.setdefault(part.stream, []).append((one, part))
        return found

    def _over_ids(
        self,
        micro: Batch,
        counts: Mapping[str, int],
        stream: str,
        parts: Sequence[tuple[Moment, Part]],
        outputs: StudentOutputs,
    ) -> tuple[Tensor, Tensor]:
        """Total and values of the terms over the tokens of a stream, in their order."""
        labels = micro.streams[stream].flat
        sums: list[LossTerm] = []
        others: list[DivergenceTerm] = []
        places: list[tuple[bool, int]] = []  # whether among the others, and which of them
        for one, part in parts:
            term = self.objective.terms[one.number]
            share = 1 / self.objective.count(one.number, counts)
            if isinstance(term, CrossEntropyTerm):
                target = hard_target(labels, self.vocab_size, term.label_smoothing)
            else:
                assert isinstance(term, SoftTerm)
                assert part.signal is not None
                coded = micro.signals[part.signal]
                assert isinstance(coded, CodedLabels)
                target = soft_target(coded, term, one.temperature, self.vocab_size)
            row_weight = torch.full((len(labels),), share, device=labels.device)
            factors = self._factors(term, micro, part)
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

    def _factors(self, term: Term, micro: Batch, part: Part | None) -> Tensor | None:
        """[R] factors of the units of a term, or of its part; None where all count alike."""
        if term.sample_weight is None:
            return None
        weighing = term.sample_weight.signal or (None if part is None else part.signal)
        assert weighing is not None  # or the objective is refused
        coded = micro.signals[weighing]
        assert isinstance(coded, CodedLabels)
        mask = micro.streams[self.objective.stream_of(weighing)].mask
        factors = sample_factors(term.sample_weight, coded, mask)  # [B]
        if part is not None:
            counts = micro.streams[part.stream].mask.sum(1)
        else:
            assert isinstance(term, LayersTerm | ScoreMSETerm)
            described = micro.signals[term.signal]
            assert isinstance(described, DenseRows | Scores)
            counts = described.counts
            if isinstance(described, Scores):
                counts = counts // len(described.labels)
        return torch.repeat_interleave(factors, counts)
