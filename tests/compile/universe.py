"""A small made-up corpus with duplicates and signals of every kind, and caches of parts of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.identity import sample_id
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import LogitsRecord, SignalRecord
from kdcache.formats.writer import CacheWriter
from tests.formats.kinds import made_up_records, make_kinds, write_signal
from tests.formats.labels import THRESHOLD, code_labels, encode, made_up, make_cache, ragged_ids

#: Sources and targets; the pair ("ab", "ba") stands there three times.
PAIRS = [
    ("ab", "ba"),
    ("abc", "c"),
    ("c", "cba"),
    ("ab", "ba"),
    ("abcab", "bb"),
    ("", "a"),
    ("ba", "abc"),
    ("cc", "bca"),
    ("ab", "ba"),
    ("acb", "cab"),
    ("ca", "ab"),
    ("bb", "bbb"),
]
#: A logits signal beside those of `tests.formats.kinds`.
LOGITS = "logits"


@dataclass(frozen=True)
class Universe:
    """All samples and all of their labels.

    Attributes:
        columns: signal to its columns over all samples.
    """

    columns: dict[str, dict[str, Ragged]]

    def write(
        self,
        root: Path,
        samples: Sequence[int],
        signals: Sequence[str] | None = None,
        shard_tokens: int = 20,
        part_samples: int = 2,
        change: dict[str, dict[str, Any]] | None = None,
    ) -> Path:
        """Write a cache of some samples and signals.

        Args:
            root: where.
            samples: which, in this order.
            signals: names; all without it.
            shard_tokens: of the cache.
            part_samples: samples of a part.
            change: signal to keys of its record that are other than usual.
        """
        texts = {side: [PAIRS[m][i] for m in samples] for i, side in enumerate(("src", "tgt"))}
        make_cache(root, codecs={}, sentences=texts, shard_tokens=shard_tokens)
        for name, record in all_records(open_cache(root)).items():
            if signals is not None and name not in signals:
                continue
            record = record.model_copy(update=(change or {}).get(name, {}))
            mine = {key: c.take(np.array(samples)) for key, c in self.columns[name].items()}
            with CacheWriter(root) as writer:
                write_signal(writer, open_cache(root), record, mine, part_samples)
        return root

    def replaced(self, signal: str, m: int, n: int) -> Universe:
        """The same, but sample m has the labels of sample n in a signal."""
        rows = np.arange(len(PAIRS))
        rows[m] = n
        mine = {key: column.take(rows) for key, column in self.columns[signal].items()}
        return Universe({**self.columns, signal: mine})

    def sample(self, m: int, signals: Sequence[str]) -> dict[str, Any]:
        """What a cache must hold of a sample."""
        src, tgt = PAIRS[m]
        labels = {
            name: {
                key: {field: v.tolist() for field, v in column.take(np.array([m])).fields.items()}
                for key, column in self.columns[name].items()
            }
            for name in signals
        }
        return {
            "id": sample_id([src, tgt]).hex(),
            "texts": [src, tgt],
            "streams": {"src": encode(src, False), "tgt": encode(tgt, True)},
            "labels": labels,
        }


def all_records(cache: Cache) -> dict[str, SignalRecord]:
    records = made_up_records(cache)
    about = {key: getattr(records["at_positions"], key) for key in LogitsRecord.model_fields} | {
        "name": LOGITS,
        "at": "targets",
        "codec": THRESHOLD,
        "source": "src",
        "source_digest": cache.stream("src").digest,
    }
    return {LOGITS: LogitsRecord(**about), **records}


def make_universe(folder: Path) -> Universe:
    texts = {side: [pair[i] for pair in PAIRS] for i, side in enumerate(("src", "tgt"))}
    kinds = make_kinds(folder / "whole", sentences=texts)
    stream = ragged_ids([encode(text, True) for text in texts["tgt"]], 12)
    labels = code_labels(*made_up(stream, 12), THRESHOLD, (1.0,))
    return Universe({LOGITS: labels, **kinds.columns})


def contents(path: Path) -> list[dict[str, Any]]:
    """What a cache holds, sample by sample, in the shape of `Universe.sample`."""
    cache = open_cache(path)
    found = []
    for shard in range(cache.num_shards):
        samples = cache.samples(shard)
        sides = list(cache.manifest.corpus.fields)
        for m in range(len(samples.row)):
            streams = {
                name: column.take(np.array([m])).fields["id"].tolist()
                for name, column in samples.streams.items()
            }
            number = samples.start + m
            found.append(
                {
                    "id": samples.sample_id[m].tobytes().hex(),
                    "texts": [samples.text(side)[m].as_py() for side in sides],
                    "streams": streams,
                    "labels": {
                        name: labels_of(cache, name, shard, number) for name in cache.signals
                    },
                }
            )
            assert int(samples.row[m]) == number or cache.manifest.lineage is None
    return found


def labels_of(cache: Cache, name: str, shard: int, number: int) -> dict[str, Any]:
    """Labels of one sample, as they are stored."""
    if cache.signal(name).kind in ("hidden", "attention"):
        dense = cache.dense_shard(name, shard)
        part = next(part for part in dense.parts if part.start <= number < part.stop)
        base = dense.offsets[part.start - dense.start]
        first, last = (int(dense.offsets[number + i - dense.start] - base) for i in (0, 1))
        arrays = {"values": part.values} | ({"scale": part.scale} if part.scale else {})
        fields = {
            key: np.stack(
                [array.read(first, last, layer) for layer in range(array.shape[1])], axis=1
            ).tolist()
            for key, array in arrays.items()
        }
        return {"values": fields}
    start, _, columns = next(
        part for part in cache.signal_shard(name, shard).parts if part[0] <= number < part[1]
    )
    return {
        key: {
            field: values.tolist()
            for field, values in column.take(np.array([number - start])).fields.items()
        }
        for key, column in columns.items()
    }
