"""A reader written from docs/format.md with json and pyarrow alone decodes the labels."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdcache.formats.codec import Codec, FullCodec, TopKCodec
from tests.formats.labels import SENTENCES, THRESHOLD, VOCAB, encode, make_cache, teacher_log_probs


def stranger_reads(root: Path, signal: str) -> list[tuple[list[int], list[dict[int, float]]]]:
    """(target ids, {id: weight} of every position) of every sample of a cache."""

    def lists(file: str, column: str) -> list[list[dict]]:
        return pa.ipc.open_file(pa.OSFile(str(root / file))).read_all()[column].to_pylist()

    def ids(entries: list[dict]) -> list[int]:
        return [entry["id"] + (entry.get("id_high", 0) << 16) for entry in entries]

    manifest = json.loads((root / "kdcache.json").read_text())
    record = json.loads((root / f"signals/{signal}.json").read_text())
    codec, samples = record["codec"], []
    span = -math.log(codec["c"]) if codec["name"] == "threshold" else 25.0
    for shard in range(len(manifest["shards"])):
        commits = [
            json.loads((root / f"commits/{kind}.{shard:05d}.json").read_text())
            for kind in ("samples", signal)
        ]
        stream = lists(commits[0]["parts"][0]["file"]["path"], f"stream.{record['stream']}")
        targets = iter([ids(tokens) for tokens in stream])
        for part in commits[1]["parts"]:
            file = part["file"]["path"]
            rows = [lists(file, "tokens"), lists(file, "exact")]
            rows.append(
                lists(file, "drawn") if codec["name"] == "threshold" else [[]] * len(rows[0])
            )
            for tokens, exact, drawn in zip(*rows, strict=True):
                labels, exact, drawn = [], iter(exact), iter(drawn)
                for token in tokens:
                    kept = [
                        next(exact) for _ in range(token.get("num_exact", record["vocab_size"]))
                    ]
                    names = range(len(kept)) if codec["name"] == "full" else ids(kept)
                    label = {
                        i: math.exp(-span * (entry["code"] / 255) ** 2)
                        for i, entry in zip(names, kept, strict=True)
                    }
                    picked = [next(drawn) for _ in range(token.get("num_drawn", 0))]
                    labels.append(label | dict.fromkeys(ids(picked), codec.get("c")))
                samples.append((next(targets), labels))
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
