"""Samples as Parquet, a file a shard, that Hugging Face `datasets` loads as they lie."""

# M samples, N labels, E entries, H hypotheses

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from kdcache.compile.hypotheses import Texts, all_tokens
from kdcache.exchange.label_rows import LabelRows, label_rows
from kdcache.formats.cache import Cache
from kdcache.formats.ragged import offsets_of
from kdcache.formats.schema import extra_fields, join_ids
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import BeamsRecord, LogitsRecord
from kdcache.report.tokens import readable

Columns = dict[str, pa.Array]

#: Samples of a row group, which a reader may hold at once.
_GROUP_ROWS = 1000


class ParquetExport:
    """Writes the samples of a cache, and what its soft labels and hypotheses say of them."""

    def __init__(
        self,
        cache: Cache,
        logits: Sequence[LogitsRecord],
        beams: Sequence[BeamsRecord],
        top_k: int | None,
    ) -> None:
        """Set up.

        Args:
            cache: the cache.
            logits: signals of soft labels, at the tokens of their streams.
            beams: signals of hypotheses.
            top_k: most exact entries of a label; None: all.
        """
        self._cache, self._logits, self._beams, self._top_k = cache, logits, beams, top_k
        self._texts = {record.name: Texts(cache, record.stream) for record in beams}
        used = {stream.tokenizer for stream in cache.manifest.streams.values()}
        self._tokens = {name: pa.array(readable(cache.tokens(name))) for name in used}

    def run(self, folder: Path, kept: np.ndarray, bar: tqdm[Any]) -> int:
        """Write every shard.

        Args:
            folder: where files go.
            kept: [M] bool, which samples of the cache.
            bar: advanced by the samples.

        Returns:
            Samples that were written.
        """
        shards = self._cache.num_shards
        for shard in range(shards):
            samples = self._cache.samples(shard)
            mine = np.flatnonzero(kept[samples.start : samples.stop])
            table = pa.table(self._columns(shard, samples)).take(pa.array(mine))
            table = table.replace_schema_metadata(self._metadata())
            # What `datasets` takes for the split "train".
            path = folder / f"train-{shard:05d}-of-{shards:05d}.parquet"
            # Lists without their width in memory, few samples in a piece: any reader takes these.
            options = {"compression": "zstd", "store_schema": False, "row_group_size": _GROUP_ROWS}
            pq.write_table(table, path, **options)
            bar.update(samples.stop - samples.start)
        return int(kept.sum())

    def _metadata(self) -> dict[str, str]:
        """What the file says of its origin."""
        signals = {
            record.name: {"codec": record.codec.model_dump(mode="json"), "stream": record.stream}
            for record in self._logits
        }
        return {"kdcache": json.dumps({"corpus": self._cache.manifest.corpus.digest, **signals})}

    def _columns(self, shard: int, samples: SampleShard) -> Columns:
        """All columns of one shard, every one M long."""
        ids = [one.tobytes().hex() for one in samples.sample_id]
        columns: Columns = {"sample_id": pa.array(ids), "row": pa.array(samples.row)}
        if (tasks := samples.tasks()) is not None:
            columns["task"] = tasks
        for field in self._cache.manifest.corpus.fields:
            columns[field] = samples.text(field)
        for name, stream in samples.streams.items():
            tokens = join_ids(stream.fields)
            columns[f"{name}.ids"] = _lists(stream.offsets, pa.array(tokens))
            columns[f"{name}.tokens"] = _lists(stream.offsets, self._named(name, tokens))
            for extra, values in extra_fields(stream.fields).items():
                columns[f"{name}.{extra}"] = _lists(stream.offsets, pa.array(values))
        for record in self._logits:
            parts = [
                self._labels(record, rows)
                for rows in label_rows(self._cache, record, shard, self._top_k)
            ]
            columns |= {key: pa.concat_arrays([p[key] for p in parts]) for key in parts[0]}
        for hypotheses in self._beams:
            columns[hypotheses.name] = self._hypotheses(hypotheses, shard)
        return columns

    def _named(self, stream: str, ids: np.ndarray) -> pa.Array:
        """Token strings of ids [E]; null for rows that a padded output layer adds."""
        names = self._tokens[self._cache.stream(stream).tokenizer]
        inside = pa.array(ids, mask=ids >= len(names))
        return names.take(inside)

    def _labels(self, record: LogitsRecord, rows: LabelRows) -> Columns:
        """Columns of one signal over the samples of a part."""
        name, ends = record.name, rows.offsets
        columns = {
            f"{name}.position": _lists(ends, pa.array(rows.position)),
            f"{name}.gold_log_prob": _lists(ends, pa.array(rows.gold)),
            f"{name}.entropy": _lists(ends, pa.array(rows.entropy)),
        }
        if record.codec.has_exact:
            entries = {
                "ids": pa.array(rows.ids),
                "log_probs": pa.array(rows.log_probs),
                "tokens": self._named(record.stream, rows.ids),
            }
            for key, values in entries.items():
                columns[f"{name}.{key}"] = _lists(ends, _lists(rows.ends, values))
        if rows.drawn_ends is not None:
            drawn = {"drawn_ids": rows.drawn_ids, "drawn_weights": rows.drawn_weights}
            for key, array in drawn.items():
                inner = _lists(rows.drawn_ends, pa.array(array))
                columns[f"{name}.{key}"] = _lists(ends, inner)
        return columns

    def _hypotheses(self, record: BeamsRecord, shard: int) -> pa.Array:
        """Texts, log-probs and scores of one shard, the best first."""
        parts = []
        for _, _, columns in self._cache.signal_shard(record.name, shard).parts:
            found = columns["hypotheses"]
            struct = pa.StructArray.from_arrays(
                [
                    pa.array(self._texts[record.name].decode(all_tokens(columns))),
                    pa.array(found.fields["log_prob"]),
                    pa.array(found.fields["score"]),
                ],
                names=["text", "log_prob", "score"],
            )
            parts.append(_lists(found.offsets, struct))
        return pa.concat_arrays(parts)


def _lists(offsets: np.ndarray, values: pa.Array) -> pa.Array:
    """Lists that lie one after another; of 64-bit offsets, since a shard's may be many."""
    ends = offsets_of(np.diff(offsets).astype(np.int64))
    begin = int(offsets[0])
    return pa.LargeListArray.from_arrays(pa.array(ends), values[begin : begin + int(ends[-1])])
