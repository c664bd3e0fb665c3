"""Batches: streams and signals of some samples as tensors, decoded where they lie.

Labels travel as they are stored, in few bytes, and become numbers on the device.

What every batch is made of is not frozen: to make a frozen record takes some times as long.
"""

# B samples, T positions of a stream, N its tokens, R rows of a dense signal, L layers, W width

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.labels.coded_labels import CodedLabels


@dataclass
class Tokens:
    """One stream of B samples.

    Attributes:
        ids: [B, T] int64, padded at the end.
        mask: [B, T] bool, true on tokens; N of them.
        segments: [B, T] int64 token types of a pair, 0 outside the mask; None without a pair.
        loss: [B, T] bool, which tokens of a chat the assistant wrote; None without a chat.
    """

    ids: Tensor
    mask: Tensor
    segments: Tensor | None = None
    loss: Tensor | None = None

    @cached_property
    def flat(self) -> Tensor:
        """[N] int64, the ids under the mask, row by row."""
        return self.ids[self.mask]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The stream with each of its tensors changed, `flat` too: a GPU would wait for it."""
        found = _mapped(self, change)
        found.flat = change(self.flat)
        return found


@dataclass(frozen=True)
class DenseRows:
    """Hidden states or attentions of B samples, as they are stored.

    Attributes:
        values: [R, L, W] float16, bfloat16 or int8.
        scale: [R, L] float32 for int8, else None.
        counts: [B] int64 rows of each sample.
        layers: the teacher's numbers of the L layers.
    """

    values: Tensor
    scale: Tensor | None
    counts: Tensor
    layers: tuple[int, ...]

    def decode(self) -> Tensor:
        """[R, L, W] float32, on the device of the values."""
        numbers = self.values.to(torch.float32)
        return numbers if self.scale is None else numbers * self.scale[:, :, None]


@dataclass(frozen=True)
class Scores:
    """Class logits or regression scores of B samples.

    Attributes:
        values: [S] float32, a sample's replicas one after another, its classes innermost.
        counts: [B] int64 values of each sample; 0 for samples of other tasks.
        labels: names of the classes.
    """

    values: Tensor
    counts: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Masked:
    """Masked tokens of B samples.

    Attributes:
        positions: [K] int64 within the sample, sample after sample, replica after replica.
        ids: [K] int64 what stands there in the input.
        counts: [B, R] int64 masked tokens of the replicas that are read.
    """

    positions: Tensor
    ids: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Hypotheses:
    """Beam outputs of B samples, best first.

    Attributes:
        ids: [K] int64 tokens, hypothesis after hypothesis.
        lengths: [H] int64 tokens of each hypothesis.
        log_probs: [H] float32 nats, summed over its tokens.
        counts: [B] int64 hypotheses of each sample.
    """

    ids: Tensor
    lengths: Tensor
    log_probs: Tensor
    counts: Tensor

    def tokens(self, number: int = 0) -> Tokens:
        """One hypothesis of each sample, padded with id 0; a sample without it has no tokens.

        Args:
            number: which, 0 the best.
        """
        has = self.counts > number
        chosen = (self.counts.cumsum(0) - self.counts)[has] + number  # of H
        lengths, starts = torch.zeros_like(self.counts), torch.zeros_like(self.counts)  # [B]
        lengths[has] = self.lengths[chosen]
        starts[has] = (self.lengths.cumsum(0) - self.lengths)[chosen]  # of K
        device = self.ids.device
        mask = torch.arange(max([1, *lengths.tolist()]), device=device) < lengths[:, None]  # [B, T]
        shift = starts - (lengths.cumsum(0) - lengths)
        places = torch.arange(int(lengths.sum()), device=device)
        flat = self.ids[places + shift.repeat_interleave(lengths)]  # [N]
        ids = torch.zeros(mask.shape, dtype=torch.int64, device=device)
        ids[mask] = flat
        tokens = Tokens(ids=ids, mask=mask)
        tokens.flat = flat
        return tokens


SignalBatch = CodedLabels | DenseRows | Scores | Masked | Hypotheses


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        rows: [B] int64 corpus rows, on the host.
        sample_ids: [B, 16] uint8, on the host.
        streams: by name.
        signals: by name; labels lie in the order of their stream's tokens.
        gold: gold labels, where they were asked for: [B] int64 classes, -100 for none, or [B]
            float32 numbers, NaN for none. Of several tasks [B] float32 numbers of classes, or
            numbers, NaN for none.
        task: of several tasks, that of all samples.
        unit: of several tasks, [B] int64: neighbours with one number are candidates of one query.
    """

    rows: np.ndarray
    sample_ids: np.ndarray
    streams: Mapping[str, Tokens]
    signals: Mapping[str, SignalBatch]
    gold: Tensor | None = None
    task: str | None = None
    unit: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.rows)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; from pinned memory without waiting."""
        if torch.device(device).type == "cpu":
            return self
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in page-locked memory."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            streams={name: one.mapped(change) for name, one in self.streams.items()},
            signals={name: _mapped(one, change) for name, one in self.signals.items()},
            gold=None if self.gold is None else change(self.gold),
            unit=None if self.unit is None else change(self.unit),
        )


def _mapped(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with each of its tensors changed."""
    found = {
        field.name: change(getattr(record, field.name))
        for field in fields(record)
        if isinstance(getattr(record, field.name), Tensor)
    }
    return replace(record, **found)
