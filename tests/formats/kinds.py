"""Hand-made signals of every kind, added to a hand-made cache.

# M samples, R replicas, L layers, W width, C labels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import FullCodec, TopKCodec
from kdcache.formats.dense import SCALE, VALUES
from kdcache.formats.manifest import CommitRecord
from kdcache.formats.ragged import Ragged, concat, offsets_of
from kdcache.formats.schema import join_ids, ragged_batch, signal_schema, split_ids
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    ClassesRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.writer import CacheWriter
from tests.formats.labels import VOCAB, code_labels, make_cache, teacher_log_probs, teacher_record

REPLICAS, LAYERS, WIDTH, HEADS, HYPOTHESES = 2, (0, 2, 3), 4, 2, 3
LABELS = ["no", "maybe", "yes"]

#: Signals whose parts are Zarr groups.
DENSE = ["hidden", "hidden_bf16", "hidden_int8", "pooled", "masked_hidden", "attention"]

#: What a logits signal labels, beside "targets".
LOGITS = ["at_positions", "at_masked", "at_segment", "best", "second", "every"]


@dataclass(frozen=True)
class Kinds:
    """What was written.

    Attributes:
        root: the cache.
        targets: M lists of target tokens.
        masked: per sample and replica the (position, id) pairs.
        beams: per sample the hypotheses, as (ids, log_prob, score).
        columns: signal to its columns over the whole corpus.
    """

    root: Path
    targets: list[list[int]]
    masked: list[list[list[tuple[int, int]]]]
    beams: list[list[tuple[list[int], float, float]]]
    columns: dict[str, dict[str, Ragged]]

    def rows(self, signal: str) -> list[int]:
        """Records of the main column that each sample has, counted by hand."""
        lengths = [len(ids) for ids in self.targets]
        masked = [sum(map(len, replicas)) for replicas in self.masked]
        hypotheses = [[len(ids) for ids, _, _ in beam] for beam in self.beams]
        replicas = [REPLICAS] * len(lengths)
        counts = {
            "hidden": lengths,
            "hidden_bf16": lengths,
            "hidden_int8": lengths,
            "pooled": [1] * len(lengths),
            "masked_hidden": [REPLICAS * n for n in lengths],
            "attention": [n * n for n in lengths],
            "masks": replicas,
            "classes": [len(LABELS)] * len(lengths),
            "masked_classes": [REPLICAS * len(LABELS)] * len(lengths),
            "at_positions": [n - 1 for n in lengths],
            "at_masked": masked,
            "at_segment": masked,
            "best": [beam[0] for beam in hypotheses],
            "second": [beam[1] if len(beam) > 1 else 0 for beam in hypotheses],
            "every": list(map(sum, hypotheses)),
        }
        return counts[signal]


def make_kinds(
    root: Path,
    part_samples: int = 2,
    only: Sequence[str] | None = None,
    seed: int = 1,
    **options: Any,
) -> Kinds:
    """Write a cache with a signal of every kind.

    Args:
        root: where.
        part_samples: samples of a part.
        only: these signals; all without it.
        seed: another one gives other records and values for the same samples.
        options: of `make_cache`, whose own logits signals are none without `codecs`.
    """
    make_cache(root, **{"codecs": {}, **options})
    cache = open_cache(root)
    stream = concat([cache.samples(n).streams["tgt"] for n in range(cache.num_shards)])
    targets = [
        join_ids(stream.fields)[a:b].tolist()
        for a, b in zip(stream.offsets[:-1], stream.offsets[1:], strict=True)
    ]
    kinds = Kinds(root, targets, made_up_masks(targets), made_up_beams(len(targets)), {})
    records = made_up_records(cache, seed)
    with CacheWriter(root) as writer:
        for name, record in records.items():
            if only is not None and name not in only:
                continue
            kinds.columns[name] = made_up_columns(kinds, record)
            write_signal(writer, open_cache(root), record, kinds.columns[name], part_samples)
    return kinds


def made_up_masks(targets: list[list[int]]) -> list[list[list[tuple[int, int]]]]:
    draw = np.random.default_rng(1)
    masked = []
    for ids in targets:
        replicas = []
        for _ in range(REPLICAS):
            chosen = np.flatnonzero(draw.random(len(ids)) < 0.5).tolist()
            replicas.append([(at, int(draw.integers(VOCAB))) for at in chosen])
        masked.append(replicas)
    return masked


def made_up_beams(num_samples: int) -> list[list[tuple[list[int], float, float]]]:
    draw = np.random.default_rng(2)
    beams = []
    for _ in range(num_samples):
        hypotheses = []
        for rank in range(int(draw.integers(1, HYPOTHESES + 1))):
            ids = [*draw.integers(4, VOCAB, int(draw.integers(0, 5))).tolist(), 2]
            hypotheses.append((ids, -1.5 - rank, -0.5 - rank))
        beams.append(hypotheses)
    return beams


def made_up_records(cache: Cache, seed: int = 1) -> dict[str, SignalRecord]:
    """Records of all signals, those that others are made from first."""

    def about(name: str, **fields: Any) -> dict[str, Any]:
        stream = {"stream": "tgt", "stream_digest": cache.stream("tgt").digest}
        rest = {"seed": seed, "teacher": teacher_record(), "recipe": {}, "versions": {}}
        return {"name": name, **stream, **rest, **fields}

    hidden = {"side": "encoder", "layers": LAYERS, "width": WIDTH, "pool": "none"}
    logits = {"vocab_size": VOCAB, "codec": TopKCodec(k=3), "temperatures": (1.0,)}
    scores = {"task": None, "problem": "classification", "labels": LABELS}
    records: list[SignalRecord] = [
        MasksRecord(
            **about("masks", teacher=None),
            scheme="bert",
            replicas=REPLICAS,
            vocab_size=VOCAB,
            mask_id=3,
            parameters={"probability": 0.5},
        ),
        BeamsRecord(
            **about("beams", source="src", source_digest=cache.stream("src").digest),
            vocab_size=VOCAB,
            num_hypotheses=HYPOTHESES,
            decoding={"mode": "beam"},
        ),
        HiddenRecord(**about("hidden"), **hidden, values="float16"),
        HiddenRecord(**about("hidden_bf16"), **hidden, values="bfloat16"),
        HiddenRecord(**about("hidden_int8"), **hidden, values="int8"),
        HiddenRecord(**about("pooled"), **{**hidden, "pool": "mean"}, values="float16"),
        HiddenRecord(**about("masked_hidden", masks="masks"), **hidden, values="int8"),
        AttentionRecord(
            **about("attention"),
            side="encoder",
            layers=(1, 2),
            heads=HEADS,
            averaged=False,
            values="float16",
        ),
        ClassesRecord(**about("classes"), **scores, values="float32"),
        ClassesRecord(**about("masked_classes", masks="masks"), **scores, values="float16"),
        LogitsRecord(**about("at_positions"), at="positions", **logits),
        LogitsRecord(**about("at_masked", masks="masks"), at="masked", **logits),
        LogitsRecord(**about("at_segment", masks="masks"), at="segment", **logits),
        LogitsRecord(**about("best", hypotheses="beams"), at="targets", **logits),
        LogitsRecord(**about("second", hypotheses="beams", hypothesis=1), at="targets", **logits),
        LogitsRecord(
            **about("every", hypotheses="beams", hypothesis="all"),
            at="targets",
            **{**logits, "codec": FullCodec()},
        ),
    ]
    return {record.name: record for record in records}


def ragged(lists: list[list[Any]], fields: dict[str, np.ndarray]) -> Ragged:
    return Ragged(offsets_of(np.array([len(items) for items in lists])), fields)


def made_up_columns(kinds: Kinds, record: SignalRecord) -> dict[str, Ragged]:
    """Columns of one signal over the whole corpus."""
    draw = np.random.default_rng(len(record.name) + 1000 * (record.seed - 1))
    if isinstance(record, MasksRecord):
        pairs = [[pair for replica in one for pair in replica] for one in kinds.masked]
        flat = np.array([pair for one in pairs for pair in one]).reshape(-1, 2)
        counts = [len(replica) for one in kinds.masked for replica in one]
        fields = {"position": flat[:, 0].astype(np.uint16), **split_ids(flat[:, 1], VOCAB)}
        replicas = {"num_masked": np.array(counts, dtype=np.uint16)}
        return {"replicas": ragged(kinds.masked, replicas), "masked": ragged(pairs, fields)}
    if isinstance(record, BeamsRecord):
        ids = [[i for hypothesis in beam for i in hypothesis[0]] for beam in kinds.beams]
        every = [hypothesis for beam in kinds.beams for hypothesis in beam]
        fields = {
            "num_tokens": np.array([len(h[0]) for h in every], dtype=np.uint16),
            "log_prob": np.array([h[1] for h in every], dtype=np.float32),
            "score": np.array([h[2] for h in every], dtype=np.float32),
        }
        tokens = split_ids(np.array([i for beam in ids for i in beam]), VOCAB)
        return {"hypotheses": ragged(kinds.beams, fields), "tokens": ragged(ids, tokens)}
    counts = np.array(kinds.rows(record.name))
    total = int(counts.sum())
    if isinstance(record, LogitsRecord):
        gold = draw.integers(0, VOCAB, total)
        return code_labels(
            teacher_log_probs(total, VOCAB), gold, counts, record.codec, record.temperatures
        )
    if isinstance(record, ClassesRecord):
        values = draw.normal(size=total).astype(record.values)
        return {"scores": Ragged(offsets_of(counts), {"value": values})}
    if isinstance(record, AttentionRecord):
        fields = {VALUES: made_up_attention(kinds.targets, draw)}
    else:
        assert isinstance(record, HiddenRecord)
        fields = made_up_hidden(record, total, draw)
    return {VALUES: Ragged(offsets_of(counts), fields)}


def made_up_hidden(
    record: HiddenRecord, rows: int, draw: np.random.Generator
) -> dict[str, np.ndarray]:
    shape = (rows, len(record.layers), record.width)
    if record.values == "int8":
        scale = draw.random(shape[:2]).astype(np.float32)
        return {VALUES: draw.integers(-127, 128, shape).astype(np.int8), SCALE: scale}
    values = draw.normal(size=shape).astype(np.float32)
    if record.values == "bfloat16":
        return {VALUES: (values.view(np.uint32) >> 16).astype(np.uint16)}
    return {VALUES: values.astype(np.float16)}


def made_up_attention(targets: list[list[int]], draw: np.random.Generator) -> np.ndarray:
    """[sum T * T, 2, heads] float16; every query's row adds up to 1."""
    pieces = []
    for ids in targets:
        num = len(ids)
        weights = draw.random((num, num, 2, HEADS))
        weights /= weights.sum(axis=1, keepdims=True)
        pieces.append(weights.reshape(num * num, 2, HEADS).astype(np.float16))
    return np.concatenate(pieces)


def write_signal(
    writer: CacheWriter,
    cache: Cache,
    record: SignalRecord,
    columns: dict[str, Ragged],
    part_samples: int,
) -> None:
    """Write and commit every shard of a signal."""
    writer.write_signal(record)
    for shard in range(cache.num_shards):
        with writer.claimed(record.name, shard):
            writer.commit(_written(writer, cache, record, columns, shard, part_samples))


def _written(
    writer: CacheWriter,
    cache: Cache,
    record: SignalRecord,
    columns: dict[str, Ragged],
    shard: int,
    part_samples: int,
) -> CommitRecord:
    """The commit of a shard whose parts are written."""
    plan = cache.manifest.shards[shard]
    main = {"beams": "tokens", "masks": "replicas", "classes": "scores", "logits": "tokens"}
    parts, entries = [], dict.fromkeys(columns, 0)
    for number, start in enumerate(range(plan.start, plan.stop, part_samples)):
        stop = min(plan.stop, start + part_samples)
        mine = {name: column.take(np.arange(start, stop)) for name, column in columns.items()}
        place = (record.name, shard, number, start, stop)
        if record.kind in ("hidden", "attention"):
            fields = mine[VALUES].fields
            parts.append(writer.write_dense_part(*place, fields[VALUES], fields.get(SCALE)))
        else:
            parts.append(writer.write_part(*place, ragged_batch(signal_schema(record), mine)))
        for name, column in mine.items():
            entries[name] += int(column.offsets[-1])
    commits = {name: cache.commit_record(name, shard).digest for name in record.inputs}
    return CommitRecord(
        signal=record.name,
        shard=shard,
        start=plan.start,
        stop=plan.stop,
        tokens=entries[main.get(record.kind, VALUES)],
        entries=entries,
        inputs=commits,
        parts=parts,
    )
