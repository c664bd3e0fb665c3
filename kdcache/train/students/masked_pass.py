"""The student's encoder over a masked source, beside its pass over the source as it is.

Each replica that is read, one or all of them (`train.replicas`), is a row of its own, in the order
of the signal.
"""

# B samples, R replicas that are read, S source positions, K masked tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.formats.signals import MasksRecord
from kdcache.train.batches.batch import Masked, Tokens
from kdcache.train.students.student_outputs import Layers, StudentOutputs


@dataclass(frozen=True)
class MaskedPass:
    """What the encoder makes of masked inputs, replica after replica of each sample.

    Attributes:
        layers: what was asked for: each [B * R, S, D].
        encoded: [B * R, S, D] last states.
        mask: [B * R, S] bool, true on tokens.
        rows: [K] int64 which of the B * R rows each masked token is in, ascending.
        positions: [K] int64 where it is there.
    """

    layers: dict[Layers, tuple[Tensor, ...]]
    encoded: Tensor
    mask: Tensor
    rows: Tensor
    positions: Tensor

    @property
    def masked_states(self) -> Tensor:
        """[K, D] last states at the masked positions, in the order of labels there."""
        return self.encoded[self.rows, self.positions]


def changes_nothing(record: MasksRecord) -> bool:
    """Whether all chosen tokens stay as they are, so that the source itself is what is read."""
    shares = record.parameters
    return shares.get("mask_share", 1.0) == 0 and shares.get("random_share", 0.0) == 0


def masked_ids(source: Tokens, masked: Masked) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a masked pass.

    Args:
        source: B samples.
        masked: of the same samples.

    Returns:
        [B * R, S] int64 ids, the masked ones in their places; [B * R, S] bool mask; and [K] int64
        the row of each masked token.
    """
    replicas = masked.counts.shape[1]
    ids = source.ids.repeat_interleave(replicas, 0)
    numbers = torch.arange(len(ids), device=ids.device)
    rows = torch.repeat_interleave(numbers, masked.counts.flatten())
    ids[rows, masked.positions] = masked.ids
    return ids, source.mask.repeat_interleave(replicas, 0), rows


def run_masked(model: Any, source: Tokens, masked: Masked, wanted: Sequence[Layers]) -> MaskedPass:
    """A pass of the encoder over masked inputs.

    Args:
        model: a transformers encoder-decoder.
        source: what its encoder reads otherwise.
        masked: which of these tokens are masked, and what stands there.
        wanted: layers to keep, all of them hidden states of the encoder.
    """
    ids, mask, rows = masked_ids(source, masked)
    out = model.get_encoder()(
        input_ids=ids,
        attention_mask=mask.long(),
        output_hidden_states=bool(wanted),
        return_dict=True,
    )
    layers = dict.fromkeys(wanted, out.hidden_states)
    return MaskedPass(layers, out.last_hidden_state, mask, rows, masked.positions)


def plain_as_masked(
    outputs: StudentOutputs, source: Tokens, masked: Masked, wanted: Sequence[Layers]
) -> MaskedPass:
    """The pass over the source, as one over masks that change no token.

    Args:
        outputs: of that pass, with the layers that are wanted.
        source: what was read.
        masked: the chosen positions.
        wanted: layers to keep.
    """
    replicas = masked.counts.shape[1]
    _, mask, rows = masked_ids(source, masked)

    def repeated(states: Tensor) -> Tensor:
        return states if replicas == 1 else states.repeat_interleave(replicas, 0)

    layers = {key: tuple(map(repeated, outputs.layers[key])) for key in wanted}
    return MaskedPass(layers, repeated(outputs.encoded), mask, rows, masked.positions)
