"""Streams of Zstandard: round trips, the library's own frames, and what is no such stream."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.stores import zstd
from kdcache.formats.stores.zstd import compressed, decompressed


def cut(data: bytes, sizes) -> list[bytes]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    return [*pieces, data[at:]]


@given(
    data=st.binary(max_size=3000),
    sizes=st.lists(st.integers(0, 400), max_size=8),
    again=st.lists(st.integers(0, 400), max_size=8),
    level=st.sampled_from([1, 3, 22]),
)
def test_what_was_compressed_comes_back(data, sizes, again, level):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zstd, "FRAME_BYTES", 256)
        frames = list(compressed(cut(data, sizes), level))
    assert len(frames) == max(1, -(-len(data) // 256))
    assert b"".join(decompressed(cut(b"".join(frames), again), "here")) == data


def test_frames_are_the_librarys_own():
    data = np.arange(5000).tobytes()
    [frame] = compressed([data], 3)
    assert pa.decompress(frame, len(data), "zstd", asbytes=True) == data
    assert b"".join(decompressed([pa.compress(data, "zstd", asbytes=True)], "here")) == data


def test_little_is_held(monkeypatch):
    monkeypatch.setattr(zstd, "CHUNK_BYTES", 1000)
    taken = []

    def source():
        for number in range(100):
            taken.append(number)
            yield bytes([number]) * (1 << 20)

    frames = compressed(source(), 1)
    first = next(frames)
    assert len(taken) == 4
    pieces = list(decompressed([first, *frames], "here"))
    assert max(map(len, pieces)) <= 1000
    assert sum(map(len, pieces)) == 100 << 20


DATA = np.random.default_rng(0).integers(0, 50, 4000, dtype=np.uint8).tobytes()
FRAME = b"".join(compressed([DATA], 3))


@pytest.mark.parametrize(
    "bad",
    [FRAME[:-1], FRAME[:100], FRAME + b"more", b"nothing of the kind", FRAME[:5] + FRAME[6:]],
    ids=["cut", "cut-early", "more", "other", "lost"],
)
def test_what_is_no_stream_is_one_clear_error(bad):
    with pytest.raises(IntegrityError, match=r"^cache/x\.zst: not what was compressed: .*repair"):
        list(decompressed([bad], "cache/x.zst"))


def test_an_error_of_the_source_stays_itself():
    def source():
        yield FRAME[:50]
        raise StorageError("the disk said no")

    with pytest.raises(StorageError, match="the disk said no"):
        list(decompressed(source(), "here"))
