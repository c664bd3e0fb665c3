"""The hidden signal: what a teacher's layers make of every token, or of a whole text."""

# F items, B rows of a batch, T tokens, N rows of a batch's items together, L layers, D features

from __future__ import annotations

import numpy as np
from torch import Tensor

from kdcache.dump.signals.dense import DenseEncoder, check_side, chosen_layers
from kdcache.dump.signals.encoder import Request, common_fields
from kdcache.dump.signals.items import Items
from kdcache.dump.teacher import Teacher
from kdcache.formats.cache import Cache
from kdcache.formats.signals import HiddenRecord
from kdcache.recipe import HiddenSignal


class HiddenEncoder(DenseEncoder):
    """Hidden states of one side of a model, token by token or pooled.

    Row j of an encoder, and of a causal model, is the state that has read token j. Row j of an
    encoder-decoder's decoder is the state that predicts token j: its input is shifted right, so
    it has read the tokens before j. Pooling takes the first of a sample's tokens, or the mean
    over all of them, special ones too.
    """

    record: HiddenRecord

    def __init__(self, cache: Cache, request: Request) -> None:
        super().__init__(cache, request)
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, HiddenSignal), "the runner chooses by kind"
        assert teacher is not None, "hidden states were checked to have a teacher"
        self.record = HiddenRecord(
            **common_fields(cache, request),
            masks=signal.masks,
            side=signal.side,
            layers=_layers(name, signal, teacher),
            width=teacher.width(signal.side),
            pool=signal.pool,
            values=signal.values,
        )

    @classmethod
    def check(cls, request: Request) -> None:
        """The teacher must have that side and those layers."""
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, HiddenSignal), "the runner chooses by kind"
        assert teacher is not None, "hidden states were checked to have a teacher"
        check_side(name, signal, teacher)
        _layers(name, signal, teacher)

    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 tokens; 1 where states are pooled."""
        lengths = items.tokens.lengths
        return lengths if self.record.pool == "none" else np.ones_like(lengths)

    def describe(self, items: Items, rows: np.ndarray) -> Tensor:
        """[N, L, D] states of all tokens, or one for each item."""
        record, teacher = self.record, self.teacher
        batch = items.batch(rows, teacher.pad_id, teacher.device)
        hidden = teacher.hidden(batch, record.side, record.layers)  # [B, T, L, D]
        if record.pool == "none":
            return hidden[batch.mask]
        if record.pool == "cls":
            return hidden[:, 0]
        outside = ~batch.mask[:, :, None, None]  # what stands there may be NaN
        total = hidden.float().masked_fill(outside, 0).sum(dim=1)  # [B, L, D]
        return total / batch.mask.sum(dim=1)[:, None, None]

    def name_value(self, items: Items, item: int, row: int, column: int) -> str:
        """Words for one feature of a token, or of the pooled state."""
        if self.record.pool != "none":
            return f"feature {column} of the pooled state"
        return f"feature {column} at position {row}"


def _layers(name: str, signal: HiddenSignal, teacher: Teacher) -> tuple[int, ...]:
    """Numbers of a signal's layers, 0 the embedding output."""
    known = range(teacher.num_layers(signal.side) + 1)
    return chosen_layers(name, signal.layers, known, f"the {signal.side} of {teacher.record.path}")
