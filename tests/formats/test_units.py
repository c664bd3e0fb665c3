"""How many records each sample must have, against counts by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdcache.errors import FormatError
from kdcache.formats.cache import open_cache
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import samples_batch, samples_schema
from kdcache.formats.shard import SampleShard, sample_shard
from kdcache.formats.signals import ClassesRecord, LogitsRecord
from kdcache.formats.units import MAIN_COLUMN, label_counts, num_replicas
from tests.formats.kinds import DENSE, LABELS, LOGITS, REPLICAS, Kinds, made_up_records
from tests.formats.labels import encode


@pytest.mark.parametrize("signal", [*DENSE, *LOGITS, "masks", "classes", "masked_classes"])
def test_counts_are_those_made_by_hand(kinds: Kinds, signal: str) -> None:
    cache = open_cache(kinds.root)
    record = cache.signal(signal)
    found = []
    for shard, plan in enumerate(cache.manifest.shards):
        counts = label_counts(cache, record, shard)
        assert counts is not None
        assert counts.dtype == np.int64
        assert len(counts) == plan.num_samples
        found += counts.tolist()
    assert found == kinds.rows(signal)
    column = kinds.columns[signal][MAIN_COLUMN[record.kind]]
    assert column.lengths.tolist() == found


def test_targets_have_a_label_for_every_token(tiny_cache) -> None:
    cache = open_cache(tiny_cache)
    found = [label_counts(cache, cache.signal("logits"), n) for n in range(3)]
    lengths = [
        len(encode(text, True))
        for n in range(3)
        for text in cache.samples(n).text("tgt").to_pylist()
    ]
    assert np.concatenate(found).tolist() == lengths


def test_beams_have_as_many_as_they_have(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    assert label_counts(cache, cache.signal("beams"), 0) is None


def stub(shard: SampleShard) -> Any:
    """A cache of one shard in memory."""
    return SimpleNamespace(samples=lambda number: shard, path="stub")


def shard_of(lengths: list[int], loss: list[int] | None, tasks: list[str] | None) -> SampleShard:
    """Samples with tokens of no meaning."""
    ids = {"id": np.zeros(sum(lengths), dtype=np.uint16)}
    if loss is not None:
        ids["loss"] = np.array(loss, dtype=np.uint8)
    stream = Ragged(offsets_of(np.array(lengths)), ids)
    extras = {"tgt": ["loss"]} if loss is not None else None
    schema = samples_schema([], {"tgt": 9}, extras, tasks=tasks is not None)
    num = len(lengths)
    batch = samples_batch(
        schema, np.zeros((num, 16), np.uint8), np.arange(num), {}, {"tgt": stream}, tasks
    )
    part = SimpleNamespace(start=0, stop=num)
    return sample_shard(part, pa.RecordBatch.from_arrays(batch.columns, schema=schema))


@pytest.mark.parametrize(
    ("lengths", "loss", "expected"),
    [
        ([3, 1, 0, 4], None, [2, 0, 0, 3]),
        ([3, 1, 0, 4], [0, 1, 1, 1, 0, 0, 0, 1], [2, 0, 0, 1]),
        ([3, 2], [1, 1, 0, 1, 0], [1, 0]),
        ([0, 0], [], [0, 0]),
    ],
    ids=["no mask", "assistant", "the first token has no label", "empty"],
)
def test_positions_under_a_loss_mask(
    kinds: Kinds, lengths: list[int], loss: list[int] | None, expected: list[int]
) -> None:
    record = open_cache(kinds.root).logits("at_positions")
    assert isinstance(record, LogitsRecord)
    counts = label_counts(stub(shard_of(lengths, loss, None)), record, 0)
    assert counts is not None
    assert counts.tolist() == expected


def test_classes_of_one_task(kinds: Kinds) -> None:
    record = open_cache(kinds.root).signal("classes")
    assert isinstance(record, ClassesRecord)
    mine = record.model_copy(update={"task": "sst"})
    shard = shard_of([2, 2, 2], None, ["sst", "sts", "sst"])
    counts = label_counts(stub(shard), mine, 0)
    assert counts is not None
    assert counts.tolist() == [len(LABELS), 0, len(LABELS)]
    counts = label_counts(stub(shard), record, 0)
    assert counts is not None
    assert counts.tolist() == [len(LABELS)] * 3
    with pytest.raises(FormatError, match="labels the task 'sst', the samples of the cache have"):
        label_counts(stub(shard_of([2], None, None)), mine, 0)


def test_replicas(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    records = made_up_records(cache)
    assert num_replicas(cache, records["masked_hidden"]) == REPLICAS
    assert num_replicas(cache, records["hidden"]) == 1
    wrong = records["hidden"].model_copy(update={"masks": "beams"})
    with pytest.raises(FormatError, match="names 'beams' of kind beams as its masks"):
        num_replicas(cache, wrong)
