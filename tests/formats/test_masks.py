"""Masks put over streams, against lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import FormatError
from kdcache.formats.masks import masked_stream, masked_tokens, masks_columns
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import masks_schema, ragged_batch, ragged_columns, split_ids


@st.composite
def masked_samples(draw):
    """V, samples of token ids, and for every sample and replica the (position, id) masked."""
    vocab_size = draw(st.sampled_from([50, 70_000]))
    replicas = draw(st.integers(1, 3))
    token = st.integers(0, vocab_size - 1)
    samples = draw(st.lists(st.lists(token, max_size=6), min_size=1, max_size=5))
    masks = [
        [
            [(position, draw(token)) for position in range(len(ids)) if draw(st.booleans())]
            for _ in range(replicas)
        ]
        for ids in samples
    ]
    return vocab_size, samples, masks


def stream_of(samples, fields) -> Ragged:
    lengths = np.array([len(ids) for ids in samples])
    return Ragged(offsets_of(lengths), fields(np.array([i for ids in samples for i in ids], int)))


def columns_of(masks, vocab_size) -> dict[str, Ragged]:
    flat = [pair for sample in masks for replica in sample for pair in replica]
    columns = masks_columns(
        np.array([[len(replica) for replica in sample] for sample in masks]),
        np.array([position for position, _ in flat], dtype=np.int64),
        np.array([i for _, i in flat], dtype=np.int64),
        vocab_size,
    )
    # Through Arrow, as they come out of a file.
    return ragged_columns(ragged_batch(masks_schema(vocab_size), columns))


@given(masked_samples(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_masks_are_put_over_the_tokens_of_chosen_rows(given_masks, random) -> None:
    vocab_size, samples, masks = given_masks
    columns = columns_of(masks, vocab_size)
    rows = [(m, r) for m in range(len(samples)) for r in range(len(masks[0]))]
    chosen = random.choices(rows, k=5)
    of, replica = (np.array(part) for part in zip(*chosen, strict=True))
    stored = stream_of(samples, lambda ids: split_ids(ids, vocab_size))
    joined = stream_of(samples, lambda ids: {"id": ids, "segment": (ids % 2).astype(np.uint8)})
    expected = []
    for m, r in chosen:
        ids = list(samples[m])
        for position, token in masks[m][r]:
            ids[position] = token
        expected.append(ids)
    for stream in (stored, joined):
        found = masked_stream(stream, columns, of, replica)
        assert split(found, "id") == expected
        assert found.fields["id"].dtype == np.int32
    assert set(found.fields) == {"id", "segment"}
    assert split(found, "segment") == [[i % 2 for i in samples[m]] for m, _ in chosen]
    assert joined.fields["id"].tolist() == [i for ids in samples for i in ids]  # not touched
    tokens = masked_tokens(columns, of, replica)
    pairs = list(zip(split(tokens, "position"), split(tokens, "id"), strict=True))
    assert [list(zip(*pair, strict=True)) for pair in pairs] == [masks[m][r] for m, r in chosen]


def split(ragged: Ragged, field: str) -> list[list[int]]:
    return [
        ragged.fields[field][a:b].tolist()
        for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)
    ]


def test_columns_of_a_slice_serve_as_well() -> None:
    masks = [[[(0, 1)], [(0, 2), (1, 3)]], [[], [(2, 4)]], [[(1, 5)], [(0, 6)]]]
    whole = columns_of(masks, 50)
    part = {name: Ragged(column.offsets[1:], column.fields) for name, column in whole.items()}
    found = masked_tokens(part, np.array([1, 0, 0]), np.array([1, 1, 0]))
    assert split(found, "id") == [[6], [4], []]
    assert split(found, "position") == [[0], [2], []]


@pytest.mark.parametrize("replica", [2, -1])
def test_a_replica_that_there_is_not_is_refused(replica: int) -> None:
    columns = columns_of([[[(0, 1)], []]], 50)
    with pytest.raises(FormatError, match=f"replica {replica} of a sample that has 2"):
        masked_tokens(columns, np.array([0]), np.array([replica]))


def test_no_rows_give_no_tokens() -> None:
    columns, none = columns_of([[[(0, 1)]]], 50), np.zeros(0, dtype=np.int64)
    stream = stream_of([[3, 4]], lambda ids: {"id": ids})
    assert len(masked_stream(stream, columns, none, none)) == 0


@pytest.mark.parametrize(
    ("counts", "position", "token"),
    [([[1]], 65_536, 1), ([[65_536]], 1, 1), ([[1]], 1, 50)],
    ids=["position", "count", "id"],
)
def test_what_does_not_fit_its_field_is_refused(counts, position, token) -> None:
    with pytest.raises(FormatError):
        masks_columns(np.array(counts), np.array([position]), np.array([token]), 50)
    masks_columns(np.array([[1]]), np.array([65_535]), np.array([49]), 50)
