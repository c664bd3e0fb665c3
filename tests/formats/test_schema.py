"""Schemas: which fields each codec stores, and the way there and back."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import FormatError
from kdcache.formats.codec import (
    Codec,
    FullCodec,
    NucleusCodec,
    SampledCodec,
    ThresholdCodec,
    TopKCodec,
)
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import (
    count_dtype,
    join_ids,
    logits_schema,
    max_bytes_per_token,
    ragged_batch,
    ragged_columns,
    samples_batch,
    samples_schema,
    split_ids,
)


def shape(schema: pa.Schema) -> dict[str, str]:
    return {
        column.name: " ".join(f"{f.name}:{f.type}" for f in column.type.value_type)
        for column in schema
    }


@pytest.mark.parametrize(
    ("codec", "vocab_size", "expected", "most"),
    [
        (
            ThresholdCodec(),
            8000,
            {
                "tokens": "num_exact:uint8 num_drawn:uint8 gold:uint8 entropy:uint8 "
                "tail_0:halffloat tail_1:halffloat",
                "exact": "id:uint16 code:uint8",
                "drawn": "id:uint16",
            },
            8 + 17 * 3 + 17 * 2,
        ),
        (
            ThresholdCodec(c=1 / 500, values="float32"),
            70_000,
            {
                "tokens": "num_exact:uint16 num_drawn:uint16 gold:uint8 entropy:uint8 "
                "tail_0:halffloat tail_1:halffloat",
                "exact": "id:uint16 id_high:uint8 code:float",
                "drawn": "id:uint16 id_high:uint8",
            },
            10 + 501 * 7 + 501 * 3,
        ),
        (
            TopKCodec(k=8, values="float16"),
            65_536,
            {
                "tokens": "num_exact:uint8 gold:uint8 entropy:uint8 "
                "tail_0:halffloat tail_1:halffloat",
                "exact": "id:uint16 code:halffloat",
            },
            7 + 8 * 4,
        ),
        (
            NucleusCodec(p=0.9, k_max=300),
            65_537,
            {
                "tokens": "num_exact:uint16 gold:uint8 entropy:uint8 "
                "tail_0:halffloat tail_1:halffloat",
                "exact": "id:uint16 id_high:uint8 code:uint8",
            },
            8 + 300 * 4,
        ),
        (
            SampledCodec(n=50),
            8000,
            {
                "tokens": "num_drawn:uint8 gold:uint8 entropy:uint8",
                "drawn": "id:uint16 code:uint8",
            },
            3 + 50 * 3,
        ),
        (
            SampledCodec(n=300),
            100,
            {
                "tokens": "num_drawn:uint8 gold:uint8 entropy:uint8",
                "drawn": "id:uint16 code:uint16",
            },
            3 + 100 * 4,
        ),
        (
            FullCodec(),
            30,
            {"tokens": "gold:uint8 entropy:uint8", "exact": "code:uint8"},
            2 + 30,
        ),
    ],
    ids=["threshold", "threshold wide", "topk", "nucleus", "sampled", "sampled many", "full"],
)
def test_logits_schema(codec: Codec, vocab_size: int, expected: dict[str, str], most: int) -> None:
    schema = logits_schema(codec, vocab_size, (1.0, 2.0))
    assert shape(schema) == expected
    assert not any(column.nullable for column in schema)
    assert max_bytes_per_token(codec, vocab_size, (1.0, 2.0)) == most


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, "u1"), (255, "u1"), (256, "u2"), (65_535, "u2"), (65_536, "u4")]
)
def test_count_dtype(largest: int, dtype: str) -> None:
    assert count_dtype(largest) == np.dtype(dtype)


@given(
    st.integers(1, 1 << 24).flatmap(
        lambda v: st.tuples(st.just(v), st.lists(st.integers(0, v - 1), max_size=30))
    )
)
def test_ids_round_trip(case: tuple[int, list[int]]) -> None:
    vocab_size, ids = case
    fields = split_ids(np.array(ids, dtype=np.int64), vocab_size)
    assert ("id_high" in fields) == (vocab_size > 65_536)
    joined = join_ids(fields)
    assert joined.dtype == np.int32
    assert joined.tolist() == ids


@pytest.mark.parametrize("ids", [[-1], [5]], ids=["negative", "beyond"])
def test_split_ids_refuses_what_is_outside(ids: list[int]) -> None:
    with pytest.raises(FormatError, match="the vocabulary has 5"):
        split_ids(np.array(ids), 5)


def test_a_vocabulary_beyond_three_bytes_is_refused() -> None:
    with pytest.raises(FormatError, match="at most 16777216"):
        samples_schema(["src"], {"src": (1 << 24) + 1})


def test_samples_batch_round_trips() -> None:
    schema = samples_schema(["src"], {"src": 70_000})
    ids = split_ids(np.array([1, 69_999, 2]), 70_000)
    batch = samples_batch(
        schema,
        np.arange(32, dtype=np.uint8).reshape(2, 16),
        np.array([4, 9]),
        {"src": ["grüße", ""]},
        {"src": Ragged(np.array([0, 3, 3]), ids)},
    )
    batch.validate(full=True)
    assert batch.schema == schema
    assert batch.column(0).to_pylist() == [bytes(range(16)), bytes(range(16, 32))]
    assert batch.column(2).to_pylist() == ["grüße", ""]
    column = ragged_columns(batch)["stream.src"]
    assert join_ids(column.fields).tolist() == [1, 69_999, 2]
    assert column.lengths.tolist() == [3, 0]


def topk_columns() -> dict[str, Ragged]:
    offsets = np.array([0, 1, 1, 2])
    return {
        "tokens": Ragged(
            offsets,
            {
                "num_exact": np.array([1, 1], np.uint8),
                "gold": np.array([7, 8], np.uint8),
                "entropy": np.array([1, 2], np.uint8),
                "tail_0": np.array([-0.5, -np.inf], np.float16),
            },
        ),
        "exact": Ragged(
            offsets, {"id": np.array([3, 4], np.uint16), "code": np.array([9, 10], np.uint8)}
        ),
    }


def test_ragged_batch_round_trips_without_copies() -> None:
    schema = logits_schema(TopKCodec(k=2), 100, (1.0,))
    batch = ragged_batch(schema, topk_columns())
    batch.validate(full=True)
    back = ragged_columns(batch)
    for name, column in topk_columns().items():
        assert back[name].offsets.tolist() == column.offsets.tolist()
        for key, values in column.fields.items():
            assert back[name].fields[key].tolist() == values.tolist()
            assert not back[name].fields[key].flags.owndata


def test_ragged_batch_takes_a_slice_whose_offsets_start_late() -> None:
    schema = logits_schema(TopKCodec(k=2), 100, (1.0,))
    late = {name: Ragged(c.offsets[1:], c.fields) for name, c in topk_columns().items()}
    back = ragged_columns(ragged_batch(schema, late))
    assert back["exact"].offsets.tolist() == [0, 0, 1]
    assert back["exact"].fields["id"].tolist() == [4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("exact"), "columns"),
        (lambda c: c["exact"].fields.pop("code"), "fields"),
        (lambda c: c["exact"].fields.update(id=np.array([3, 4])), "int64"),
        (lambda c: c["exact"].fields.update(id=np.array([3], np.uint16)), "1 values"),
        (lambda c: c.update(exact=c["exact"].take(np.array([0]))), "differ in samples"),
    ],
    ids=["column missing", "field missing", "wrong dtype", "too few", "other samples"],
)
def test_ragged_batch_refuses_what_is_not_the_schema(change, message: str) -> None:
    columns = topk_columns()
    change(columns)
    with pytest.raises(FormatError, match=message):
        ragged_batch(logits_schema(TopKCodec(k=2), 100, (1.0,)), columns)


def test_streams_are_sorted_by_name() -> None:
    # A record's keys are sorted, so this is the one order that writer and reader both know.
    assert samples_schema(["b", "a"], {"tgt": 5, "src": 5}) == samples_schema(
        ["b", "a"], {"src": 5, "tgt": 5}
    )
    assert samples_schema(["b", "a"], {"tgt": 5, "src": 5}).names == [
        "sample_id",
        "row",
        "field.b",
        "field.a",
        "stream.src",
        "stream.tgt",
    ]
