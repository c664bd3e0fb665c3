"""Another pass of a student's decoder, over a hypothesis, on what its encoder has made already."""

# B samples, S source positions, N target tokens, D hidden, V vocabulary

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutput

from kdcache.models.passes import project_first, project_only, shift_right
from kdcache.train.batches.batch import Tokens
from kdcache.train.students.student import decoder_start
from kdcache.train.students.student_outputs import StudentOutputs, projected_by


def decode_again(
    model: Any, source: Tokens, outputs: StudentOutputs, target: Tokens, linear: bool
) -> StudentOutputs:
    """Predict other targets of the same sources; the encoder does not run again.

    Its states are those of the first pass, dropout included, and get the gradients of both.

    Args:
        model: a transformers encoder-decoder.
        source: what the encoder has read.
        outputs: of the pass in which it did, see `run_student`.
        target: what the decoder predicts; its tokens stand before all padding.
        linear: what `projects_linearly` says of the model.

    Returns:
        Of this pass, without layers.
    """
    gate = project_first if linear else project_only
    with gate(model, target.mask) as kept:
        out = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=outputs.encoded),
            attention_mask=source.mask.long(),
            decoder_input_ids=shift_right(target.ids, pad=0, start=decoder_start(model)),
            use_cache=False,
        )
    return StudentOutputs(
        projected=projected_by(model, kept[0]) if kept is not None else None,
        logits=None if linear else out.logits,
        layers={},
        encoded=outputs.encoded,
    )
