"""Readers written from docs/format.md with json, pyarrow and numpy alone read every kind."""

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from kdcache.formats.codec import Codec, FullCodec, TopKCodec
from tests.formats.kinds import DENSE, LABELS, Kinds
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
        texts = record(f"commits/samples.{shard:05d}.json")["parts"][0]["files"][0]["path"]
        targets = iter(lists(texts, f"stream.{about['stream']}"))
        for part in record(f"commits/{signal}.{shard:05d}.json")["parts"]:
            columns = [
                lists(part["files"][0]["path"], name) for name in ("tokens", "exact", "drawn")
            ]
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


def rows_of_parts(root: Path, signal: str) -> Iterator[dict]:
    """Every row of every part of a signal that lies in Arrow files."""
    for shard in range(len(json.loads((root / "kdcache.json").read_text())["shards"])):
        commit = json.loads((root / f"commits/{signal}.{shard:05d}.json").read_text())
        for part in commit["parts"]:
            file = pa.OSFile(str(root / part["files"][0]["path"]))
            yield from pa.ipc.open_file(file).read_all().to_pylist()


def cut(items: list, counts: list[int]) -> list[list]:
    rest = iter(items)
    return [list(islice(rest, count)) for count in counts]


def test_a_stranger_reads_hypotheses_masks_and_scores(kinds: Kinds) -> None:
    beams = []
    for row in rows_of_parts(kinds.root, "beams"):
        ids = [token["id"] for token in row["tokens"]]
        pieces = cut(ids, [h["num_tokens"] for h in row["hypotheses"]])
        about = [(h["log_prob"], h["score"]) for h in row["hypotheses"]]
        beams.append([(ids, *rest) for ids, rest in zip(pieces, about, strict=True)])
    assert beams == kinds.beams
    masked = []
    for row in rows_of_parts(kinds.root, "masks"):
        pairs = [(entry["position"], entry["id"]) for entry in row["masked"]]
        masked.append(cut(pairs, [replica["num_masked"] for replica in row["replicas"]]))
    assert masked == kinds.masked
    scores = [[s["value"] for s in row["scores"]] for row in rows_of_parts(kinds.root, "classes")]
    flat = kinds.columns["classes"]["scores"].fields["value"]
    assert scores == flat.reshape(-1, len(LABELS)).tolist()


def stranger_reads_array(folder: Path) -> np.ndarray:
    """A Zarr array [R, L, ...] of a part, read by numpy alone."""
    about = json.loads((folder / "zarr.json").read_text())
    rows, layers, *rest = about["shape"]
    dtype = np.dtype(about["data_type"])
    row_chunks, size = -(-rows // 512), 512 * math.prod(rest) * dtype.itemsize
    data = (folder.joinpath("c", *"0" * len(about["shape"]))).read_bytes()
    index = np.frombuffer(data[-4 - 16 * row_chunks * layers : -4], dtype="<u8")
    array = np.empty((row_chunks, 512, layers, *rest), dtype=dtype)
    for number, (offset, length) in enumerate(index.reshape(-1, 2).astype(int)):
        assert length == size + 4
        chunk = np.frombuffer(data[offset : offset + size], dtype=dtype)
        array[number // layers, :, number % layers] = chunk.reshape(512, *rest)
    return array.reshape(row_chunks * 512, layers, *rest)[:rows]


@pytest.mark.parametrize("signal", DENSE)
def test_a_stranger_reads_hidden_states_and_attentions(kinds: Kinds, signal: str) -> None:
    found: dict[str, list[np.ndarray]] = {}
    for shard in range(3):
        commit = json.loads((kinds.root / f"commits/{signal}.{shard:05d}.json").read_text())
        for part in commit["parts"]:
            folder = kinds.root.joinpath(*part["files"][0]["path"].split("/")[:2])
            digests = "".join(file["xxh3"] for file in part["files"])
            assert folder.stem.endswith(xxhash.xxh3_64_hexdigest(digests.encode()))
            for name in kinds.columns[signal]["values"].fields:
                found.setdefault(name, []).append(stranger_reads_array(folder / name))
    for name, expected in kinds.columns[signal]["values"].fields.items():
        np.testing.assert_array_equal(np.concatenate(found[name]), expected)
