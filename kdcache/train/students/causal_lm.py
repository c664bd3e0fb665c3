"""A causal LM and its objective as one module: one pass over the samples of a batch."""

# B samples, T positions, N predicted tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ModelError, RecipeError
from kdcache.models.passes import project_first, project_only
from kdcache.train.batches.batch import Batch, Tokens
from kdcache.train.losses.causal_objective import CausalObjective
from kdcache.train.losses.objective import Moment, Objective
from kdcache.train.students.distillation import Distillation
from kdcache.train.students.masked_lm import numbers_of
from kdcache.train.students.student import max_positions, output_rows
from kdcache.train.students.student_outputs import Layers, StudentOutputs, projected_by


class CausalDistillation(Distillation):
    """A causal LM, and the losses of what it says of every token but the first.

    Args:
        student: a transformers causal LM.
        objective: which losses there are.
        seed: recipe seed.

    Raises:
        ModelError: the student reads the tokens that it predicts.
    """

    objective: CausalObjective

    def __init__(self, student: Any, objective: Objective, seed: int) -> None:
        assert isinstance(objective, CausalObjective)
        check_causal(student)
        super().__init__(student, objective, seed)

    def split(
        self, micro: Batch, counts: Mapping[str, int], groups: Sequence[Sequence[Moment]]
    ) -> tuple[list[Tensor], Tensor]:
        """As of an encoder-decoder, over the predicted tokens in place of a target's."""
        tokens = micro.streams[self.objective.source]
        if tokens.segments is not None:
            raise RecipeError(
                f"train.source: stream {self.objective.source!r} is of pairs, a causal LM reads "
                "one text; dump a stream without pair"
            )
        at = predicted_tokens(tokens)
        wanted = self._layers_of([one for group in groups for one in group], plain=True)
        outputs = run_causal_lm(self.student, tokens.ids, at, self._linear, wanted)
        labels = tokens.ids[at]
        totals, values = [], labels.new_zeros(len(self.objective.terms), dtype=torch.float32)
        for group in groups:
            parts, alone = self._parts(group), len(groups) == 1
            total = values.new_zeros(())
            if parts:
                total, found = self._over_ids(micro, counts, labels, parts, outputs, alone)
                values = values.to(found).index_add(0, numbers_of(parts, found.device), found)
            for one in group:
                if str(one.number) in self.beside:
                    value = self._beside(micro, counts, one, outputs)
                    total = total + one.weight * value
                    values[one.number] = value.detach()
            totals.append(total)
        return totals, values


def predicted_tokens(tokens: Tokens) -> Tensor:
    """[B, T] bool: every token but the first, of a chat those that the assistant wrote."""
    at = tokens.mask.clone() if tokens.loss is None else tokens.mask & tokens.loss
    at[:, 0] = False
    return at


def run_causal_lm(
    model: Any, ids: Tensor, at: Tensor, linear: bool, wanted: Sequence[Layers] = ()
) -> StudentOutputs:
    """A forward pass; nothing is projected but what predicts the tokens `at` some positions.

    Args:
        model: a transformers causal LM.
        ids: [B, T] int64, padded at the end.
        at: [B, T] bool, N tokens that are predicted; none of them the first.
        linear: what `projects_linearly` says of the model.
        wanted: layers to keep, of side decoder.

    Returns:
        `projected` or `logits` of the N tokens, and the layers; nothing encoded.
    """
    before = torch.cat([at[:, 1:], torch.zeros_like(at[:, :1])], dim=1)
    gate = project_first if linear else project_only
    with gate(model, before) as kept:
        # Padding stands last and attention is causal, so no mask is needed.
        out = model(
            input_ids=ids,
            use_cache=False,
            output_hidden_states=("decoder", "hidden") in wanted,
            output_attentions=("decoder", "attention") in wanted,
        )
    fields = {"hidden": "hidden_states", "attention": "attentions"}
    return StudentOutputs(
        projected=projected_by(model, kept[0]) if linear and kept is not None else None,
        logits=None if linear else out.logits,
        layers={key: out[fields[key[1]]] for key in wanted},
        encoded=ids.new_zeros(0),
    )


def check_causal(model: Any) -> None:
    """Refuse a model whose prediction of a token depends on it: it could copy.

    Args:
        model: a transformers causal LM; two short texts that differ in their end are tried.

    Raises:
        ModelError: it reads what comes later.
    """
    length = min(4, max_positions(model) or 4)
    same = length // 2
    ids = torch.zeros((2, length), dtype=torch.int64, device=model.device)
    ids[1, same:] = output_rows(model) - 1
    was_training = model.training
    model.eval()
    with torch.no_grad():
        one, other = model(input_ids=ids, use_cache=False).logits[:, :same].float()
    model.train(was_training)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"student: {type(model).__name__} reads the tokens after the one that it predicts; "
            "give a causal model, such as gpt2, llama or qwen2 (bert and its like need is_decoder "
            "true in their config)"
        )
