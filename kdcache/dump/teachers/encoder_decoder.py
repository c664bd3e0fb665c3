"""Teachers that read a source and write a target: Marian, T5, BART, mBART and their like."""

# B batch, S source positions, T target positions

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.dump.batches import Batch
from kdcache.dump.teachers.model import LanguageTeacher
from kdcache.errors import ModelError
from kdcache.formats.signals import Side
from kdcache.models.passes import project_only, shift_in_place, shift_right


class EncoderDecoderTeacher(LanguageTeacher):
    """`ids` are the labels where the decoder speaks, and what is read where the encoder does."""

    kind = "encoder_decoder"
    signals = ("logits", "hidden", "attention", "beams")
    places = ("targets", "segment", "segment_in_place")
    sides = ("encoder", "decoder")

    def predict_inputs(self, batch: Batch) -> dict[str, Any]:
        """The source, and the labels shifted right."""
        if batch.source_ids is None or batch.source_mask is None:
            raise ModelError(
                f"{self.record.path}: an encoder-decoder's decoder side needs a source; the "
                "batch has none"
            )
        inputs = self.inputs(self.model, Batch(batch.source_ids, batch.source_mask))
        if batch.seen is not None:
            start = decoder_start(self.model)
            inputs["decoder_input_ids"] = shift_in_place(batch.ids, batch.seen, self.pad_id, start)
            inputs["decoder_attention_mask"] = batch.seen.long()
        elif batch.from_start:
            labels = batch.ids.masked_fill(~batch.mask, -100)
            inputs["decoder_input_ids"] = shift_right(
                labels, self.pad_id, decoder_start(self.model)
            )
        else:
            inputs["decoder_input_ids"] = self.decoder_inputs(batch.ids, batch.mask)
        return inputs

    def decoder_inputs(self, labels: Tensor, label_mask: Tensor) -> Tensor:
        """[B, T] labels shifted right, the way the model itself does it.

        Args:
            labels: [B, T] int64, padded on the right with anything.
            label_mask: [B, T] bool.

        Raises:
            ModelError: the model's config does not say what a decoder starts with.
        """
        masked = labels.masked_fill(~label_mask, -100)
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            inputs: Tensor = shift(labels=masked)
            return inputs
        start = self.model.config.decoder_start_token_id
        if start is None:
            raise ModelError(f"{self.record.path}: its config has no decoder_start_token_id")
        return shift_right(masked, self.pad_id, int(start))

    def _describe(
        self, batch: Batch, side: Side, options: dict[str, bool], wanted: str
    ) -> Sequence[Tensor] | None:
        """The encoder alone, or the decoder behind it; no logits are made."""
        if side == "encoder":
            encoder = self.model.get_encoder()
            return getattr(encoder(**self.inputs(encoder, batch), **options), wanted, None)
        inputs = self.predict_inputs(batch)
        with project_only(self.model, torch.zeros_like(batch.mask)):
            outputs = self.model(**inputs, **options)
        return getattr(outputs, f"decoder_{wanted}", None)


def decoder_start(model: Any) -> int:
    """The token that a decoder reads before it has written any.

    Raises:
        ModelError: neither the model's generation config nor its config says.
    """
    for found in (
        model.generation_config.decoder_start_token_id,
        getattr(model.config, "decoder_start_token_id", None),
        model.generation_config.bos_token_id,
    ):
        if found is not None:
            return int(found)
    raise ModelError(
        f"{model.name_or_path or type(model).__name__}: its generation_config.json has no "
        "decoder_start_token_id; add the id that its decoder begins with"
    )
