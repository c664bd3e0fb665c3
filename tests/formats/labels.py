"""Hand-made caches: a corpus of letters, and labels coded by plain numpy.

# M samples, N positions, V vocabulary
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdcache.formats.codec import Codec, ThresholdCodec
from kdcache.formats.identity import CorpusDigest, StreamDigest, sample_id
from kdcache.formats.manifest import (
    SAMPLES,
    CommitRecord,
    CorpusRecord,
    Manifest,
    PartRecord,
    ShardRecord,
    StreamRecord,
    TokenizerRecord,
)
from kdcache.formats.plan import plan_parts, plan_shards
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import (
    count_dtype,
    join_ids,
    logits_schema,
    ragged_batch,
    samples_batch,
    samples_schema,
    split_ids,
)
from kdcache.formats.signals import LogitsRecord, TeacherRecord
from kdcache.formats.writer import CacheWriter

VOCAB = 12
SENTENCES = {
    "src": ["ab", "abc", "c", "abcab", "", "ba", "cc", "acb"],
    "tgt": ["ba", "c", "cba", "bb", "a", "abc", "bca", "cab"],
}
THRESHOLD = ThresholdCodec(c=1 / 8)


def encode(text: str, target: bool) -> list[int]:
    """Letters as ids 4, 5, ..., with an end of 2 after a target (and after every source)."""
    return [4 + ord(letter) - ord("a") for letter in text] + [2]


def ragged_ids(sentences: Sequence[list[int]], vocab_size: int) -> Ragged:
    lengths = np.array([len(ids) for ids in sentences], dtype=np.int64)
    flat = np.array([i for ids in sentences for i in ids], dtype=np.int64)
    return Ragged(offsets_of(lengths), split_ids(flat, vocab_size))


def teacher_log_probs(num_positions: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """[N, V] float64 log-probs of a made-up teacher."""
    logits = np.random.default_rng(seed).normal(size=(num_positions, vocab_size)) * 2
    if vocab_size > 100:
        logits[:, -VOCAB:] += 12  # a few ids, the highest, hold nearly everything
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def sqrt_code(log_probs: np.ndarray, range_nats: float) -> np.ndarray:
    code = np.rint(255 * np.sqrt(np.clip(-log_probs, 0, range_nats) / range_nats))
    return code.astype(np.uint8)


def select_ids(log_probs: np.ndarray, codec: Codec) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Exact and drawn ids of every position."""
    vocab_size = log_probs.shape[1]
    exact_ids, drawn_ids = [], []
    for row in log_probs:
        order = np.argsort(-row)
        if codec.name == "threshold":
            keep = np.flatnonzero(row >= math.log(codec.c))
        elif codec.name == "full":
            keep = np.arange(vocab_size)
        else:
            keep = np.sort(order[: codec.max_exact(vocab_size)])
        exact_ids.append(keep)
        rest = order[~np.isin(order, keep)][:1]
        drawn_ids.append(rest if codec.has_drawn else rest[:0])
    return exact_ids, drawn_ids


def code_tokens(
    log_probs: np.ndarray,
    gold: np.ndarray,
    exact_ids: list[np.ndarray],
    num_drawn: np.ndarray,
    codec: Codec,
    temperatures: Sequence[float],
) -> dict[str, np.ndarray]:
    """Fields of the tokens column."""
    num_positions, vocab_size = log_probs.shape
    tokens: dict[str, np.ndarray] = {}
    num_exact = np.array([len(ids) for ids in exact_ids])
    if codec.has_exact and codec.name != "full":
        tokens["num_exact"] = num_exact.astype(count_dtype(codec.max_exact(vocab_size)))
    if codec.has_drawn:
        tokens["num_drawn"] = num_drawn.astype(count_dtype(codec.max_drawn(vocab_size)))
    tokens["gold"] = sqrt_code(log_probs[np.arange(num_positions), gold], 25.0)
    entropy = -(np.exp(log_probs) * log_probs).sum(1)
    tokens["entropy"] = np.rint(255 * entropy / math.log(vocab_size)).astype(np.uint8)
    if codec.has_tail:
        for i, temperature in enumerate(temperatures):
            sums = [
                np.exp(np.delete(row, ids) / temperature).sum()
                for row, ids in zip(log_probs, exact_ids, strict=True)
            ]
            with np.errstate(divide="ignore"):
                tokens[f"tail_{i}"] = np.log(sums).astype(np.float16)
    return tokens


def code_labels(
    log_probs: np.ndarray,
    gold: np.ndarray,
    lengths: np.ndarray,
    codec: Codec,
    temperatures: Sequence[float],
) -> dict[str, Ragged]:
    """Columns of a logits shard; drawn entries are the next most probable id.

    Args:
        log_probs: [N, V].
        gold: [N] target ids.
        lengths: [M] positions per sample.
        codec: selects the exact ids, simply.
        temperatures: knots of the tail.
    """
    vocab_size = log_probs.shape[1]
    exact_ids, drawn_ids = select_ids(log_probs, codec)
    num_exact = np.array([len(ids) for ids in exact_ids])
    num_drawn = np.array([len(ids) for ids in drawn_ids])
    tokens = code_tokens(log_probs, gold, exact_ids, num_drawn, codec, temperatures)
    columns = {"tokens": Ragged(offsets_of(lengths), tokens)}
    position_starts = offsets_of(lengths)

    def column(counts: np.ndarray, fields: dict[str, np.ndarray]) -> Ragged:
        return Ragged(offsets_of(counts)[position_starts], fields)

    if codec.has_exact:
        ids = np.concatenate(exact_ids)
        values = np.concatenate([row[i] for row, i in zip(log_probs, exact_ids, strict=True)])
        code = values.astype(codec.values) if codec.values != "uint8" else None
        fields = {} if codec.name == "full" else split_ids(ids, vocab_size)
        fields["code"] = sqrt_code(values, codec.range_nats) if code is None else code
        columns["exact"] = column(num_exact, fields)
    if codec.has_drawn:
        fields = split_ids(np.concatenate(drawn_ids), vocab_size)
        if codec.name == "sampled":
            fields["code"] = np.full(num_drawn.sum(), codec.n, dtype=count_dtype(codec.n))
        columns["drawn"] = column(num_drawn, fields)
    return columns


def rows_of(column: Ragged, start: int, stop: int) -> Ragged:
    return column.take(np.arange(start, stop))


def tokenizer_files(vocab_size: int) -> dict[str, bytes]:
    tokens = ["<pad>", "<unk>", "</s>", "<x>", *map(chr, range(97, 97 + 26))]
    tokens = [tokens[i] if i < len(tokens) else f"<{i}>" for i in range(vocab_size)]
    return {"tokens.json": json.dumps(tokens).encode(), "vocab.json": b'{"a": 4}'}


def make_cache(
    path: Path,
    codecs: dict[str, Codec] | None = None,
    sentences: dict[str, list[str]] | None = None,
    shard_tokens: int = 20,
    part_bytes: int = 1 << 20,
    vocab_size: int = VOCAB,
    temperatures: tuple[float, ...] = (0.5, 1.0, 2.0),
    skip_commits: Sequence[tuple[str, int]] = (),
) -> Path:
    """Write a whole small cache through CacheWriter.

    Args:
        path: where.
        codecs: signal name to codec; one threshold signal "logits" without it.
        sentences: texts of src and tgt.
        shard_tokens: see `plan_shards`.
        part_bytes: see `plan_parts`.
        vocab_size: of the streams and of the signals.
        temperatures: knots of the tails.
        skip_commits: (signal, shard) pairs that stay uncommitted, a signal's data where it is.
    """
    codecs = {"logits": THRESHOLD} if codecs is None else codecs
    texts = SENTENCES if sentences is None else sentences
    num_samples = len(texts["src"])
    rows = np.arange(num_samples) * 2
    ids = [sample_id([texts["src"][m], texts["tgt"][m]]) for m in range(num_samples)]
    sample_ids = np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)
    streams = {
        name: ragged_ids([encode(text, name == "tgt") for text in texts[name]], vocab_size)
        for name in ("src", "tgt")
    }
    counts = sum(stream.lengths for stream in streams.values())
    plan = plan_shards(counts, shard_tokens)
    schema = samples_schema(["src", "tgt"], dict.fromkeys(streams, vocab_size))
    with CacheWriter(path) as writer:
        with writer.claimed(SAMPLES):
            for shard, (start, stop) in enumerate(plan):
                batch = samples_batch(
                    schema,
                    sample_ids[start:stop],
                    rows[start:stop],
                    {name: texts[name][start:stop] for name in texts},
                    {name: rows_of(stream, start, stop) for name, stream in streams.items()},
                )
                part = writer.write_part(SAMPLES, shard, 0, start, stop, batch)
                if (SAMPLES, shard) not in skip_commits:
                    writer.commit(_commit(SAMPLES, shard, [part], [batch], counts[start:stop]))
            manifest = _manifest(writer, texts, sample_ids, rows, streams, plan, shard_tokens)
            writer.write_manifest(manifest)
        for name, codec in codecs.items():
            writer.write_signal(_signal(name, codec, manifest, temperatures))
            columns = code_labels(*made_up(streams["tgt"], vocab_size), codec, temperatures)
            schema = logits_schema(codec, vocab_size, temperatures)
            for shard, (start, stop) in enumerate(plan):
                skipped = (name, shard) in skip_commits
                # Without a claim what is not committed stays, as where a writer has died.
                with nullcontext() if skipped else writer.claimed(name, shard):
                    record = _write_labels(
                        writer, name, shard, columns, schema, start, stop, part_bytes
                    )
                    if not skipped:
                        writer.commit(record)
    return path


def made_up(stream: Ragged, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Teacher log-probs [N, V], target ids [N] and lengths [M] of a target stream."""
    gold = join_ids(stream.fields)
    return teacher_log_probs(len(gold), vocab_size), gold, stream.lengths


def _write_labels(
    writer: CacheWriter,
    name: str,
    shard: int,
    columns: dict[str, Ragged],
    schema: pa.Schema,
    start: int,
    stop: int,
    part_bytes: int,
) -> CommitRecord:
    lengths = columns["tokens"].lengths[start:stop]
    parts, batches = [], []
    for number, (a, b) in enumerate(plan_parts(lengths, 100, limit=part_bytes)):
        a, b = a + start, b + start
        mine = {key: rows_of(column, a, b) for key, column in columns.items()}
        batches.append(ragged_batch(schema, mine))
        parts.append(writer.write_part(name, shard, number, a, b, batches[-1]))
    return _commit(name, shard, parts, batches, lengths)


def _commit(
    signal: str, shard: int, parts: list[PartRecord], batches: list, counts: np.ndarray
) -> CommitRecord:
    entries: dict[str, int] = {}
    for batch in batches:
        for column in batch.schema.names:
            if hasattr(batch.column(column), "offsets"):
                entries[column] = entries.get(column, 0) + len(batch.column(column).flatten())
    entries = {name: n for name, n in entries.items() if not name.startswith("field.")}
    return CommitRecord(
        signal=signal,
        shard=shard,
        start=parts[0].start,
        stop=parts[-1].stop,
        tokens=int(counts.sum()),
        entries=entries,
        parts=parts,
    )


def _manifest(writer, texts, sample_ids, rows, streams, plan, shard_tokens) -> Manifest:
    corpus = CorpusDigest()
    corpus.update(sample_ids, rows)
    vocab_size = max(VOCAB, *(int(s.fields["id"].max()) + 1 for s in streams.values()))
    files = writer.put_tokenizer("teacher", tokenizer_files(vocab_size))
    tokenizer = TokenizerRecord(
        digest="ab" * 16,
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=2,
        bos_id=None,
        unk_id=1,
        files=files,
    )
    records = {}
    for name, stream in streams.items():
        digest = StreamDigest(tokenizer.digest)
        digest.update(stream.lengths, stream.fields["id"])
        records[name] = StreamRecord(
            field=name,
            tokenizer="teacher",
            target=name == "tgt",
            digest=digest.hexdigest(),
            vocab_size=VOCAB if "id_high" not in stream.fields else 70_000,
            num_tokens=int(stream.lengths.sum()),
            longest=int(stream.lengths.max()),
        )
    counts = sum(stream.lengths for stream in streams.values())
    return Manifest(
        corpus=CorpusRecord(
            digest=corpus.hexdigest(),
            num_samples=len(rows),
            num_rows=2 * len(rows),
            dropped={"empty": len(rows)},
            fields=["src", "tgt"],
        ),
        tokenizers={"teacher": tokenizer},
        streams=records,
        shard_tokens=shard_tokens,
        shards=[ShardRecord(start=a, stop=b, tokens=int(counts[a:b].sum())) for a, b in plan],
        recipe={"name": "hand-made"},
        versions={"kdcache": "0"},
    )


def _signal(
    name: str, codec: Codec, manifest: Manifest, temperatures: tuple[float, ...]
) -> LogitsRecord:
    return LogitsRecord(
        name=name,
        at="targets",
        stream="tgt",
        source="src",
        stream_digest=manifest.streams["tgt"].digest,
        source_digest=manifest.streams["src"].digest,
        vocab_size=manifest.streams["tgt"].vocab_size,
        codec=codec,
        temperatures=temperatures,
        seed=1,
        teacher=teacher_record(),
        recipe={},
        versions={"kdcache": "0"},
    )


def teacher_record(digest: str = "cd" * 16) -> TeacherRecord:
    return TeacherRecord(
        path="teacher",
        revision=None,
        digest=digest,
        config_digest="ef" * 16,
        model_type="marian",
        kind="encoder_decoder",
        dtype="float32",
    )
