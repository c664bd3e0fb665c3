"""A reader written from docs/format.md with json and pyarrow alone decodes the labels."""

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdcache.formats.codec import Codec, FullCodec, TopKCodec
from tests.formats.labels import SENTENCES, THRESHOLD, VOCAB, encode, make_cache, teacher_log_probs


def stranger_reads(root: Path, signal: str) -> list[tuple[list[int], list[dict[int, float]]]]:
    """(target ids, {id: weight} of every position) of every sample of a cache."""

    def record(path: str) -> dict:
        return json.loads((root / path).read_text())

    def lists(file: str, column: str) -> list[list[dict]]:
        table = pa.ipc.open_file(pa.OSFile(str(root / file))).read_all()
        return table[column].to_pylist() if column in table.column_names else [[]] * len(table)

    def ids(entries: list[dict]) -> list[int]:
        return [entry["id"] + (entry.get("id_high", 0) << 16) for entry in entries]

    about, samples = record(f"signals/{signal}.json"), []
    codec, vocab_size = about["codec"], about["vocab_size"]
    span = -math.log(codec["c"]) if codec["name"] == "threshold" else 25.0
    for shard in range(len(record("kdcache.json")["shards"])):
        texts = record(f"commits/samples.{shard:05d}.json")["parts"][0]["file"]["path"]
        targets = iter(lists(texts, f"stream.{about['stream']}"))
        for part in record(f"commits/{signal}.{shard:05d}.json")["parts"]:
            columns = [lists(part["file"]["path"], name) for name in ("tokens", "exact", "drawn")]
            for tokens, exact, drawn in zip(*columns, strict=True):
                labels, kept, picked = [], iter(exact), iter(drawn)
                for token in tokens:
                    head = list(islice(kept, token.get("num_exact", vocab_size)))
                    weights = [math.exp(-span * (entry["code"] / 255) ** 2) for entry in head]
                    names = range(vocab_size) if codec["name"] == "full" else ids(head)
                    tail = ids(list(islice(picked, token.get("num_drawn", 0))))
                    label = dict(zip(names, weights, strict=True))
                    labels.append(label | dict.fromkeys(tail, codec.get("c")))
                samples.append((ids(next(targets)), labels))
    return samples


@pytest.mark.parametrize(
    ("codec", "vocab_size"),
    [(THRESHOLD, VOCAB), (TopKCodec(k=3), VOCAB), (FullCodec(), VOCAB), (THRESHOLD, 70_000)],
    ids=["threshold", "topk", "full", "threshold, three-byte ids"],
)
def test_a_stranger_decodes_the_labels(tmp_path: Path, codec: Codec, vocab_size: int) -> None:
    root = make_cache(tmp_path / "cache", {"logits": codec}, part_bytes=600, vocab_size=vocab_size)
    samples = stranger_reads(root, "logits")
    assert [ids for ids, _ in samples] == [encode(text, True) for text in SENTENCES["tgt"]]
    labels = [label for _, positions in samples for label in positions]
    teacher = np.exp(teacher_log_probs(len(labels), vocab_size))
    for label, probs in zip(labels, teacher, strict=True):
        if codec.name == "threshold":
            kept = {i: w for i, w in label.items() if probs[i] >= codec.c}
            assert sorted(kept) == np.flatnonzero(probs >= codec.c).tolist()
            assert all(w == codec.c for i, w in label.items() if i not in kept)
        else:
            most = codec.max_exact(vocab_size)
            assert sorted(label) == sorted(np.argsort(-probs)[:most].tolist())
            kept = label
        for i, weight in kept.items():
            assert weight == pytest.approx(probs[i], rel=0.1, abs=1e-4)
