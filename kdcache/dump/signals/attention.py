"""The attention signal: how much every token of a text heeds every other, layer by layer."""

# F items, B rows of a batch, T tokens, N pairs of a batch's items together, L layers, H heads

from __future__ import annotations

import numpy as np
from torch import Tensor

from kdcache.dump.signals.dense import DenseEncoder, check_side, chosen_layers
from kdcache.dump.signals.encoder import Request, common_fields
from kdcache.dump.signals.items import Items
from kdcache.dump.teacher import Teacher
from kdcache.errors import ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.signals import AttentionRecord
from kdcache.recipe import AttentionSignal


class AttentionEncoder(DenseEncoder):
    """Self-attention probabilities of one side of a model.

    A sample of T tokens has T * T rows: row q * T + k is what query q gives key k, so every T
    rows add up to 1. In an encoder and in a causal model q and k are tokens; in the decoder of an
    encoder-decoder they are positions of its input, which is shifted right: query q is the one
    that predicts token q, and key k has read token k - 1. What a later key would get is 0 in a
    decoder.
    """

    record: AttentionRecord

    def __init__(self, cache: Cache, request: Request) -> None:
        super().__init__(cache, request)
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, AttentionSignal), "the runner chooses by kind"
        assert teacher is not None, "attentions were checked to have a teacher"
        averaged = signal.heads == "mean"
        self.record = AttentionRecord(
            **common_fields(cache, request),
            side=signal.side,
            layers=_layers(name, signal, teacher),
            heads=1 if averaged else teacher.heads(signal.side),
            averaged=averaged,
            values=signal.values,
        )

    @classmethod
    def check(cls, request: Request) -> None:
        """The teacher must have that side, those layers, and heads in them."""
        signal, name, teacher = request.signal, request.name, request.teacher
        assert isinstance(signal, AttentionSignal), "the runner chooses by kind"
        assert teacher is not None, "attentions were checked to have a teacher"
        check_layers(name, signal, teacher)
        if teacher.heads(signal.side) < 1:
            raise ModelError(
                f"signals.{name}: the {signal.side} of {teacher.record.path} has no attention "
                "heads; leave out the signal"
            )

    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 pairs of tokens."""
        lengths = items.tokens.lengths
        return lengths * lengths

    def describe(self, items: Items, rows: np.ndarray) -> Tensor:
        """[N, L, H] probabilities of all pairs of tokens; H is 1 where heads are averaged."""
        record, teacher = self.record, self.teacher
        batch = items.batch(rows, teacher.pad_id, teacher.device)
        attention = teacher.attention(batch, record.side, record.layers)  # [B, L, H, T, T]
        pairs = batch.mask[:, :, None] & batch.mask[:, None, :]  # [B, T, T]
        found = attention.permute(0, 3, 4, 1, 2)[pairs]  # [N, L, H]
        return found.float().mean(dim=-1, keepdim=True) if record.averaged else found

    def name_value(self, items: Items, item: int, row: int, column: int) -> str:
        """Words for what one head has at one query and key."""
        query, key = divmod(row, int(items.tokens.lengths[item]))
        head = "the mean over heads" if self.record.averaged else f"head {column}"
        return f"{head} at query {query}, key {key}"


def check_layers(name: str, signal: AttentionSignal, teacher: Teacher) -> None:
    """The teacher must have that side and those layers; it may be loaded without attentions.

    Args:
        name: of the signal.
        signal: its section.
        teacher: that will speak.

    Raises:
        RecipeError: a layer is named twice, or a source is missing or too much.
        ModelError: there is no such side or layer.
    """
    check_side(name, signal, teacher)
    _layers(name, signal, teacher)


def _layers(name: str, signal: AttentionSignal, teacher: Teacher) -> tuple[int, ...]:
    """Numbers of a signal's layers, 1 the first."""
    known = range(1, teacher.num_layers(signal.side) + 1)
    return chosen_layers(name, signal.layers, known, f"the {signal.side} of {teacher.record.path}")
