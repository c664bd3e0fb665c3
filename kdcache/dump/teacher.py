"""The teacher: a model, or several that speak as one, run forward and never trained."""

# B batch, T positions, N positions that are predicted, V vocabulary, L chosen layers, D hidden,
# H heads, C classes

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kdcache.dump.batches import Batch
from kdcache.errors import ModelError
from kdcache.formats.signals import Side, TeacherRecord
from kdcache.recipe.teacher import TeacherSection

Problem = Literal["classification", "regression", "multi_label"]


class Teacher(ABC):
    """What every teacher answers; a kind overrides what it has.

    A class of your own (`kind: custom`) is a subclass with `load` and the methods of its
    signals; `kdcache.dump.teachers.identity.own_record` makes its record.

    Attributes:
        kind: what it is, in the recipe's words.
        signals: kinds of signals it can speak.
        places: what `at` of a logits signal may be.
        sides: which stacks have hidden states and attentions.
        record: what identifies it.
        device: where its inputs go.
        vocab_size: V, rows of its output projection (the tokenizer may have fewer ids); None
            where it has none.
        input_size: ids that it can read; None where that is not known.
        max_positions: longest stream it takes; None for no limit.
        pad_id: what batches are padded with.
        labels: names of a classifier's C scores.
        problem: what a classifier's scores are.
        members: the transformers models that are run.
    """

    kind: str = "custom"
    signals: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    sides: tuple[Side, ...] = ()
    record: TeacherRecord
    device: torch.device
    vocab_size: int | None = None
    input_size: int | None = None
    max_positions: int | None = None
    pad_id: int = 0
    labels: Sequence[str] = ()
    problem: Problem = "classification"
    members: Sequence[Any] = ()

    @classmethod
    def load(cls, section: TeacherSection, needs_attention: bool) -> Teacher:
        """Make a custom teacher of its section (`path`, `device`, `dtype`, `options`).

        Raises:
            ModelError: this class is not one that a recipe can name.
        """
        raise ModelError(f"{section.model_class}: the class has no classmethod load; write one")

    @classmethod
    def positions(cls, section: TeacherSection) -> int | None:
        """`max_positions` of a custom teacher that is not loaded."""
        return None

    def logits(self, batch: Batch, at: Tensor) -> Tensor:
        """The logits that predict some tokens.

        Args:
            batch: what is read.
            at: [B, T] bool, N of them true: the tokens that are predicted. An
                encoder-decoder's and a causal model's logits see the tokens before; a masked
                model's see all that `batch.ids` has, the position's own token too.

        Returns:
            [N, V] unnormalised in the model's dtype, the first sample's tokens first.

        Raises:
            ModelError: this teacher predicts no tokens, or not these.
        """
        return torch.cat(list(self.logits_in_pieces(batch, at, sys.maxsize)))

    def logits_in_pieces(self, batch: Batch, at: Tensor, piece_entries: int) -> Iterator[Tensor]:
        """`logits`, some rows at a time, so that [N, V] never has to fit.

        Args:
            batch: as in `logits`.
            at: as in `logits`.
            piece_entries: most logits in one piece, if that is a row or more.

        Yields:
            [R, V], consecutive rows; one empty piece where N is 0.

        Raises:
            ModelError: as in `logits`.
        """
        if type(self).logits is Teacher.logits:
            raise self.cannot("logits")
        logits = self.logits(batch, at)  # [N, V]
        yield from torch.split(logits, max(1, piece_entries // logits.shape[1]))

    def num_layers(self, side: Side) -> int:
        """Layers of one side, its embedding output not counted."""
        raise self.cannot("hidden states")

    def width(self, side: Side) -> int:
        """D, the size of one side's hidden states."""
        raise self.cannot("hidden states")

    def heads(self, side: Side) -> int:
        """H, the attention heads of one side."""
        raise self.cannot("attentions")

    def hidden(self, batch: Batch, side: Side, layers: Sequence[int]) -> Tensor:
        """Hidden states of some layers.

        Args:
            batch: what is read. Row t of a causal model's states has read `ids[t]`; of an
                encoder-decoder's decoder it is the state that predicts `ids[t]`.
            side: which stack.
            layers: L numbers: 0 is the embedding output, n the output of layer n; the last one
                is after the final norm, as transformers has it.

        Returns:
            [B, T, L, D] in the model's dtype; rows outside `batch.mask` mean nothing.

        Raises:
            ModelError: this teacher has no such side or layer.
        """
        raise self.cannot("hidden states")

    def attention(self, batch: Batch, side: Side, layers: Sequence[int]) -> Tensor:
        """Self-attention probabilities of some layers.

        Args:
            batch: as in `hidden`.
            side: which stack.
            layers: L numbers, 1 is the first layer.

        Returns:
            [B, L, H, T, T], queries before keys; what is outside `batch.mask` means nothing.

        Raises:
            ModelError: this teacher has no such side or layer, or was loaded without.
        """
        raise self.cannot("attentions")

    def for_task(self, task: str | None) -> Teacher:
        """The teacher as it speaks for one task: of several heads one, else itself.

        Args:
            task: of the signal; None: of all samples.

        Raises:
            ModelError: it has several heads, and none of that name.
        """
        return self

    def scores(self, batch: Batch) -> Tensor:
        """Class logits, or a regressor's scores.

        Args:
            batch: what is read.

        Returns:
            [B, C] in the model's dtype, in the order of `labels`.

        Raises:
            ModelError: this teacher has no classes.
        """
        raise self.cannot("class scores")

    def cannot(self, what: str) -> ModelError:
        """The error of a question that this kind has no answer to."""
        able = ", ".join(self.signals) or "nothing"
        return ModelError(
            f"{self.record.path}: a teacher of kind {self.kind} has no {what}; it has {able}"
        )
