"""A teacher that is one transformers model: its inputs, its stacks, its predictions in pieces."""

# B batch, T positions, N positions that are predicted, V vocabulary, L chosen layers, D hidden,
# H heads

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.dump.batches import Batch
from kdcache.dump.teacher import Teacher
from kdcache.errors import ModelError
from kdcache.formats.signals import Side, TeacherRecord
from kdcache.models.passes import output_projection, project_first, project_only, recorded, replayed
from kdcache.models.positions import max_positions

#: What a model is asked for, and the words of a message.
WANTED = {"hidden_states": "hidden states", "attentions": "attentions"}


class ModelTeacher(Teacher):
    """A loaded transformers model, in eval mode."""

    signals: tuple[str, ...] = ("hidden", "attention")

    def __init__(
        self, model: Any, record: TeacherRecord, device: torch.device, has_attention: bool = True
    ) -> None:
        """Take over a loaded model.

        Args:
            model: a transformers model that lies where it will run.
            record: what identifies it.
            device: where its inputs go.
            has_attention: whether it was loaded so that it gives attentions.
        """
        self.model = model.eval().requires_grad_(False)
        self.record = record
        self.device = device
        self.input_size: int | None = int(model.get_input_embeddings().weight.shape[0])
        self.max_positions = max_positions(model.config)
        pad = getattr(model.config, "pad_token_id", None)
        self.pad_id = 0 if pad is None else int(pad)
        self.members = [self.model]
        self._has_attention = has_attention
        self._shapes: dict[tuple[Side, str], tuple[int, int]] = {}

    def num_layers(self, side: Side) -> int:
        """Layers of one side, its embedding output not counted."""
        return self._shape(side, "hidden_states")[0] - 1

    def width(self, side: Side) -> int:
        """D, the size of one side's hidden states."""
        return self._shape(side, "hidden_states")[1]

    def heads(self, side: Side) -> int:
        """H, the attention heads of one side."""
        return self._shape(side, "attentions")[1]

    @torch.inference_mode()
    def hidden(self, batch: Batch, side: Side, layers: Sequence[int]) -> Tensor:
        """[B, T, L, D] hidden states of some layers, see `Teacher.hidden`."""
        found = self._described(batch, side, "hidden_states")
        self._check_layers(layers, range(len(found)), side)
        chosen = [found[layer].to(self.device) for layer in layers]
        return torch.stack(chosen, dim=2)

    @torch.inference_mode()
    def attention(self, batch: Batch, side: Side, layers: Sequence[int]) -> Tensor:
        """[B, L, H, T, T] self-attention of some layers, see `Teacher.attention`."""
        found = self._described(batch, side, "attentions")
        self._check_layers(layers, range(1, len(found) + 1), side)
        chosen = [found[layer - 1].to(self.device) for layer in layers]
        return torch.stack(chosen, dim=1)

    def _check_layers(self, layers: Sequence[int], known: range, side: Side) -> None:
        """A layer that does not exist is refused, negative numbers too."""
        for layer in layers:
            if layer not in known:
                raise ModelError(
                    f"{self.record.path}: its {side} has no layer {layer}; expected "
                    f"{known.start} to {known.stop - 1}"
                )

    @torch.inference_mode()
    def _shape(self, side: Side, wanted: str) -> tuple[int, int]:
        """Tensors and their second size, found by reading one token; some configs do not say."""
        if (side, wanted) not in self._shapes:
            one = torch.full((1, 1), self._probe_id(), device=self.device)
            mask = torch.ones_like(one, dtype=torch.bool)
            found = self._described(Batch(one, mask, None, one, mask), side, wanted)
            size = found[-1].shape[-1 if wanted == "hidden_states" else 1]
            self._shapes[side, wanted] = len(found), int(size)
        return self._shapes[side, wanted]

    def _probe_id(self) -> int:
        """A token that every model reads: padding is one that some trip over."""
        return 1 if self.pad_id == 0 else 0

    def _described(self, batch: Batch, side: Side, wanted: str) -> Sequence[Tensor]:
        """All layers' tensors of one side, in the model's own order."""
        if side not in self.sides:
            raise ModelError(
                f"{self.record.path}: a teacher of kind {self.kind} has no {side} side; expected "
                f"side {' or '.join(self.sides)}"
            )
        if wanted == "attentions" and not self._has_attention:
            raise ModelError(
                f"{self.record.path}: it was loaded without attentions; load it with "
                "needs_attention"
            )
        found = self._describe(batch, side, {f"output_{wanted}": True}, wanted)
        # Some implementations give an empty tuple, or nothing in place of a layer's tensor.
        if not found or any(layer is None for layer in found):
            raise ModelError(
                f"{self.record.path}: {type(self.model).__name__} gives no {WANTED[wanted]}; "
                "leave out the signal"
            )
        return found

    def _describe(
        self, batch: Batch, side: Side, options: dict[str, bool], wanted: str
    ) -> Sequence[Tensor] | None:
        """The stack of a model that has one."""
        body = self.model.base_model
        return getattr(body(**self.inputs(body, batch), **options), wanted, None)

    def inputs(self, module: nn.Module, batch: Batch) -> dict[str, Any]:
        """What a module reads of `batch.ids`, in the words of its forward."""
        inputs: dict[str, Any] = {
            "input_ids": batch.ids,
            "attention_mask": batch.mask.to(torch.long),
        }
        names = parameters(module)
        if "use_cache" in names:
            inputs["use_cache"] = False
        if batch.segments is not None and "token_type_ids" in names:
            self._check_segments(batch.segments)
            inputs["token_type_ids"] = batch.segments
        return inputs

    def _check_segments(self, segments: Tensor) -> None:
        """A token type without a row would end the process on a device."""
        known = getattr(self.model.config, "type_vocab_size", None)
        most = int(segments.max())
        if known is not None and most >= known:
            raise ModelError(
                f"{self.record.path}: it has {known} token types, the stream has type {most}; "
                "use the teacher's own tokenizer"
            )


class LanguageTeacher(ModelTeacher):
    """A model with logits over a vocabulary."""

    signals: tuple[str, ...] = ("logits", "hidden", "attention")

    def __init__(
        self, model: Any, record: TeacherRecord, device: torch.device, has_attention: bool = True
    ) -> None:
        super().__init__(model, record, device, has_attention)
        projection = model.get_output_embeddings()
        if projection is None:
            raise ModelError(
                f"{record.path}: {type(model).__name__} has no output projection; expected a "
                f"{self.kind} model"
            )
        self.vocab_size: int = int(projection.weight.shape[0])

    @torch.inference_mode()
    def logits(self, batch: Batch, at: Tensor) -> Tensor:
        """[N, V] logits that predict some tokens, see `Teacher.logits`."""
        return self._forward(self.predict_inputs(batch), self.predicting(at))

    @torch.inference_mode()
    def logits_in_pieces(self, batch: Batch, at: Tensor, piece_entries: int) -> Iterator[Tensor]:
        """[R, V] pieces of `logits`, see `Teacher.logits_in_pieces`."""
        rows = max(1, piece_entries // self.vocab_size)
        inputs, mask = self.predict_inputs(batch), self.predicting(at)
        if not mask.any():
            yield self._forward(inputs, mask)
            return
        body = self.model.base_model
        with project_first(self.model, mask) as kept, recorded(body) as outputs:
            first = self.model(**inputs).logits  # [1, V]
        (hidden,) = kept  # [N, D]
        if torch.equal(self._project(hidden[:1]), first):
            for piece in torch.split(hidden, rows):
                yield self._project(piece).to(self.device)
            return
        # The model does more to its logits than is known here: let it do so itself, over what
        # its body gave, where the two are apart.
        if body is self.model:
            yield from torch.split(self._forward(inputs, mask), rows)
            return
        for places in torch.split(mask.nonzero(), rows):  # [R, 2]
            piece_mask = torch.zeros_like(mask)
            piece_mask[places[:, 0], places[:, 1]] = True
            with replayed(body, outputs[0]):
                piece = self._forward(inputs, piece_mask)
            yield piece

    def predicting(self, at: Tensor) -> Tensor:
        """[B, T] bool: positions whose hidden states predict the tokens at `at`."""
        return at

    def predict_inputs(self, batch: Batch) -> dict[str, Any]:
        """What the whole model reads to predict."""
        return self.inputs(self.model, batch)

    def _forward(self, inputs: Mapping[str, Any], mask: Tensor) -> Tensor:
        """The model's own logits of the positions in `mask`."""
        with project_only(self.model, mask):
            logits: Tensor = self.model(**inputs).logits
        return logits.to(self.device)

    def _project(self, hidden: Tensor) -> Tensor:
        """[R, D] inputs of the output projection to [R, V] logits."""
        logits: Tensor = output_projection(self.model)(hidden)
        bias = getattr(self.model, "final_logits_bias", None)  # of Marian and BART
        return logits if bias is None else logits.add_(bias.to(logits.device))


def parameters(module: nn.Module) -> frozenset[str]:
    """Names that a module's forward takes."""
    return frozenset(inspect.signature(module.forward).parameters)
