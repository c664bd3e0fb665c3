"""Coded labels: soft labels as they lie on disk, in tensors of a host or a device."""

# N positions, E exact entries, D drawn entries, V vocabulary, n stored temperatures

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.formats.codec import Codec
from kdcache.formats.codes import entropy_step
from kdcache.formats.ragged import Ragged
from kdcache.formats.wide import TAIL, widened


@dataclass(frozen=True)
class LogitsSpec:
    """What a logits signal's record says about its labels.

    Attributes:
        codec: how the distributions were made sparse.
        vocab_size: V, the teacher's.
        temperatures: where the tail is stored, ascending.
        imported: whether others dumped them, so that `gold` is what the entries say.
    """

    codec: Codec
    vocab_size: int
    temperatures: tuple[float, ...]
    imported: bool = False


@dataclass
class CodedLabels:
    """Soft labels of N positions, coded, position after position.

    Attributes:
        spec: how to read them.
        num_exact: [N] int64, or None where the codec has no exact entries; V for `full`.
        num_drawn: [N] int64, or None where the codec draws nothing.
        gold: [N] uint8 code of the teacher's log-prob of the target.
        entropy: [N] uint8 code of the teacher's entropy.
        tail: [N, n] float16 nats, or None where the codec has no tail.
        exact_id: [E] uint16, int32 where V is beyond 65,536, or None for `full`, whose ids are
            0..V-1.
        exact_code: [E] uint8, float16 or float32, or None without exact entries.
        drawn_id: [D] the same of drawn entries, or None without them.
        drawn_code: [D] int32 number of draws under `sampled`; log-prob as uint8, float16 or
            float32 under a codec that draws for other temperatures than 1; else None.
    """

    spec: LogitsSpec
    num_exact: Tensor | None
    num_drawn: Tensor | None
    gold: Tensor
    entropy: Tensor
    tail: Tensor | None
    exact_id: Tensor | None
    exact_code: Tensor | None
    drawn_id: Tensor | None
    drawn_code: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CodedLabels:
        """The same labels on a device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


def coded_labels(spec: LogitsSpec, columns: Mapping[str, Ragged]) -> CodedLabels:
    """Labels of some samples, all their positions one after another, in host memory.

    Args:
        spec: of the signal.
        columns: the signal's columns for these samples, as they are stored or in their wide form,
            in fresh (writable) arrays.
    """
    return wide_labels(spec, {name: widened(name, column) for name, column in columns.items()})


def wide_labels(spec: LogitsSpec, columns: Mapping[str, Ragged]) -> CodedLabels:
    """Labels of some samples, as `coded_labels` gives them, of columns in their wide form.

    Args:
        spec: of the signal.
        columns: the signal's columns for these samples, in fresh (writable) arrays.
    """
    codec = spec.codec
    tokens = columns["tokens"].fields
    num_positions = len(tokens["gold"])
    num_exact = num_drawn = tail = exact_id = exact_code = drawn_id = drawn_code = None
    if codec.name == "full":
        num_exact = torch.full((num_positions,), spec.vocab_size, dtype=torch.int64)
    elif codec.has_exact:
        num_exact = torch.from_numpy(tokens["num_exact"])
        exact_id = torch.from_numpy(columns["exact"].fields["id"])
    if codec.has_exact:
        exact_code = torch.from_numpy(columns["exact"].fields["code"])
    if codec.has_drawn:
        num_drawn = torch.from_numpy(tokens["num_drawn"])
        drawn_id = torch.from_numpy(columns["drawn"].fields["id"])
        code = columns["drawn"].fields.get("code")
        if code is not None:
            counts = not codec.has_drawn_log_probs
            drawn_code = torch.from_numpy(code.astype(np.int32) if counts else code)
    if codec.has_tail:
        tail = torch.from_numpy(tokens[TAIL])
    return CodedLabels(
        spec=spec,
        num_exact=num_exact,
        num_drawn=num_drawn,
        gold=torch.from_numpy(tokens["gold"]),
        entropy=torch.from_numpy(tokens["entropy"]),
        tail=tail,
        exact_id=exact_id,
        exact_code=exact_code,
        drawn_id=drawn_id,
        drawn_code=drawn_code,
    )


def entropy_nats(coded: CodedLabels) -> Tensor:
    """[N] float32 teacher entropy in nats."""
    return coded.entropy.to(torch.float32) * entropy_step(coded.spec.vocab_size)
