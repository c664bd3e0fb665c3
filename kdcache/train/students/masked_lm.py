"""A masked LM and its objective as one module: one pass over every masking of a batch."""

# B samples, R replicas, S positions, K masked tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.models.passes import project_first, project_only
from kdcache.train.batches.batch import Batch, Masked, Tokens
from kdcache.train.losses.masked_objective import MaskedObjective
from kdcache.train.losses.objective import Moment, Objective, Part
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.masked_pass import masked_ids
from kdcache.train.students.student_outputs import StudentOutputs, projected_by


class MaskedDistillation(Distillation):
    """A masked LM, and the losses of what it says of masked tokens.

    Args:
        student: a transformers masked LM.
        objective: which losses there are.
        seed: recipe seed.
    """

    objective: MaskedObjective

    def __init__(self, student: Any, objective: Objective, seed: int) -> None:
        assert isinstance(objective, MaskedObjective)
        super().__init__(student, objective, seed)

    def split(
        self, micro: Batch, counts: Mapping[str, int], groups: Sequence[Sequence[Moment]]
    ) -> tuple[list[Tensor], Tensor]:
        """As of an encoder-decoder, over the masked tokens in place of a target's."""
        tokens, masked = masked_inputs(micro, self.objective)
        outputs = self._run(tokens, masked)
        labels = masked_labels(tokens, masked)
        totals, values = [], labels.new_zeros(len(self.objective.terms), dtype=torch.float32)
        for group in groups:
            parts, alone = self._parts(group), len(groups) == 1
            if not parts:
                totals.append(values.new_zeros(()))
                continue
            total, found = self._over_ids(micro, counts, labels, parts, outputs, alone)
            totals.append(total)
            values = values.to(found).index_add(0, numbers_of(parts, found.device), found)
        return totals, values

    def _run(self, tokens: Tokens, masked: Masked) -> StudentOutputs:
        """What the student says of the masked tokens."""
        return run_masked_lm(self.student, tokens, masked, self._linear)


def numbers_of(parts: Sequence[tuple[Moment, Part]], device: torch.device) -> Tensor:
    """[parts] int64 which term each is a part of."""
    return torch.tensor([one.number for one, _ in parts], device=device)


def masked_inputs(micro: Batch, objective: MaskedObjective) -> tuple[Tokens, Masked]:
    """What a masked LM reads of a batch, and which of it is masked."""
    masked = micro.signals[objective.masks]
    assert isinstance(masked, Masked)
    return micro.streams[objective.source], masked


def masked_labels(tokens: Tokens, masked: Masked) -> Tensor:
    """[K] int64 what stood where tokens are masked, sample after sample, replica after replica."""
    samples = torch.arange(len(tokens.ids), device=tokens.ids.device)
    sample = torch.repeat_interleave(samples, masked.counts.sum(1))
    return tokens.ids[sample, masked.positions]


def run_masked_lm(model: Any, tokens: Tokens, masked: Masked, linear: bool) -> StudentOutputs:
    """A forward pass over all maskings; nothing is projected but masked tokens.

    Args:
        model: a transformers masked LM.
        tokens: B samples.
        masked: which of their tokens are masked, and what stands there.
        linear: what `projects_linearly` says of the model.

    Returns:
        `projected` or `logits` of the K masked tokens; no layers, and nothing encoded.
    """
    ids, mask, rows = masked_ids(tokens, masked)
    chosen = torch.zeros_like(mask)
    chosen[rows, masked.positions] = True  # in the order of the labels: both ascend
    more = {}
    if tokens.segments is not None:
        more["token_type_ids"] = tokens.segments.repeat_interleave(masked.counts.shape[1], 0)
    gate = project_first if linear else project_only
    with gate(model, chosen) as kept:
        out = model(input_ids=ids, attention_mask=mask.long(), **more)
    return StudentOutputs(
        projected=projected_by(model, kept[0]) if linear and kept is not None else None,
        logits=None if linear else out.logits,
        layers={},
        encoded=ids.new_zeros(0),
    )
