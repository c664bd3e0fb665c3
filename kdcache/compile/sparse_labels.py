"""Sparse labels: stored soft labels of some samples as flat arrays, on the host."""

# M samples, N positions, E entries, n stored temperatures, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import count_dtype, join_ids, split_ids
from kdcache.formats.signals import LogitsRecord


@dataclass(frozen=True)
class Entries:
    """Entries of N positions, in the order of `exact` or `drawn`.

    Attributes:
        rows: [E] int64 position, ascending.
        ids: [E] int64, ascending within a position.
        codes: [E] as stored; None where no code is.
    """

    rows: np.ndarray
    ids: np.ndarray
    codes: np.ndarray | None = None

    def where(self, keep: np.ndarray) -> Entries:
        """Some of them."""
        codes = None if self.codes is None else self.codes[keep]
        return Entries(self.rows[keep], self.ids[keep], codes)


@dataclass(frozen=True)
class SparseLabels:
    """Coded labels of N positions, of any codec but `full`.

    Attributes:
        tokens: `gold` and `entropy`, [N] uint8 each.
        tail: stored temperature to [N] float16 nats.
        exact: exact entries; None where the codec has none.
        drawn: drawn entries; None where the codec has none.
    """

    tokens: dict[str, np.ndarray]
    tail: dict[float, np.ndarray] = field(default_factory=dict)
    exact: Entries | None = None
    drawn: Entries | None = None

    @classmethod
    def of(cls, columns: Mapping[str, Ragged], record: LogitsRecord) -> SparseLabels:
        """Labels from columns in fresh arrays, whose offsets start at 0."""
        tokens = columns["tokens"].fields

        def entries(name: str) -> Entries | None:
            if name not in columns:
                return None
            fields = columns[name].fields
            counts = tokens[f"num_{name}"].astype(np.int64)
            rows = np.repeat(np.arange(len(counts)), counts)
            return Entries(rows, join_ids(fields).astype(np.int64), fields.get("code"))

        knots = record.temperatures if record.codec.has_tail else ()
        return cls(
            {name: tokens[name] for name in ("gold", "entropy")},
            {t: tokens[f"tail_{i}"] for i, t in enumerate(knots)},
            entries("exact"),
            entries("drawn"),
        )

    def columns(self, record: LogitsRecord, ends: np.ndarray) -> dict[str, Ragged]:
        """As columns of a record's schema.

        Args:
            record: whose codec made them; temperatures that it lacks are left out.
            ends: [M + 1] int64 positions before each sample.
        """
        codec, vocab_size = record.codec, record.vocab_size
        tokens, columns = dict(self.tokens), {}
        if codec.has_tail:
            tokens |= {f"tail_{i}": self.tail[t] for i, t in enumerate(record.temperatures)}
        largest = {"exact": codec.max_exact(vocab_size), "drawn": codec.max_drawn(vocab_size)}
        for name, entries in (("exact", self.exact), ("drawn", self.drawn)):
            if entries is None:
                continue
            counts = np.bincount(entries.rows, minlength=int(ends[-1]))
            tokens[f"num_{name}"] = counts.astype(count_dtype(largest[name]))
            fields = split_ids(entries.ids, vocab_size)
            if entries.codes is not None:
                fields["code"] = entries.codes
            columns[name] = Ragged(offsets_of(counts)[ends], fields)
        return {"tokens": Ragged(ends, tokens), **columns}
