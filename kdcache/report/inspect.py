"""What a cache holds, how it was made and how good its labels are, without torch.

# M samples of a shard, N positions, E entries, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import SampledCodec
from kdcache.formats.codes import entropy_nats, exact_log_probs, gold_log_probs
from kdcache.formats.manifest import SAMPLES, SignalRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids, record_bytes
from kdcache.formats.shard import SignalShard

#: Loss and entropy are averaged over at most this many shards, spread over the cache.
MEASURED_SHARDS = 16
#: Most entries listed at one position; their number is given in full.
LISTED_ENTRIES = 64


def inspect_cache(path: str | Path, num_samples: int = 3) -> dict[str, Any]:
    """Everything `kdcache inspect` shows, as plain values.

    Args:
        path: the cache.
        num_samples: decoded samples, spread evenly over the corpus.

    Returns:
        `corpus`, `streams`, `tokenizers`, `bytes`, `signals` (codec, teacher, bytes and entries
        per token as they lie on disk, the teacher's loss and entropy in nats), `recipe`,
        `versions` and `samples` with their soft labels in readable tokens.

    Raises:
        FormatError: there is no finished cache there, or it is damaged.
    """
    cache = open_cache(path)
    manifest = cache.manifest
    return {
        "path": str(path),
        "format_version": manifest.format_version,
        "corpus": manifest.corpus.model_dump(mode="json"),
        "streams": {
            name: {
                **stream.model_dump(mode="json"),
                "tokens_per_sample": stream.num_tokens / max(1, cache.num_samples),
            }
            for name, stream in manifest.streams.items()
        },
        "tokenizers": {
            name: record.model_dump(mode="json", exclude={"files"})
            for name, record in manifest.tokenizers.items()
        },
        "num_shards": cache.num_shards,
        "shard_tokens": manifest.shard_tokens,
        "bytes": _bytes(cache),
        "signals": {name: _signal(cache, record) for name, record in cache.signals.items()},
        "recipe": manifest.recipe,
        "versions": manifest.versions,
        "samples": _samples(cache, num_samples),
    }


def _bytes(cache: Cache) -> dict[str, int]:
    """Bytes on disk: of the samples, of each signal, of tokenizers, and all in all."""
    sizes = {
        name: sum(_data_bytes(cache, name, shard) for shard in _shards(cache, name))
        for name in [SAMPLES, *cache.signals]
    }
    sizes["tokenizers"] = sum(
        file.bytes for record in cache.manifest.tokenizers.values() for file in record.files
    )
    sizes["total"] = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
    return sizes


def _shards(cache: Cache, signal: str) -> list[int]:
    """Committed shards of the plan."""
    return sorted(cache.committed(signal) & set(range(cache.num_shards)))


def _data_bytes(cache: Cache, signal: str, shard: int) -> int:
    return sum(part.file.bytes for part in cache.commit_record(signal, shard).parts)


def _signal(cache: Cache, record: SignalRecord) -> dict[str, Any]:
    """One signal: how it was made, what it weighs, how sure the teacher was."""
    shards = _shards(cache, record.name)
    commits = [cache.commit_record(record.name, shard) for shard in shards]
    num_tokens = sum(commit.tokens for commit in commits)
    entries: dict[str, int] = {
        column: sum(commit.entries[column] for commit in commits)
        for column in ("exact", "drawn")
        if commits and column in commits[0].entries
    }
    data_bytes = sum(_data_bytes(cache, record.name, shard) for shard in shards)
    label_bytes = _label_bytes(cache, record.name, num_tokens, entries)
    per_token = max(1, num_tokens)
    return {
        "kind": record.kind,
        "stream": record.stream,
        "source": record.source,
        "codec": record.codec.model_dump(mode="json"),
        "temperatures": list(record.temperatures),
        "seed": record.seed,
        "vocab_size": record.vocab_size,
        "teacher": record.teacher.model_dump(mode="json"),
        "num_shards_committed": len(shards),
        "num_tokens": num_tokens,
        "entries_per_token": {name: count / per_token for name, count in entries.items()},
        "bytes": data_bytes,
        "label_bytes": label_bytes,
        "bytes_per_token": data_bytes / per_token,
        "label_bytes_per_token": label_bytes / per_token,
        "full_float16_bytes_per_token": 2 * record.vocab_size,
        **_teacher_scores(cache, record, shards),
        "versions": record.versions,
    }


def _label_bytes(cache: Cache, signal: str, num_tokens: int, entries: Mapping[str, int]) -> int:
    """Bytes of entries and of their counts, without gold, entropy, tail and offsets."""
    schema = cache.signal_schema(signal)
    counts = sum(
        field.type.bit_width // 8
        for field in schema.field("tokens").type.value_type
        if field.name in ("num_exact", "num_drawn")
    )
    return counts * num_tokens + sum(
        count * record_bytes(schema.field(column)) for column, count in entries.items()
    )


def _teacher_scores(cache: Cache, record: SignalRecord, shards: Sequence[int]) -> dict[str, Any]:
    """The teacher's own loss on the targets and its entropy, means over positions, in nats."""
    step = max(1, math.ceil(len(shards) / MEASURED_SHARDS))
    loss = entropy = 0.0
    num_tokens = 0
    for shard in shards[::step]:
        for _, _, columns in cache.signal_shard(record.name, shard).parts:
            fields = columns["tokens"].fields  # [N] each
            loss -= float(gold_log_probs(fields["gold"]).sum(dtype=np.float64))
            nats = entropy_nats(fields["entropy"], record.vocab_size)
            entropy += float(nats.sum(dtype=np.float64))
            num_tokens += len(fields["gold"])
    if num_tokens == 0:
        return {"teacher_loss_nats": None, "teacher_perplexity": None, "entropy_nats": None}
    return {
        "teacher_loss_nats": loss / num_tokens,
        "teacher_perplexity": math.exp(loss / num_tokens),
        "entropy_nats": entropy / num_tokens,
        "measured_tokens": num_tokens,
    }


def _samples(cache: Cache, num_samples: int) -> list[dict[str, Any]]:
    """Decoded samples, spread evenly over those that every signal has labels for."""
    shared = set(_shards(cache, SAMPLES)).intersection(
        *(_shards(cache, name) for name in cache.signals)
    )
    plan = [(n, s) for n, s in enumerate(cache.manifest.shards) if n in shared]
    total = sum(shard.stop - shard.start for _, shard in plan)
    count = min(num_samples, total)
    chosen = [total * n // count for n in range(count)]
    vocabularies = {
        name: cache.tokens(stream.tokenizer) for name, stream in cache.manifest.streams.items()
    }
    out = []
    at = 0
    for number, shard in plan:
        size = shard.stop - shard.start
        here = [index - at for index in chosen if at <= index < at + size]
        out += [_sample(cache, number, index, vocabularies) for index in here]
        at += size
    return out


def _sample(
    cache: Cache, shard: int, index: int, vocabularies: Mapping[str, list[str]]
) -> dict[str, Any]:
    """One sample of a shard: texts, tokens, and the labels of every signal."""
    samples = cache.samples(shard)
    tokens = {}
    for name, column in samples.streams.items():
        begin, end = int(column.offsets[index]), int(column.offsets[index + 1])
        ids = join_ids({key: array[begin:end] for key, array in column.fields.items()})
        tokens[name] = _readable(vocabularies[name], ids)
    return {
        "row": int(samples.row[index]),
        "sample_id": samples.sample_id[index].tobytes().hex(),
        "fields": {
            name: samples.text(name)[index].as_py() for name in cache.manifest.corpus.fields
        },
        "tokens": tokens,
        "labels": {
            name: _labels(
                cache.signal_shard(name, shard),
                samples.start + index,
                record,
                tokens[record.stream],
                vocabularies[record.stream],
            )
            for name, record in cache.signals.items()
        },
    }


def _readable(vocabulary: list[str], ids: np.ndarray) -> list[str]:
    """Token strings of ids [E]; rows that a padded output layer adds are shown as <id>."""
    return [vocabulary[i] if i < len(vocabulary) else f"<{i}>" for i in ids.tolist()]


def _labels(
    shard: SignalShard,
    sample: int,
    record: SignalRecord,
    targets: list[str],
    vocabulary: list[str],
) -> list[dict[str, Any]]:
    """Soft labels of one sample, a dict per position, entries most probable first."""
    start, columns = next(
        (start, columns) for start, stop, columns in shard.parts if start <= sample < stop
    )
    tokens = _record_of(columns["tokens"], sample - start)
    num_positions = len(tokens["gold"])
    gold = np.exp(gold_log_probs(tokens["gold"]))
    entropy = entropy_nats(tokens["entropy"], record.vocab_size)
    positions: list[dict[str, Any]] = [
        {
            "target": targets[n],
            "target_probability": float(gold[n]),
            "entropy_nats": float(entropy[n]),
        }
        for n in range(num_positions)
    ]
    for column in ("exact", "drawn"):
        if column not in columns:
            continue
        fields = _record_of(columns[column], sample - start)
        counts = tokens.get(f"num_{column}", np.full(num_positions, record.vocab_size))
        for position, entries, count in zip(
            positions, _entries(record, column, fields, counts, vocabulary), counts, strict=True
        ):
            position[f"num_{column}"] = int(count)
            position[column] = entries
    if record.codec.has_tail:
        knots = tokens[f"tail_{record.temperatures.index(1.0)}"].astype(float)
        for position, knot in zip(positions, knots, strict=True):
            position["tail_mass"] = math.exp(knot)
    return positions


def _record_of(column: Ragged, index: int) -> dict[str, np.ndarray]:
    """Fields of one sample's records."""
    begin, end = int(column.offsets[index]), int(column.offsets[index + 1])
    return {name: array[begin:end] for name, array in column.fields.items()}


def _entries(
    record: SignalRecord,
    column: str,
    fields: Mapping[str, np.ndarray],
    counts: np.ndarray,
    vocabulary: list[str],
) -> list[list[tuple[str, float]]]:
    """Per position the (token, probability or weight) entries of one column."""
    codec = record.codec
    if column == "exact":
        weights = np.exp(exact_log_probs(codec, fields["code"]))
    elif isinstance(codec, SampledCodec):
        weights = fields["code"] * codec.drawn_weight
    else:
        weights = np.full(len(fields["id"]), codec.drawn_weight)
    every_id = np.arange(record.vocab_size)
    ids = join_ids(fields) if "id" in fields else np.tile(every_id, len(counts))
    ends = np.cumsum(counts, dtype=np.int64)
    out = []
    for begin, end in zip(ends - counts, ends, strict=True):
        order = begin + np.argsort(-weights[begin:end], kind="stable")[:LISTED_ENTRIES]
        names = _readable(vocabulary, ids[order])
        out.append(list(zip(names, weights[order].astype(float).tolist(), strict=True)))
    return out
