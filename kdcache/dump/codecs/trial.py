"""Trials of codecs: what a codec costs and keeps of a teacher's distributions at hand."""

# N positions, B samples of a batch, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.dump.codecs.select import encode_logits
from kdcache.dump.measures import lost_kl
from kdcache.formats.codec import Codec
from kdcache.formats.keyed import position_hash, text_key
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import logits_schema, record_bytes
from kdcache.labels.coded_labels import LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify


@dataclass
class Trial:
    """Sums over positions for one codec.

    Attributes:
        spec: the codec, V and the stored temperatures.
    """

    spec: LogitsSpec
    positions: int = 0
    entries: dict[str, int] = field(default_factory=dict)
    squared: dict[float, float] = field(default_factory=dict)
    missing: float = 0.0
    kl: float = 0.0

    def add(self, logits: Tensor, gold: Tensor, probs: dict[float, Tensor]) -> None:
        """Encode, decode and compare some positions.

        Args:
            logits: [N, V] the teacher's.
            gold: [N] int64 targets.
            probs: temperature to [N, V] softmax of the logits there, 1 among them.
        """
        codec, spec = self.spec.codec, self.spec
        coded = coded_labels(spec, self._columns(logits, gold)).to(logits.device)
        for temperature, expected in probs.items():
            if temperature != 1 and not codec.has_tail and codec.name != "full":
                continue
            label = densify(decode(coded, temperature), spec.vocab_size)
            squared = float((label - expected).square().sum())
            self.squared[temperature] = self.squared.get(temperature, 0.0) + squared
            if temperature == 1 and 1.0 not in codec.drawn_temperatures:
                self.missing += float((label - expected).abs().sum())
        if codec.has_exact:
            whole = densify(decode(coded, 1.0, "uniform"), spec.vocab_size)
            self.kl += lost_kl(torch.log_softmax(logits, dim=-1), whole)
        self.positions += len(gold)

    def _columns(self, logits: Tensor, gold: Tensor) -> dict[str, Ragged]:
        """One sample's columns, as a cache has them."""
        positions = np.arange(self.positions, self.positions + len(gold))
        draw, rounding = (
            torch.from_numpy(
                position_hash(
                    np.full(len(positions), text_key(purpose), dtype=np.uint64), positions
                ).view(np.int64)
            ).to(logits.device)
            for purpose in ("draw", "round")
        )
        spec = self.spec
        encoded = encode_logits(logits, gold, draw, rounding, spec.codec, spec.temperatures)
        columns = {}
        for name, fields in encoded.to_host().items():
            count = len(next(iter(fields.values())))
            self.entries[name] = self.entries.get(name, 0) + count
            columns[name] = Ragged(offsets_of(np.array([count])), fields)
        return columns

    def result(self, distance: dict[float, float]) -> dict[str, Any]:
        """What the codec costs and keeps.

        Args:
            distance: temperature to the root mean square of |p - t| of a stand-in student.

        Returns:
            bytes_per_token (offsets aside), label_bytes_per_token (entries and counts),
            entries_per_token, noise (root mean square of |t^ - t|), bias_l1, lost_kl_nats (of
            the exact head with a uniform tail; None without a head), noise_over_signal.
        """
        codec, count = self.spec.codec, max(1, self.positions)
        schema = logits_schema(codec, self.spec.vocab_size, self.spec.temperatures)
        sizes = {
            column.name: self.entries.get(column.name, 0) * record_bytes(column)
            for column in schema
        }
        counts = sum(
            field_.type.bit_width // 8
            for field_ in schema.field("tokens").type.value_type
            if field_.name in ("num_exact", "num_drawn")
        )
        entries = {name: n for name, n in self.entries.items() if name != "tokens"}
        noise = {t: math.sqrt(total / count) for t, total in self.squared.items()}
        return {
            "bytes_per_token": sum(sizes.values()) / count,
            "label_bytes_per_token": sum(sizes[name] for name in entries) / count + counts,
            "entries_per_token": sum(entries.values()) / count,
            "noise": noise[1.0],
            "bias_l1": self.missing / count,
            "lost_kl_nats": self.kl / count if codec.has_exact else None,
            "noise_over_signal": {f"{t:g}": noise[t] / distance[t] for t in noise if distance[t]},
        }


@dataclass
class Trials:
    """Several codecs over the same distributions, and a stand-in student beside them."""

    temperatures: Sequence[float]
    rows: dict[str, Trial] = field(default_factory=dict)
    apart: dict[float, float] = field(default_factory=dict)
    positions: int = 0

    def add(
        self,
        codecs: dict[str, tuple[Codec, tuple[float, ...]]],
        logits: Tensor,
        student: Tensor,
        gold: Tensor,
    ) -> None:
        """Try all codecs on some positions.

        Args:
            codecs: name to codec and the temperatures it stores.
            logits: [N, V] the teacher's.
            student: [N, V] logits of what stands in for a student.
            gold: [N] int64 targets.
        """
        logits, student = logits.float(), student.float()
        probs = {t: torch.softmax(logits / t, dim=-1) for t in self.temperatures}
        for t, expected in probs.items():
            away = torch.softmax(student / t, dim=-1) - expected
            self.apart[t] = self.apart.get(t, 0.0) + float(away.square().sum())
        for name, (codec, stored) in codecs.items():
            if name not in self.rows:
                self.rows[name] = Trial(LogitsSpec(codec, logits.shape[1], stored))
            self.rows[name].add(logits, gold, probs)
        self.positions += len(gold)

    def result(self) -> dict[str, dict[str, Any]]:
        """Name of every codec to what `Trial.result` says."""
        count = max(1, self.positions)
        distance = {t: math.sqrt(total / count) for t, total in self.apart.items()}
        return {name: trial.result(distance) for name, trial in self.rows.items()}
