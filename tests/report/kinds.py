"""A hand-made cache with a signal of every kind, and the numbers that were put into it.

# M samples, R rows, L layers, W width, V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.formats.codec import ThresholdCodec, TopKCodec
from kdcache.formats.identity import CorpusDigest, StreamDigest, sample_id
from kdcache.formats.manifest import (
    CommitRecord,
    CorpusRecord,
    Manifest,
    PartRecord,
    ShardRecord,
    StreamRecord,
    TokenizerRecord,
)
from kdcache.formats.masks import masks_columns
from kdcache.formats.plan import plan_shards
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import (
    ragged_batch,
    samples_batch,
    samples_schema,
    signal_schema,
    split_ids,
)
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    ClassesRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.units import MAIN_COLUMN
from kdcache.formats.writer import CacheWriter
from tests.formats.labels import code_labels, encode, rows_of, teacher_log_probs, teacher_record

VOCAB, MASK_ID = 14, 3
FIELDS = ("src", "tgt", "label")
TASKS = ("nli", "sent")
TOKENS = ["<pad>", "<unk>", "</s>", "<mask>", *map(chr, range(97, 97 + VOCAB - 4))]
SRC = ["ab", "abc", "c", "abcab", "acca", "ba", "cc", "acb"]
TGT = ["ba", "c", "cba", "bb", "a", "abc", "bca", "cab"]
LABELS = ["no", "maybe", "yes"]
#: Gold labels: names and numbers of labels, and from sample 5 on scores.
GOLD = ["no", "maybe", "2", "no", "yes", "0.5", "-1", "2"]
TASK = [0, 0, 0, 0, 0, 1, 1, 1]
DECODING = {"mode": "beam", "num_beams": 4, "num_hypotheses": 2, "top_k": None}


@dataclass
class Kinds:
    """What a cache was made of, over all M samples.

    Attributes:
        path: the cache.
        ids: stream to M lists of ids.
        columns: Arrow signal to its columns.
        dense: Zarr signal to its [R, L, W] values and the [M] rows of each sample.
        log_probs: logits signal to [N, V].
        gold: logits signal to the [N] ids that were predicted.
    """

    path: Path
    ids: dict[str, list[list[int]]]
    columns: dict[str, dict[str, Ragged]] = field(default_factory=dict)
    dense: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    log_probs: dict[str, np.ndarray] = field(default_factory=dict)
    gold: dict[str, np.ndarray] = field(default_factory=dict)


def make_kinds(
    path: Path, shard_tokens: int = 45, skip_commits: Sequence[tuple[str, int]] = ()
) -> Kinds:
    """Write a cache with signals of every kind.

    Args:
        path: where.
        shard_tokens: see `plan_shards`.
        skip_commits: (signal, shard) pairs that stay uncommitted.
    """
    made = Kinds(path, _ids())
    with CacheWriter(path) as writer:
        plan, manifest = _samples(writer, made, shard_tokens)
        for record in _records(manifest):
            writer.write_signal(record)
            if isinstance(record, HiddenRecord | AttentionRecord):
                made.dense[record.name] = _dense(made, record)
            else:
                made.columns[record.name] = _columns(made, record)
            for shard, (start, stop) in enumerate(plan):
                commit = _write(writer, made, record, shard, start, stop)
                if (record.name, shard) not in skip_commits:
                    writer.commit(commit)
    return made


def chained(lists: Iterable[Sequence[int]]) -> list[int]:
    return [item for items in lists for item in items]


def _ids() -> dict[str, list[list[int]]]:
    src, tgt = [encode(text, True) for text in SRC], [encode(text, True) for text in TGT]
    pairs = [a + b for a, b in zip(src, tgt, strict=True)]
    return {"src": src, "tgt": tgt, "pair": pairs, "chat": pairs}


def _extras(made: Kinds, stream: str) -> dict[str, np.ndarray]:
    """Beside the ids: the second text is segment 1, and the assistant's."""
    if stream not in ("pair", "chat"):
        return {}
    sides = zip(made.ids["src"], made.ids["tgt"], strict=True)
    second = [[0] * len(a) + [1] * len(b) for a, b in sides]
    name = "segment" if stream == "pair" else "loss"
    return {name: np.array(chained(second), dtype=np.uint8)}


def _lengths(made: Kinds, stream: str) -> np.ndarray:
    return np.array([len(ids) for ids in made.ids[stream]], dtype=np.int64)


def _samples(
    writer: CacheWriter, made: Kinds, shard_tokens: int
) -> tuple[list[tuple[int, int]], Manifest]:
    """Samples shards and the manifest."""
    num = len(SRC)
    texts = {"src": SRC, "tgt": TGT, "label": GOLD}
    tasks = [TASKS[t] for t in TASK]
    ids = [sample_id([texts[f][m] for f in FIELDS], tasks[m], GOLD[m]) for m in range(num)]
    sample_ids = np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)
    streams = {
        name: Ragged(
            offsets_of(_lengths(made, name)),
            {**split_ids(np.array(chained(lists)), VOCAB), **_extras(made, name)},
        )
        for name, lists in made.ids.items()
    }
    counts = sum(stream.lengths for stream in streams.values())
    plan = plan_shards(counts, shard_tokens)
    extras = {"pair": ("segment",), "chat": ("loss",)}
    schema = samples_schema(FIELDS, dict.fromkeys(streams, VOCAB), extras, tasks=True)
    rows = np.arange(num) * 3
    for shard, (start, stop) in enumerate(plan):
        batch = samples_batch(
            schema,
            sample_ids[start:stop],
            rows[start:stop],
            {name: texts[name][start:stop] for name in FIELDS},
            {name: rows_of(stream, start, stop) for name, stream in streams.items()},
            tasks[start:stop],
        )
        part = writer.write_part("samples", shard, 0, start, stop, batch)
        entries = {
            f"stream.{name}": int(s.offsets[stop] - s.offsets[start]) for name, s in streams.items()
        }
        tokens = int(counts[start:stop].sum())
        writer.commit(_commit("samples", shard, [part], tokens, entries))
    digest = CorpusDigest()
    digest.update(sample_ids, rows)
    corpus = CorpusRecord(
        digest=digest.hexdigest(),
        num_samples=num,
        num_rows=num + 1,
        dropped={"empty": 1, "too_long": 0},
        fields=list(FIELDS),
        tasks=list(TASKS),
        label="label",
    )
    files = writer.put_tokenizer("plm", {"tokens.json": json.dumps(TOKENS).encode()})
    special: dict[str, Any] = {"pad_id": 0, "eos_id": 2, "bos_id": None, "unk_id": 1}
    tokenizer = TokenizerRecord(digest="ab" * 16, vocab_size=VOCAB, files=files, **special)
    manifest = Manifest(
        corpus=corpus,
        tokenizers={"plm": tokenizer},
        streams={
            name: _stream(name, stream, tokenizer, _extras(made, name))
            for name, stream in streams.items()
        },
        shard_tokens=shard_tokens,
        shards=[ShardRecord(start=a, stop=b, tokens=int(counts[a:b].sum())) for a, b in plan],
        recipe={"name": "hand-made"},
        versions={"kdcache": "0"},
    )
    return plan, writer.write_manifest(manifest)


def _stream(
    name: str, stream: Ragged, tokenizer: TokenizerRecord, extras: dict[str, np.ndarray]
) -> StreamRecord:
    hasher = StreamDigest(tokenizer.digest)
    hasher.update(stream.lengths, stream.fields["id"], extras)
    return StreamRecord(
        field="tgt" if name == "tgt" else "src",
        pair="tgt" if name == "pair" else None,
        template="chat" if name == "chat" else "none",
        tokenizer="plm",
        target=name == "tgt",
        digest=hasher.hexdigest(),
        vocab_size=VOCAB,
        num_tokens=int(stream.lengths.sum()),
        longest=int(stream.lengths.max()),
    )


def _records(manifest: Manifest) -> list[SignalRecord]:
    """One of every kind, and more where a kind has variants; inputs before what needs them."""

    def common(name: str, stream: str, source: str | None = None, **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "stream": stream,
            "stream_digest": manifest.streams[stream].digest,
            "source": source,
            "source_digest": None if source is None else manifest.streams[source].digest,
            "seed": 1,
            "teacher": teacher_record(),
            "recipe": {},
            "versions": {"kdcache": "0"},
        } | more

    masked: dict[str, Any] = {"vocab_size": VOCAB, "mask_id": MASK_ID}
    masked["parameters"] = {"probability": 0.15, "mask_share": 0.8, "random_share": 0.1}
    topk: dict[str, Any] = {"vocab_size": VOCAB + 2, "temperatures": (0.5, 1.0, 2.0)}
    threshold = topk | {"codec": ThresholdCodec(c=1 / 8)}
    topk["codec"] = TopKCodec(k=3)
    hidden: dict[str, Any] = {"side": "encoder", "width": 3}
    classify: dict[str, Any] = {"problem": "classification", "labels": LABELS, "values": "float32"}
    hypotheses = common("best", "tgt", "src", hypotheses="beams")
    return [
        MasksRecord(**common("masks", "src", teacher=None), scheme="bert", replicas=2, **masked),
        BeamsRecord(
            **common("beams", "tgt", "src"),
            vocab_size=VOCAB,
            num_hypotheses=2,
            decoding=DECODING,
        ),
        LogitsRecord(**common("targets", "tgt", "src"), at="targets", **threshold),
        LogitsRecord(**common("causal", "chat"), at="positions", **topk),
        LogitsRecord(**common("document", "tgt"), at="positions", **topk),
        LogitsRecord(**common("mlm", "src", masks="masks"), at="masked", **topk),
        LogitsRecord(**common("segment", "src", masks="masks"), at="segment", **topk),
        LogitsRecord(**hypotheses, at="targets", hypothesis=1, **threshold),
        LogitsRecord(**hypotheses | {"name": "every"}, at="targets", hypothesis="all", **topk),
        HiddenRecord(
            **common("hidden", "src"), layers=(0, 1, 2), pool="none", values="bfloat16", **hidden
        ),
        HiddenRecord(
            **common("pooled", "src", masks="masks"),
            layers=(2,),
            pool="mean",
            values="int8",
            **hidden,
        ),
        AttentionRecord(
            **common("attention", "src"),
            side="encoder",
            layers=(1, 2),
            heads=2,
            averaged=False,
            values="float16",
        ),
        ClassesRecord(**common("nli", "pair"), task="nli", **classify),
        ClassesRecord(**common("augmented", "src", masks="masks"), task=None, **classify),
        ClassesRecord(
            **common("score", "pair"),
            task="sent",
            problem="regression",
            labels=["similarity"],
            values="float16",
        ),
        ClassesRecord(
            **common("topics", "pair"),
            task=None,
            problem="multi_label",
            labels=["sport", "art"],
            values="float32",
        ),
    ]


def _columns(made: Kinds, record: SignalRecord) -> dict[str, Ragged]:
    generator = np.random.default_rng(5)
    if isinstance(record, MasksRecord):
        return _masks(made)
    if isinstance(record, BeamsRecord):
        return _beams(generator)
    if isinstance(record, ClassesRecord):
        mine = [record.task in (None, TASKS[task]) for task in TASK]
        replicas = 1 if record.masks is None else 2
        counts = np.array(mine) * replicas * len(record.labels)
        scores = generator.normal(size=int(counts.sum())) * 2
        return {"scores": Ragged(offsets_of(counts), {"value": scores.astype(record.values)})}
    assert isinstance(record, LogitsRecord)
    lists = predicted(made, record)
    gold = np.array(chained(lists))
    log_probs = teacher_log_probs(len(gold), record.vocab_size)
    made.gold[record.name], made.log_probs[record.name] = gold, log_probs
    lengths = np.array([len(ids) for ids in lists], dtype=np.int64)
    return code_labels(log_probs, gold, lengths, record.codec, record.temperatures)


def predicted(made: Kinds, record: LogitsRecord) -> list[list[int]]:
    """The ids that have a label, sample by sample, one list at a time."""
    if record.masks is not None:
        masked = made.columns[record.masks]["masked"]
        ends = zip(masked.offsets, masked.offsets[1:], strict=False)
        return [
            [made.ids[record.stream][m][p] for p in masked.fields["position"][a:b]]
            for m, (a, b) in enumerate(ends)
        ]
    if record.hypotheses is not None:
        found = hypotheses_of(made)
        if record.hypothesis == "all":
            return [chained(hypotheses) for hypotheses in found]
        return [hypotheses[record.hypothesis] for hypotheses in found]
    if record.stream == "chat":  # the assistant says the second text
        return made.ids["tgt"]
    if record.at == "positions":
        return [ids[1:] for ids in made.ids[record.stream]]
    return made.ids[record.stream]


def hypotheses_of(made: Kinds) -> list[list[list[int]]]:
    """Ids of every hypothesis of every sample."""
    hypotheses, tokens = made.columns["beams"]["hypotheses"], made.columns["beams"]["tokens"]
    ids, out, at = tokens.fields["id"].tolist(), [], 0
    for count in hypotheses.fields["num_tokens"].tolist():
        out.append(ids[at : at + count])
        at += count
    return [out[2 * m : 2 * m + 2] for m in range(len(SRC))]


def _masks(made: Kinds) -> dict[str, Ragged]:
    """Two replicas; of the chosen tokens the first is masked, the second becomes or stays c."""
    num_masked, positions, ids = [], [], []
    for tokens in made.ids["src"]:
        for replica in range(2):
            chosen = [t for t in range(len(tokens) - 1) if t % 2 == replica][:2]
            num_masked.append(len(chosen))
            positions += chosen
            ids += [MASK_ID, TOKENS.index("c")][: len(chosen)]
    counts = np.array(num_masked).reshape(-1, 2)
    return masks_columns(counts, np.array(positions), np.array(ids), VOCAB)


def _beams(generator: np.random.Generator) -> dict[str, Ragged]:
    """Two hypotheses of every sample; the second is longer and less probable."""
    ids = [encode(text[::-1] + extra, True) for text in TGT for extra in ("", "b")]
    counts = np.array([len(one) for one in ids])
    log_probs = -0.3 * counts - generator.random(len(ids))
    hypotheses = {
        "num_tokens": counts.astype(np.uint16),
        "log_prob": log_probs.astype(np.float32),
        "score": (log_probs / counts**0.6).astype(np.float32),
    }
    return {
        "hypotheses": Ragged(np.arange(len(TGT) + 1) * 2, hypotheses),
        "tokens": Ragged(offsets_of(counts)[::2], split_ids(np.array(chained(ids)), VOCAB)),
    }


def _dense(made: Kinds, record: SignalRecord) -> tuple[np.ndarray, np.ndarray]:
    """Float32 [R, L, W] and [M] rows; attention rows of a query sum to 1."""
    generator = np.random.default_rng(5)
    lengths = _lengths(made, record.stream)
    if isinstance(record, AttentionRecord):
        shape = len(record.layers), record.heads
        blocks = [generator.random(size=(n, n, *shape)) for n in lengths]
        rows = [(b / b.sum(1, keepdims=True)).reshape(-1, *shape) for b in blocks]
        return np.concatenate(rows).astype(np.float32), lengths**2
    assert isinstance(record, HiddenRecord)
    counts = lengths if record.pool == "none" else np.full(len(lengths), 2)
    size = int(counts.sum()), len(record.layers), record.width
    return generator.normal(size=size).astype(np.float32), counts


def stored(values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """What a dense part holds of float32 values [R, L, W], and its scale [R, L]."""
    if kind == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16), None
    if kind == "int8":
        scale = np.abs(values).max(axis=2) / 127
        return np.rint(values / scale[..., None]).astype(np.int8), scale.astype(np.float32)
    return values.astype(kind), None


def _write(
    writer: CacheWriter, made: Kinds, record: SignalRecord, shard: int, start: int, stop: int
) -> CommitRecord:
    """A shard, in two parts where it has two samples."""
    middle = (start + stop) // 2
    spans = [(start, stop)] if middle == start else [(start, middle), (middle, stop)]
    parts: list[PartRecord] = []
    entries: dict[str, int] = {}
    for number, (a, b) in enumerate(spans):
        if isinstance(record, HiddenRecord | AttentionRecord):
            values, counts = made.dense[record.name]
            offsets = offsets_of(counts)
            arrays = stored(values[offsets[a] : offsets[b]], record.values)
            parts.append(writer.write_dense_part(record.name, shard, number, a, b, *arrays))
            found = {"values": int(offsets[b] - offsets[a])}
        else:
            columns = made.columns[record.name]
            mine = {name: rows_of(column, a, b) for name, column in columns.items()}
            batch = ragged_batch(signal_schema(record), mine)
            parts.append(writer.write_part(record.name, shard, number, a, b, batch))
            found = {name: int(column.offsets[-1]) for name, column in mine.items()}
        for name, count in found.items():
            entries[name] = entries.get(name, 0) + count
    inputs = {name: writer.commit_record(name, shard).digest for name in record.inputs}
    tokens = entries[MAIN_COLUMN[record.kind]]
    return _commit(record.name, shard, parts, tokens, entries, inputs)


def _commit(
    signal: str,
    shard: int,
    parts: list[PartRecord],
    tokens: int,
    entries: dict[str, int],
    inputs: dict[str, str] | None = None,
) -> CommitRecord:
    return CommitRecord(
        signal=signal,
        shard=shard,
        start=parts[0].start,
        stop=parts[-1].stop,
        tokens=tokens,
        entries=entries,
        inputs=inputs or {},
        parts=parts,
    )
