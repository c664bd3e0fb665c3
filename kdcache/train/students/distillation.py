"""A student and its objective as one module: what a step takes the gradients of.

One module, so that what wraps it for several ranks sees every parameter and every use of it.
"""

# B samples, N target positions, R rows of a signal, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.formats.signals import (
    AttentionRecord,
    ClassesRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
)
from kdcache.labels.coded_labels import CodedLabels
from kdcache.recipe import CrossEntropyTerm, LayersTerm, MaskedKLTerm, ScoreMSETerm, SoftTerm, Term
from kdcache.train.batches.batch import Batch, DenseRows, Masked, Scores
from kdcache.train.losses.fused_loss import LossTerm, fused_loss, hard_target
from kdcache.train.losses.layer_terms import LayersLoss, ScoresLoss
from kdcache.train.losses.linear_loss import DivergenceTerm, linear_losses
from kdcache.train.losses.masked_terms import MaskedLoss
from kdcache.train.losses.objective import Moment, Objective, Part
from kdcache.train.losses.soft_terms import divergence, sample_factors, soft_target
from kdcache.train.students.hypothesis_pass import decode_again
from kdcache.train.students.masked_pass import (
    MaskedPass,
    changes_nothing,
    plain_as_masked,
    run_masked,
)
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
        beside: what terms over layers and masked tokens learn, by the term's number.
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
        self._masks: dict[int, str] = {}  # the masks signal of terms over masked inputs
        sides = {"encoder": objective.source, "decoder": objective.target}
        width = int(getattr(student.config, "d_model", None) or student.config.hidden_size)
        for number, (where, term) in enumerate(zip(objective.paths, objective.terms, strict=True)):
            if isinstance(term, LayersTerm | MaskedKLTerm):
                masks = objective.records[term.signal].masks
                self._masks |= {} if masks is None else {number: masks}
            if isinstance(term, MaskedKLTerm):
                labels = objective.records[term.signal]
                assert isinstance(labels, LogitsRecord)
                self.beside[str(number)] = MaskedLoss(term, labels, width, seed)
            elif isinstance(term, LayersTerm):
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
        (total,), values = self.split(micro, counts, [moments])
        return total, values

    def split(
        self, micro: Batch, counts: Mapping[str, int], groups: Sequence[Sequence[Moment]]
    ) -> tuple[list[Tensor], Tensor]:
        """`forward` with a total for each of several groups of terms, of one pass of the student.

        Args:
            micro: on the student's device, with the hypotheses that are predicted as streams.
            counts: units of the global batch.
            groups: the terms that count now, each in one of them. The graphs of their totals
                share what the student computed.
        """
        moments = [one for group in groups for one in group]
        wanted = self._layers_of(moments, plain=True)
        predicted = self._predicted(moments, wanted)
        source, first = micro.streams[self.objective.source], predicted[0]
        outputs = run_student(self.student, source, micro.streams[first], wanted, self._linear)
        decoded = {first: outputs}
        for stream in predicted[1:]:
            target = micro.streams[stream]
            decoded[stream] = decode_again(self.student, source, outputs, target, self._linear)
        passes = self._masked_passes(micro, moments, outputs)
        totals: list[Tensor] = []
        values: dict[int, Tensor] = {}
        for group in groups:
            total = torch.zeros((), device=source.flat.device)
            for stream, read in decoded.items():
                parts = [(one, part) for one, part in self._parts(group) if part.stream == stream]
                if parts:
                    alone = len(groups) == 1
                    labels = micro.streams[stream].flat
                    sums, found = self._over_ids(micro, counts, labels, parts, read, alone)
                    total = total + sums
                    for (one, _), value in zip(parts, found, strict=True):
                        values[one.number] = values.get(one.number, 0) + value
            for one in group:
                if str(one.number) in self.beside:
                    states = passes.get(self._masks.get(one.number, ""), outputs)
                    value = self._beside(micro, counts, one, states)
                    total = total + one.weight * value
                    values[one.number] = value.detach()
            totals.append(total)
        none = totals[0].detach().new_zeros(())
        return totals, torch.stack([values.get(n, none) for n in range(len(self.objective.terms))])

    def _layers_of(self, moments: Sequence[Moment], plain: bool, masks: str = "") -> list[Layers]:
        """Layers that terms want of the pass over the source, or of one over masked inputs."""
        found = []
        for one in moments:
            of = self._masks.get(one.number, "")
            here = (not of or self._unchanged(of)) if plain else of == masks
            if here and one.number in self._wanted:
                found.append(self._wanted[one.number])
        return list(dict.fromkeys(found))

    def _unchanged(self, masks: str) -> bool:
        """Whether masked inputs are the source itself."""
        record = self.objective.records[masks]
        assert isinstance(record, MasksRecord)
        return changes_nothing(record)

    def _masked_passes(
        self, micro: Batch, moments: Sequence[Moment], outputs: StudentOutputs
    ) -> dict[str, MaskedPass]:
        """The encoder over the masked inputs that terms need, by masks signal."""
        source, passes = micro.streams[self.objective.source], {}
        for masks in dict.fromkeys(self._masks.get(one.number, "") for one in moments):
            if not masks:
                continue
            masked, wanted = micro.signals[masks], self._layers_of(moments, False, masks)
            assert isinstance(masked, Masked)
            if self._unchanged(masks):
                passes[masks] = plain_as_masked(outputs, source, masked, wanted)
            else:
                passes[masks] = run_masked(self.student, source, masked, wanted)
        return passes

    def _beside(
        self,
        micro: Batch,
        counts: Mapping[str, int],
        moment: Moment,
        outputs: StudentOutputs | MaskedPass,
    ) -> Tensor:
        """The loss of a term that may learn something beside the student."""
        term, module = self.objective.terms[moment.number], self.beside[str(moment.number)]
        count = self.objective.count(moment.number, counts)
        more = (moment.temperature,) if isinstance(module, MaskedLoss) else ()
        loss: Tensor = module(outputs, micro, self._factors(term, micro, None), count, *more)
        return loss

    def _parts(self, moments: Sequence[Moment]) -> list[tuple[Moment, Part]]:
        """What terms over the vocabulary are over."""
        return [(one, part) for one in moments for part in self.objective.parts[one.number]]

    def _predicted(self, moments: Sequence[Moment], wanted: Sequence[Layers]) -> list[str]:
        """Streams that the decoder predicts now.

        The reference comes first, where anything is over it. What a decoder does on its way is
        looked at there.
        """
        streams = [part.stream for _, part in self._parts(moments)]
        sides = [side for side, _ in wanted]
        target = self.objective.target
        first = [target] if not streams or target in streams or "decoder" in sides else []
        return list(dict.fromkeys([*first, *streams]))

    def _over_ids(
        self,
        micro: Batch,
        counts: Mapping[str, int],
        labels: Tensor,
        parts: Sequence[tuple[Moment, Part]],
        outputs: StudentOutputs,
        alone: bool,
    ) -> tuple[Tensor, Tensor]:
        """Total and values of terms over the same tokens, in the order of the terms.

        Args:
            micro: on the student's device.
            counts: units of the global batch.
            labels: [N] the tokens.
            parts: the terms and what they are over.
            outputs: what the student says of the tokens.
            alone: whether nothing else needs its logits afterwards.
        """
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
            rows = divergence(term) if isinstance(term, SoftTerm) else None
            places.append((rows is not None, len(sums) if rows is None else len(others)))
            if rows is None:
                sums.append(made)
            else:
                others.append(DivergenceTerm(rows, made))
        total, found = self._mixed(outputs, sums, others, alone)
        order = [number + len(sums) * late for late, number in places]
        return total, found[order]

    def _mixed(
        self,
        outputs: StudentOutputs,
        sums: list[LossTerm],
        others: list[DivergenceTerm],
        alone: bool,
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
            return fused_loss(logits, sums, inplace=alone)
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
        if isinstance(term, MaskedKLTerm):
            masked = micro.signals[self._masks[self.objective.terms.index(term)]]
            assert isinstance(masked, Masked)
            counts = masked.counts.sum(1)
        elif part is not None:
            counts = micro.streams[part.stream].mask.sum(1)
        else:
            assert isinstance(term, LayersTerm | ScoreMSETerm)
            described = micro.signals[term.signal]
            assert isinstance(described, DenseRows | Scores)
            counts = described.counts
            if isinstance(described, Scores):
                counts = counts // len(described.labels)
        return torch.repeat_interleave(factors, counts)
