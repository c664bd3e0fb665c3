"""An encoder-decoder that predicts masked segments (MASS), and its objective as one module."""

# B samples, R replicas, S positions, K masked tokens, D hidden, V vocabulary

from __future__ import annotations

from typing import Any

import torch

from kdcache.models.passes import project_first, project_only, shift_in_place
from kdcache.train.batches.batch import Masked, Tokens
from kdcache.train.students.masked_lm import MaskedDistillation
from kdcache.train.students.masked_pass import masked_ids
from kdcache.train.students.student import decoder_start
from kdcache.train.students.student_outputs import StudentOutputs, projected_by


class SegmentDistillation(MaskedDistillation):
    """An encoder-decoder, and the losses of what it says of masked segments.

    Args:
        student: a transformers encoder-decoder.
        objective: which losses there are.
        seed: recipe seed.
    """

    def _run(self, tokens: Tokens, masked: Masked) -> StudentOutputs:
        """What the decoder says of the segments."""
        return run_segments(self.student, tokens, masked, self._linear)


def run_segments(model: Any, tokens: Tokens, masked: Masked, linear: bool) -> StudentOutputs:
    """A pass over all maskings: the encoder reads what is left, the decoder writes the rest.

    Every token of a segment stands at its position in the text, and the decoder sees those of the
    segment before it alone: no token that the encoder reads.

    Args:
        model: a transformers encoder-decoder.
        tokens: B samples.
        masked: which of their tokens are masked, and what the encoder reads there.
        linear: what `projects_linearly` says of the model.

    Returns:
        `projected` or `logits` of the K masked tokens; no layers, and nothing encoded.

    Source: Song et al. 2019, MASS, section 3.2.
    """
    ids, mask, rows = masked_ids(tokens, masked)  # [B * R, S]
    seen = torch.zeros_like(mask)
    seen[rows, masked.positions] = True  # in the order of the labels: both ascend
    truth = tokens.ids.repeat_interleave(masked.counts.shape[1], 0)
    gate = project_first if linear else project_only
    with gate(model, seen) as kept:
        out = model(
            input_ids=ids,
            attention_mask=mask.long(),
            decoder_input_ids=shift_in_place(truth, seen, pad=0, start=decoder_start(model)),
            decoder_attention_mask=seen.long(),
            use_cache=False,
        )
    return StudentOutputs(
        projected=projected_by(model, kept[0]) if linear and kept is not None else None,
        logits=None if linear else out.logits,
        layers={},
        encoded=ids.new_zeros(0),
    )
