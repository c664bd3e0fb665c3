"""Labels as a dump would have stored them, of made-up distributions.

# M samples, N positions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kdcache.dump.codecs.select import encode_logits
from kdcache.formats.checks.structure import logits_faults
from kdcache.formats.codec import Codec
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import ragged_batch, ragged_columns, signal_schema
from kdcache.formats.signals import LogitsRecord
from kdcache.labels.coded_labels import CodedLabels, LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from tests.formats.labels import teacher_record

TEMPERATURES = (0.5, 1.0, 2.0, 5.0)

Columns = Mapping[str, Ragged]


def rows_of_all_kinds(num: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """[N, V] logits from nearly flat to nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, vocab_size, generator=generator) * torch.linspace(0.3, 4, num)[:, None]


def record_of(codec: Codec, vocab_size: int, temperatures=TEMPERATURES, seed: int = 1):
    return LogitsRecord(
        name="logits",
        at="targets",
        stream="tgt",
        source="src",
        stream_digest="aa" * 16,
        source_digest="bb" * 16,
        vocab_size=vocab_size,
        codec=codec,
        temperatures=temperatures,
        seed=seed,
        teacher=teacher_record(),
        recipe={"codec": "as dumped"},
        versions={"kdcache": "0"},
    )


@dataclass(frozen=True)
class Coded:
    """Labels of M samples and what identifies these."""

    record: LogitsRecord
    columns: Columns
    sample_ids: np.ndarray
    rows: np.ndarray

    @classmethod
    def dumped(cls, logits: torch.Tensor, record: LogitsRecord, lengths=None) -> Coded:
        """As `kdcache dump` codes them; lengths: positions of each sample, one without it."""
        num = len(logits)
        lengths = np.ones(num, dtype=np.int64) if lengths is None else np.array(lengths)
        draw = np.random.default_rng(7)
        sample_ids = draw.integers(0, 256, (len(lengths), 16), dtype=np.uint8)
        rows = np.arange(len(lengths)) * 3
        hashes = [
            torch.from_numpy(hashed_positions(record, purpose, sample_ids, rows, lengths))
            for purpose in ("draw", "round")
        ]
        gold = torch.arange(num) % logits.shape[1]
        encoded = encode_logits(logits, gold, *hashes, record.codec, record.temperatures)
        ends = offsets_of(lengths)
        counts = {"exact": encoded.num_exact, "drawn": encoded.num_drawn}
        columns = {}
        for name, fields in encoded.to_host().items():
            offsets = ends if name == "tokens" else offsets_of(counts[name].numpy())[ends]
            columns[name] = Ragged(offsets, fields)
        return cls(record, columns, sample_ids, rows)

    @property
    def labels(self) -> CodedLabels:
        return labels_of(self.columns, self.record)

    def lengths(self) -> np.ndarray:
        return self.columns["tokens"].lengths


def hashed_positions(record, purpose, sample_ids, rows, lengths) -> np.ndarray:
    """[N] int64."""
    keys = sample_keys(record.seed, purpose, record.name, sample_ids, rows)
    positions = segment_indices(np.zeros_like(lengths), lengths)
    return position_hash(np.repeat(keys, lengths), positions).view(np.int64)


def labels_of(columns: Columns, record: LogitsRecord) -> CodedLabels:
    """Through Arrow, its schema and the checks that `kdcache verify` makes."""
    batch = ragged_batch(signal_schema(record), columns)
    batch.validate(full=True)
    stored = ragged_columns(batch)
    lengths = stored["tokens"].lengths
    assert logits_faults(record.codec, record.vocab_size, stored, lengths) == []
    stored = {name: column.take(np.arange(len(column))) for name, column in stored.items()}
    return coded_labels(LogitsSpec(record.codec, record.vocab_size, record.temperatures), stored)


def dense(coded: CodedLabels, temperature: float = 1.0) -> torch.Tensor:
    """[N, V] the labels, decoded."""
    return densify(decode(coded, temperature), coded.spec.vocab_size)


def entries(columns: Columns, name: str) -> list[list[tuple[int, float]]]:
    """Per position the (id, code) pairs of a column; 0 where no code is."""
    counts = columns["tokens"].fields[f"num_{name}"].astype(int)
    fields = columns[name].fields
    ids = fields["id"].astype(int)
    if "id_high" in fields:
        ids = ids + 65_536 * fields["id_high"].astype(int)
    codes = fields.get("code", np.zeros(len(ids), dtype=int))
    pairs = list(zip(ids.tolist(), codes.tolist(), strict=True))
    ends = np.cumsum(counts)
    return [pairs[end - count : end] for end, count in zip(ends, counts, strict=True)]
