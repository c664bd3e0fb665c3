"""Soft labels of a causal teacher in DistillKit's Parquet, and as vLLM writes them in JSONL."""

# M samples, N labels, k entries of each

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tqdm import tqdm

from kdcache.errors import RecipeError
from kdcache.exchange.distillkit import IDS, VALUES
from kdcache.exchange.distillkit_codec import CONFIG_FILE, exact_config, pack_ids
from kdcache.exchange.label_rows import LabelRows, label_rows
from kdcache.formats.cache import Cache
from kdcache.formats.schema import join_ids
from kdcache.formats.signals import LogitsRecord
from kdcache.report.tokens import readable


def check_causal(cache: Cache, record: LogitsRecord) -> None:
    """Refuse labels that such files cannot hold.

    Raises:
        RecipeError: they are not at every token but the first.
    """
    stream = cache.stream(record.stream)
    if record.at != "positions" or stream.template == "chat":
        found = "the assistant's tokens alone" if record.at == "positions" else record.at
        raise RecipeError(
            f"{cache.path}: signal {record.name!r} has labels at {found}; these formats want them "
            "at every token of a text but the first; export to parquet instead"
        )
    if not record.codec.has_exact or record.codec.has_drawn:
        raise RecipeError(
            f"{cache.path}: signal {record.name!r} is of codec {record.codec.name}; these formats "
            "hold exact entries alone (topk, nucleus, full); export to parquet instead"
        )


def write_distillkit(
    cache: Cache, record: LogitsRecord, top_k: int, folder: Path, kept: np.ndarray, bar: tqdm[Any]
) -> int:
    """Write a file a shard and `compression_config.yaml`; every log-prob in float32.

    Returns:
        Rows that were written.

    Raises:
        RecipeError: a label has fewer entries than others.
    """
    config = exact_config(record.vocab_size, top_k)
    tree = config.model_dump(mode="json")
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(tree), encoding="utf-8")
    inner = pa.list_(pa.list_(pa.uint8()))
    schema = pa.schema([("input_ids", pa.list_(pa.uint64())), (VALUES, inner), (IDS, inner)])
    written = 0
    for shard in range(cache.num_shards):
        with pq.ParquetWriter(folder / f"data_{shard}.parquet", schema) as writer:
            for tokens, rows, here, _ in _samples(cache, record, shard, top_k, kept, bar):
                counts = np.diff(rows.ends[here.start : here.stop + 1])
                if (counts != top_k).any():
                    raise RecipeError(
                        f"{cache.path}: signal {record.name!r} has labels of {int(counts.min())} "
                        f"entries, and DistillKit's are all of one number, {top_k}: choose a "
                        "smaller --top-k"
                    )
                inside = slice(int(rows.ends[here.start]), int(rows.ends[here.stop]))
                ids = rows.ids[inside].reshape(-1, top_k).astype(np.int64)
                values = rows.log_probs[inside].astype("<f4").reshape(-1, top_k)
                row = {
                    "input_ids": tokens.tolist(),
                    VALUES: values.view(np.uint8).reshape(len(values), 4 * top_k).tolist(),
                    IDS: pack_ids(ids, config).tolist(),
                }
                writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
                written += 1
    return written


def write_vllm(
    cache: Cache,
    record: LogitsRecord,
    top_k: int | None,
    folder: Path,
    kept: np.ndarray,
    bar: tqdm[Any],
) -> int:
    """Write one JSON line a sample, with the token itself beside the k of each label.

    Returns:
        Lines that were written.
    """
    stream = cache.stream(record.stream)
    names = readable(cache.tokens(stream.tokenizer))
    written = 0
    with (folder / "prompt_logprobs.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for shard in range(cache.num_shards):
            samples = cache.samples(shard)
            texts = samples.text(stream.field)
            labelled = _samples(cache, record, shard, top_k, kept, bar)
            for tokens, rows, here, index in labelled:
                said: list[object] = [None]
                for label in range(here.start, here.stop):
                    inside = slice(int(rows.ends[label]), int(rows.ends[label + 1]))
                    pairs = zip(
                        rows.ids[inside].tolist(), rows.log_probs[inside].tolist(), strict=True
                    )
                    entries = {
                        str(i): {"logprob": value, "rank": rank, "decoded_token": _name(names, i)}
                        for rank, (i, value) in enumerate(pairs, start=1)
                    }
                    token = int(tokens[rows.position[label]])
                    own = {"logprob": float(rows.gold[label]), "decoded_token": _name(names, token)}
                    entries.setdefault(str(token), own | {"rank": None})
                    said.append(entries)
                row = {
                    "prompt": texts[index].as_py(),
                    "prompt_token_ids": tokens.tolist(),
                    "prompt_logprobs": said,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    return written


def _name(names: list[str], token: int) -> str | None:
    return names[token] if token < len(names) else None


def _samples(
    cache: Cache,
    record: LogitsRecord,
    shard: int,
    top_k: int | None,
    kept: np.ndarray,
    bar: tqdm[Any],
) -> Iterator[tuple[np.ndarray, LabelRows, slice, int]]:
    """Of every kept sample its tokens, the labels of its part, which are its, and its index."""
    samples = cache.samples(shard)
    stream = samples.streams[record.stream]
    ids = join_ids(stream.fields)
    for rows in label_rows(cache, record, shard, top_k):
        for number in range(len(rows.offsets) - 1):
            index = rows.start - samples.start + number
            bar.update(1)
            if not kept[rows.start + number]:
                continue
            tokens = ids[int(stream.offsets[index]) : int(stream.offsets[index + 1])]
            here = slice(int(rows.offsets[number]), int(rows.offsets[number + 1]))
            yield tokens, rows, here, index
