"""Samples shards with tasks, and with more of their tokens than ids."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdcache.errors import FormatError
from kdcache.formats.checks.structure import sample_faults
from kdcache.formats.identity import sample_id
from kdcache.formats.manifest import CorpusRecord, FileRecord, PartRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import (
    extra_fields,
    samples_batch,
    samples_schema,
    split_ids,
    stream_extras,
)
from kdcache.formats.shard import SampleShard, open_part, sample_shard

TASKS = ["b", "a"]
TEXTS = ["x", "yy", ""]
LABELS = ["1", "", "0"]
OF_TASK = ["a", "b", "a"]
VOCAB = 70_000


def shard(
    root: Path,
    tasks: list[str] | None = None,
    loss: tuple[int, ...] = (0, 1, 1, 0),
    labels: list[str] | None = None,
) -> SampleShard:
    """Three samples, written to a file and opened; their ids are those of LABELS."""
    schema = samples_schema(["text", "gold"], {"s": VOCAB}, {"s": ["loss"]}, tasks=True)
    ids = split_ids(np.array([5, 69_999, 6, 7]), VOCAB)
    stream = Ragged(np.array([0, 2, 3, 4]), {**ids, "loss": np.array(loss, dtype=np.uint8)})
    rows = zip(TEXTS, LABELS, OF_TASK, strict=True)
    packed = b"".join(sample_id([text, label], task, label) for text, label, task in rows)
    batch = samples_batch(
        schema,
        np.frombuffer(packed, dtype=np.uint8).reshape(-1, 16),
        np.arange(3),
        {"text": TEXTS, "gold": labels or LABELS},
        {"s": stream},
        tasks or OF_TASK,
    )
    path = f"samples/00000.0-{'0' * 16}.arrow"
    (root / "samples").mkdir()
    with pa.ipc.new_file(str(root / path), schema) as writer:
        writer.write_batch(batch)
    file = FileRecord(path=path, bytes=1, crc32c="0" * 8, xxh3="0" * 16)
    part = PartRecord(start=0, stop=3, files=[file])
    data = memoryview((root / path).read_bytes())
    return sample_shard(part, open_part(data, path, part, schema, checked=False))


CORPUS = CorpusRecord(
    digest="a" * 32,
    num_samples=3,
    num_rows=3,
    dropped={},
    fields=["text", "gold"],
    tasks=TASKS,
    label="gold",
)


@pytest.mark.parametrize(
    ("pair", "template", "expected"),
    [
        (None, "none", ()),
        ("b", "none", ("segment",)),
        (None, "chat", ("loss",)),
        ("b", "chat", ("segment", "loss")),
    ],
)
def test_what_stands_beside_the_ids(pair: str | None, template: str, expected: tuple) -> None:
    assert stream_extras(pair, template) == expected


def test_tasks_and_extras_round_trip(tmp_path: Path) -> None:
    found = shard(tmp_path)
    assert found._batch.schema.names == [
        *("sample_id", "row", "task", "field.text", "field.gold", "stream.s")
    ]
    struct = found._batch.schema.field("stream.s").type.value_type
    assert [field.name for field in struct] == ["id", "id_high", "loss"]
    names = found.tasks()
    assert names is not None
    assert names.to_pylist() == OF_TASK
    assert found.task_index(TASKS).tolist() == [1, 0, 1]
    extras = extra_fields(found.streams["s"].fields)
    assert {name: values.tolist() for name, values in extras.items()} == {"loss": [0, 1, 1, 0]}
    assert sample_faults(found, CORPUS, {"s": VOCAB}) == []


def test_a_task_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    found = shard(tmp_path, tasks=["a", "c", "a"])
    message = "task 'c', expected one of ['b', 'a']"
    with pytest.raises(FormatError, match=f"samples 0 to 3: {re.escape(message)}"):
        found.task_index(TASKS)
    assert message in sample_faults(found, CORPUS, {"s": VOCAB})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tasks": ["a", "a", "a"]}, "sample 1: sample_id is not that of its fields"),
        ({"labels": ["1", "", "1"]}, "sample 2: sample_id is not that of its fields"),
        ({"loss": (0, 2, 0, 0)}, "stream s: a loss is neither 0 nor 1"),
    ],
)
def test_what_cannot_be(change: dict, fault: str, tmp_path: Path) -> None:
    assert sample_faults(shard(tmp_path, **change), CORPUS, {"s": VOCAB}) == [fault]


def test_the_label_enters_the_id_by_itself(tmp_path: Path) -> None:
    unlabelled = CORPUS.model_copy(update={"label": None})
    assert sample_faults(shard(tmp_path), unlabelled, {"s": VOCAB}) == [
        "sample 0: sample_id is not that of its fields"
    ]
