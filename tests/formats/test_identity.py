"""Digests: golden values, independence of chunks, and what a difference looks like."""

import numpy as np
import pyarrow as pa
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kdcache.formats import identity
from kdcache.formats.identity import (
    CorpusDigest,
    StreamDigest,
    differences,
    sample_id,
    sample_ids,
)


def test_sample_id_is_the_hash_of_length_prefixed_values() -> None:
    data = b"".join(
        len(v).to_bytes(8, "little") + v for v in ("grüße".encode(), b"hi", b"task", b"")
    )
    assert sample_id(["grüße", "hi"], task="task") == xxhash.xxh3_128_digest(data)
    assert sample_id(["ab", "c"]).hex() == "d540562305f27db827ab5ce674821453"


def test_sample_id_tells_fields_apart() -> None:
    ids = {sample_id(["ab", "c"]), sample_id(["a", "bc"]), sample_id(["ab", "c"], label="1")}
    assert len(ids | {sample_id(["ab"], task="c"), sample_id(["ab", "c", ""])}) == 5


def test_corpus_digest_does_not_see_chunks() -> None:
    ids = np.arange(80, dtype=np.uint8).reshape(5, 16)
    rows = np.array([0, 2, 3, 8, 9])
    whole, pieces = CorpusDigest(), CorpusDigest()
    whole.update(ids, rows)
    pieces.update(ids[:2], rows[:2])
    pieces.update(ids[2:], rows[2:])
    raw = b"".join(
        i.tobytes() + int(r).to_bytes(8, "little") for i, r in zip(ids, rows, strict=True)
    )
    assert whole.hexdigest() == pieces.hexdigest() == xxhash.xxh3_128_hexdigest(raw)


def test_stream_digest_sees_tokens_lengths_and_tokenizer() -> None:
    def digest(tokenizer: str, chunks: list[tuple[list[int], list[int]]]) -> str:
        stream = StreamDigest(tokenizer)
        for lengths, ids in chunks:
            stream.update(np.array(lengths), np.array(ids, dtype=np.uint16))
        return stream.hexdigest()

    whole = digest("t", [([2, 1], [5, 6, 7])])
    assert digest("t", [([2], [5, 6]), ([1], [7])]) == whole
    others = [
        digest("u", [([2, 1], [5, 6, 7])]),
        digest("t", [([1, 2], [5, 6, 7])]),
        digest("t", [([2, 1], [5, 6, 8])]),
    ]
    assert whole not in others


def test_stream_digest_sees_what_stands_beside_the_ids() -> None:
    def digest(*chunks: tuple[list[int], list[int], dict[str, list[int]]]) -> str:
        stream = StreamDigest("t")
        for lengths, ids, extras in chunks:
            arrays = {name: np.array(values, dtype=np.uint8) for name, values in extras.items()}
            stream.update(np.array(lengths), np.array(ids), arrays)
        return stream.hexdigest()

    plain = digest(([2, 1], [5, 6, 7], {}))
    # Caches of plain streams keep their digests.
    assert plain == "fe68c9e799639bdf812d1134762bbcb1"
    both = digest(([2, 1], [5, 6, 7], {"segment": [0, 0, 1], "loss": [1, 1, 0]}))
    pieces = digest(
        ([2], [5, 6], {"loss": [1, 1], "segment": [0, 0]}),
        ([1], [7], {"loss": [0], "segment": [1]}),
    )
    assert pieces == both
    others = [
        plain,
        digest(([2, 1], [5, 6, 7], {"segment": [0, 0, 1]})),
        digest(([2, 1], [5, 6, 7], {"loss": [0, 0, 1]})),
        digest(([2, 1], [5, 6, 7], {"segment": [0, 0, 0], "loss": [1, 1, 0]})),
        digest(([2, 1], [5, 6, 7], {"segment": [1, 1, 0], "loss": [0, 0, 1]})),
    ]
    assert len({both, *others}) == 6


def test_differences_name_keys_and_both_sides() -> None:
    standing = {"codec": {"name": "topk", "k": 8}, "versions": {"a": "1"}, "files": [1, 2]}
    given = {"codec": {"name": "topk", "k": 12}, "versions": {"a": "2"}, "files": [1]}
    assert differences(standing, given, ignore=["versions"]) == [
        "codec.k: 8 in the cache, 12 given",
        "files.1: 2 in the cache, absent given",
    ]
    assert differences(standing, standing) == []


@given(st.data())
def test_sample_ids_of_many_are_those_of_each(data: st.DataObject) -> None:
    num = data.draw(st.integers(0, 6))
    text = st.text(max_size=300)
    columns = data.draw(
        st.lists(st.lists(text, min_size=num, max_size=num), min_size=1, max_size=3)
    )
    task, label = (data.draw(st.none() | st.lists(text, min_size=num, max_size=num)) for _ in "ab")
    arrays = [pa.array(["not", *column, "these"], type=pa.string())[1:-1] for column in columns]
    extra = [None if one is None else pa.array(one, type=pa.string()) for one in (task, label)]
    before = identity._BYTES_AT_ONCE
    identity._BYTES_AT_ONCE = data.draw(st.sampled_from([1, 200, before]))
    try:
        found = sample_ids(arrays, *extra)
    finally:
        identity._BYTES_AT_ONCE = before
    assert found.shape == (num, 16)
    for m in range(num):
        named = [one[m] if one else "" for one in (task, label)]
        assert found[m].tobytes() == sample_id([column[m] for column in columns], *named)
