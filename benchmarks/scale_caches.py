"""Caches of any size without a teacher: valid in every respect, their text and labels drawn.

# M samples of a shard, N positions, E entries, V vocabulary
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdcache.formats.codec import ThresholdCodec, TopKCodec
from kdcache.formats.identity import CorpusDigest, StreamDigest, sample_ids
from kdcache.formats.manifest import (
    CommitRecord,
    CorpusRecord,
    FileRecord,
    Manifest,
    PartRecord,
    ShardRecord,
    StreamRecord,
    TokenizerRecord,
    commit_path,
    part_path,
    signal_path,
)
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.record import encode_record
from kdcache.formats.schema import (
    logits_schema,
    ragged_batch,
    samples_batch,
    samples_schema,
    split_ids,
)
from kdcache.formats.signals import HiddenRecord, LogitsRecord, SignalRecord, TeacherRecord
from kdcache.formats.writer import CacheWriter

VOCAB = 8000
SHORTEST, LONGEST = 5, 35  # tokens of a sample in one stream
CODEC = ThresholdCodec(c=1 / 16)
TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
LAYERS = (0, 3, 6)
CHARACTERS_PER_TOKEN = 5
STREAMS = ("src", "tgt")

#: Codecs that labels can be drawn for.
DrawnCodec = ThresholdCodec | TopKCodec

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", dtype=np.uint8)


def make_cache(
    path: Path,
    shards: int,
    shard_tokens: int,
    width: int = 0,
    *,
    codec: DrawnCodec = CODEC,
    vocab_size: int = VOCAB,
    alike: bool = False,
) -> None:
    """Write a cache of translation pairs with labels.

    Args:
        path: where.
        shards: how many.
        shard_tokens: tokens of each, both streams together.
        width: of hidden states of three layers, in parts; none for 0.
        codec: of the labels.
        vocab_size: V.
        alike: whether a target is about as long as its source.
    """
    draw = np.random.default_rng(0)
    samples = shard_tokens // (SHORTEST + LONGEST)
    corpus = CorpusDigest()
    digests = {name: StreamDigest("ab" * 16) for name in STREAMS}
    totals = dict.fromkeys(STREAMS, 0)
    plan: list[ShardRecord] = []
    lengths: list[np.ndarray] = []  # of the targets, shard by shard
    with CacheWriter(path) as writer:
        for shard in range(shards):
            streams = _write_samples(writer, shard, samples, corpus, draw, vocab_size, alike)
            for name, stream in streams.items():
                digests[name].update(stream.lengths, stream.fields["id"])
                totals[name] += int(stream.offsets[-1])
            tokens = sum(int(stream.offsets[-1]) for stream in streams.values())
            start = shard * samples
            plan.append(ShardRecord(start=start, stop=start + samples, tokens=tokens))
            lengths.append(streams["tgt"].lengths)
        names = [f"<{i}>" for i in range(vocab_size)]
        files = writer.put_tokenizer("teacher", {"tokens.json": json.dumps(names).encode()})
        manifest = writer.write_manifest(
            make_manifest(
                plan,
                shard_tokens,
                corpus.hexdigest(),
                {name: digest.hexdigest() for name, digest in digests.items()},
                totals,
                files,
                vocab_size,
            )
        )
        records = make_signals(manifest, width, codec)
        for record in records:
            writer.write_signal(record)
            for shard in range(shards):
                _write_labels(writer, record, shard, plan[shard], lengths[shard], draw)


def make_manifest(
    plan: list[ShardRecord],
    shard_tokens: int,
    corpus: str,
    digests: dict[str, str],
    totals: dict[str, int],
    files: list[FileRecord],
    vocab_size: int = VOCAB,
) -> Manifest:
    """The manifest of a cache of translation pairs."""
    tokenizer = TokenizerRecord(
        digest="ab" * 16,
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=2,
        bos_id=None,
        unk_id=1,
        files=files,
    )
    streams = {
        name: StreamRecord(
            field=name,
            tokenizer="teacher",
            target=name == "tgt",
            digest=digests[name],
            vocab_size=vocab_size,
            num_tokens=totals[name],
            longest=LONGEST,
        )
        for name in STREAMS
    }
    return Manifest(
        corpus=CorpusRecord(
            digest=corpus,
            num_samples=plan[-1].stop,
            num_rows=plan[-1].stop,
            dropped={},
            fields=list(STREAMS),
        ),
        tokenizers={"teacher": tokenizer},
        streams=streams,
        shard_tokens=shard_tokens,
        shards=plan,
        recipe={},
        versions={},
    )


def make_signals(manifest: Manifest, width: int, codec: DrawnCodec = CODEC) -> list[SignalRecord]:
    """Labels, and hidden states where a width is given."""
    teacher = TeacherRecord(
        path="drawn",
        revision=None,
        digest="cd" * 16,
        config_digest="ef" * 16,
        model_type="marian",
        kind="encoder_decoder",
        dtype="float32",
    )
    shared = {
        "stream": "tgt",
        "source": "src",
        "stream_digest": manifest.streams["tgt"].digest,
        "source_digest": manifest.streams["src"].digest,
        "seed": 1,
        "teacher": teacher,
        "recipe": {},
        "versions": {},
    }
    vocab_size = manifest.streams["tgt"].vocab_size
    labels = {"codec": codec, "temperatures": TEMPERATURES, "vocab_size": vocab_size}
    records: list[SignalRecord] = [LogitsRecord(name="logits", at="targets", **labels, **shared)]
    if width:
        shape = {"side": "decoder", "layers": LAYERS, "width": width, "pool": "none"}
        records.append(HiddenRecord(name="hidden", values="float16", **shape, **shared))
    return records


def _write_samples(
    writer: CacheWriter,
    shard: int,
    num: int,
    corpus: CorpusDigest,
    draw: np.random.Generator,
    vocab_size: int,
    alike: bool,
) -> dict[str, Ragged]:
    """Text and tokens of one shard; what its streams are."""
    streams, texts = {}, {}
    for name in STREAMS:
        if streams and alike:
            near = streams["src"].lengths + draw.integers(-3, 4, num)
            lengths = near.clip(SHORTEST, LONGEST)
        else:
            lengths = draw.integers(SHORTEST, LONGEST + 1, num)
        ids = draw.integers(4, vocab_size, int(lengths.sum()))
        streams[name] = Ragged(offsets_of(lengths), split_ids(ids, vocab_size))
        ends = (streams[name].offsets * CHARACTERS_PER_TOKEN).tolist()
        letters = draw.choice(_LETTERS, ends[-1]).tobytes().decode()
        texts[name] = [letters[a:b] for a, b in pairwise(ends)]
    start = shard * num
    rows = np.arange(start, start + num)
    packed = sample_ids([pa.array(texts[name], type=pa.string()) for name in STREAMS])
    corpus.update(packed, rows)
    schema = samples_schema(STREAMS, dict.fromkeys(STREAMS, vocab_size))
    batch = samples_batch(schema, packed, rows, texts, streams)
    part = writer.write_part("samples", shard, 0, start, start + num, batch)
    entries = {f"stream.{name}": int(stream.offsets[-1]) for name, stream in streams.items()}
    writer.commit(
        CommitRecord(
            signal="samples",
            shard=shard,
            start=start,
            stop=start + num,
            tokens=sum(entries.values()),
            entries=entries,
            parts=[part],
        )
    )
    return streams


def _write_labels(
    writer: CacheWriter,
    record: SignalRecord,
    shard: int,
    plan: ShardRecord,
    lengths: np.ndarray,
    draw: np.random.Generator,
) -> None:
    """One shard of a signal."""
    parts: list[PartRecord] = []
    if isinstance(record, HiddenRecord):
        entries = {"values": int(lengths.sum())}
        row_bytes = 2 * record.width * len(record.layers)
        for number, (a, b) in enumerate(plan_parts(lengths, row_bytes)):
            shape = (int(lengths[a:b].sum()), len(record.layers), record.width)
            values = draw.integers(0, 0x3C00, shape, dtype=np.uint16).view(np.float16)
            place = (record.name, shard, number, plan.start + a, plan.start + b)
            parts.append(writer.write_dense_part(*place, values))
    else:
        assert isinstance(record, LogitsRecord)
        columns = drawn_labels(lengths, draw, record.codec, record.vocab_size)
        entries = {name: int(column.offsets[-1]) for name, column in columns.items()}
        schema = logits_schema(record.codec, record.vocab_size, TEMPERATURES)
        batch = ragged_batch(schema, columns)
        parts = [writer.write_part(record.name, shard, 0, plan.start, plan.stop, batch)]
    writer.commit(
        CommitRecord(
            signal=record.name,
            shard=shard,
            start=plan.start,
            stop=plan.stop,
            tokens=int(lengths.sum()),
            entries=entries,
            record=record.digest,
            parts=parts,
        )
    )


def drawn_labels(
    lengths: np.ndarray,
    draw: np.random.Generator,
    codec: DrawnCodec = CODEC,
    vocab_size: int = VOCAB,
) -> dict[str, Ragged]:
    """Columns of labels; of threshold 1.7 exact and 4 drawn entries at a position on average.

    Args:
        lengths: [M] positions of each sample.
        draw: gives everything else.
        codec: of the labels.
        vocab_size: V.
    """
    num = int(lengths.sum())
    if isinstance(codec, TopKCodec):
        num_exact, num_drawn = np.full(num, codec.k), np.zeros(num, dtype=np.int64)
    else:
        num_exact = np.minimum(draw.geometric(0.6, num), 17)
        num_drawn = np.minimum(draw.poisson(4, num), 17)
    total = num_exact + num_drawn
    ends = offsets_of(total)
    ids = np.cumsum(draw.integers(1, vocab_size // 34, int(ends[-1])))  # ascending, no id twice
    first = np.minimum(ends[:-1], len(ids) - 1)
    ids -= np.repeat(ids[first], total)
    rank = np.arange(len(ids)) - np.repeat(ends[:-1], total)
    # Which of a position's ids are exact: as many as it has, from anywhere in the middle.
    shift = np.repeat(draw.integers(0, 1 << 20, num) % total, total)
    exact = (rank + shift) % np.repeat(total, total) < np.repeat(num_exact, total)
    tokens = {
        "num_exact": num_exact.astype(np.uint8),
        "num_drawn": num_drawn.astype(np.uint8),
        "gold": draw.integers(0, 256, num, dtype=np.uint8),
        "entropy": draw.integers(0, 256, num, dtype=np.uint8),
    }
    for number in range(len(TEMPERATURES)):
        tokens[f"tail_{number}"] = (-5 * draw.random(num, dtype=np.float32)).astype(np.float16)
    codes = draw.integers(0, 256, int(num_exact.sum()), dtype=np.uint8)
    starts = offsets_of(lengths)
    kept = {**split_ids(ids[exact], vocab_size), "code": codes}
    columns = {
        "tokens": Ragged(starts, tokens),
        "exact": Ragged(offsets_of(num_exact)[starts], kept),
        "drawn": Ragged(offsets_of(num_drawn)[starts], split_ids(ids[~exact], vocab_size)),
    }
    if isinstance(codec, TopKCodec):
        del columns["drawn"], tokens["num_drawn"]
    return columns


def make_hollow_cache(path: Path, shards: int, shard_tokens: int, part_bytes: int) -> None:
    """Records of a huge cache; its data files have their size and no blocks on the disk.

    Args:
        path: where.
        shards: how many.
        shard_tokens: tokens of each.
        part_bytes: of each data file.
    """
    samples = shard_tokens // (SHORTEST + LONGEST)
    plan = [
        ShardRecord(start=n * samples, stop=(n + 1) * samples, tokens=shard_tokens)
        for n in range(shards)
    ]
    digests = {name: f"{number:032x}" for number, name in enumerate(STREAMS)}
    with CacheWriter(path) as writer:
        names = [f"<{i}>" for i in range(VOCAB)]
        files = writer.put_tokenizer("teacher", {"tokens.json": json.dumps(names).encode()})
        totals = dict.fromkeys(STREAMS, shards * shard_tokens // 2)
        manifest = make_manifest(plan, shard_tokens, "0" * 32, digests, totals, files)
        writer.write_manifest(manifest)
        (record,) = make_signals(manifest, 0)
        writer.write_signal(record)
    for folder in ("commits", "samples", record.name):
        (path / folder).mkdir(exist_ok=True)
    half = shard_tokens // 2
    entries = {
        "samples": {f"stream.{name}": half for name in STREAMS},
        record.name: {"tokens": half, "exact": 2 * half, "drawn": 4 * half},
    }
    for number, shard in enumerate(plan):
        for signal, counts in entries.items():
            file = FileRecord(path="x", bytes=part_bytes, crc32c="0" * 8, xxh3=f"{number:016x}")
            where = part_path(signal, number, 0, [file])
            file = file.model_copy(update={"path": where})
            commit = CommitRecord(
                signal=signal,
                shard=number,
                start=shard.start,
                stop=shard.stop,
                tokens=shard_tokens if signal == "samples" else half,
                entries=counts,
                record=None if signal == "samples" else record.digest,
                parts=[PartRecord(start=shard.start, stop=shard.stop, files=[file])],
            )
            with (path / where).open("wb") as stream:
                stream.truncate(part_bytes)
            (path / commit_path(signal, number)).write_bytes(encode_record(commit))
    assert (path / signal_path(record.name)).is_file()
