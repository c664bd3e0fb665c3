"""Zarr groups: zarr-python reads what is written here, and the other way round."""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.data_files import write_group
from kdcache.formats.mapped_array import MappedArray
from kdcache.formats.zarr_layout import (
    CHUNK_ROWS,
    array_metadata,
    crc_bytes,
    decode_index,
    encode_index,
    shard_path,
)

DTYPES = ["<f2", "<u2", "i1", "<f4"]


def numbers(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 40).astype(dtype)


def mapped(folder: Path, name: str, array: np.ndarray) -> MappedArray:
    file = folder / shard_path(name, array.ndim)
    data = memoryview(file.read_bytes() if len(array) else b"")
    return MappedArray(data, str(file), array.shape, array.dtype)


def write_with_zarr(folder: Path, name: str, array: np.ndarray) -> None:
    """The same array as zarr-python itself writes it, chunks in Morton order."""
    rows = CHUNK_ROWS * max(1, -(-len(array) // CHUNK_ROWS))
    zarr.open_group(str(folder), mode="a").create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(CHUNK_ROWS, 1, *array.shape[2:]),
        shards=(rows, *array.shape[1:]),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )[:] = array


@settings(max_examples=40)
@given(
    rows=st.integers(0, 1600),
    layers=st.integers(1, 4),
    width=st.none() | st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    spans=st.lists(st.tuples(st.integers(0, 1600), st.integers(0, 1600)), max_size=4),
)
def test_zarr_python_and_mapped_chunks_read_the_same(
    rows: int, layers: int, width: int | None, dtype: str, spans: list[tuple[int, int]]
) -> None:
    array = numbers((rows, layers) if width is None else (rows, layers, width), dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_group(folder, {"values": array})
        assert [f.path for f in files] == sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        assert files == write_group(None, {"values": array})
        np.testing.assert_array_equal(zarr.open_group(name, mode="r")["values"][:], array)
        opened = mapped(folder, "values", array)
        for layer in range(layers):
            np.testing.assert_array_equal(opened.read(0, rows, layer), array[:, layer])
        for a, b in spans:
            start, stop = sorted((min(a, rows), min(b, rows)))
            found = opened.read(start, stop, layers - 1)
            np.testing.assert_array_equal(found, array[start:stop, layers - 1])
            assert found.dtype == array.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1300, 3, 4), (512, 2, 1), (700, 5), (0, 2, 3)], ids=str)
def test_a_group_that_zarr_python_wrote_is_read(
    tmp_path: Path, shape: tuple[int, ...], dtype: str
) -> None:
    array = numbers(shape, dtype)
    write_with_zarr(tmp_path, "values", array)
    found = json.loads((tmp_path / "values/zarr.json").read_text())
    assert found == array_metadata(shape, array.dtype)
    opened = mapped(tmp_path, "values", array)
    for layer in range(shape[1]):
        np.testing.assert_array_equal(opened.read(0, shape[0], layer), array[:, layer])


def test_the_bytes_never_change(tmp_path: Path) -> None:
    # A resumed dump compares digests, so these bytes are part of format version 1.
    values = (np.arange(600 * 2 * 3) % 251 - 125).reshape(600, 2, 3).astype(np.int8)
    scale = (np.arange(1200, dtype=np.float32) / 4).reshape(600, 2)
    write_group(tmp_path, {"values": values, "scale": scale})
    found = {
        str(path.relative_to(tmp_path)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(tmp_path.rglob("*"))
        if path.is_file()
    }
    assert found == {
        "scale/c/0/0": "518005d170ca7758",
        "scale/zarr.json": "9ef382e192cd6f7a",
        "values/c/0/0/0": "92cc482dece78386",
        "values/zarr.json": "531e6af22b37dd1b",
        "zarr.json": "36615682d5be9646",
    }


def test_a_layer_is_one_run_of_bytes(tmp_path: Path) -> None:
    array = numbers((1100, 3, 2), "<f2")
    write_group(tmp_path, {"values": array})
    data = (tmp_path / "values/c/0/0/0").read_bytes()
    run = 3 * (CHUNK_ROWS * 2 * 2 + 4)
    layer = b"".join(data[run + k * (CHUNK_ROWS * 4 + 4) :][: CHUNK_ROWS * 4] for k in range(3))
    np.testing.assert_array_equal(np.frombuffer(layer, "<f2").reshape(-1, 2)[:1100], array[:, 1])


def test_a_dtype_that_is_not_stored_is_refused() -> None:
    with pytest.raises(FormatError, match="float64 given, a cache stores"):
        write_group(None, {"values": np.zeros((2, 1, 1))})


def shard(row_chunks: int, layers: int, size: int, entries: dict[tuple[int, int], tuple]) -> bytes:
    """A shard file of zeros whose index has other entries, under a right checksum."""
    index = encode_index(row_chunks, layers, size)[:-4].view("<u8").reshape(row_chunks, layers, 2)
    index = index.copy()
    for at, entry in entries.items():
        index[at] = entry
    flat = index.reshape(-1).view(np.uint8)
    data = bytes(row_chunks * layers * (size + 4))
    return data + flat.tobytes() + crc_bytes(flat).tobytes()


MISSING = 2**64 - 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({(1, 0): (MISSING, MISSING)}, "1 chunks are missing, the first is chunk 1 of layer index"),
        ({(0, 1): (0, MISSING)}, "1 chunks are missing"),
        ({(0, 0): (0, 100)}, "1 chunks are not of 104 bytes"),
        ({(0, 0): (0, 0), (1, 1): (0, 0)}, "2 chunks are not of 104 bytes"),
        ({(1, 1): (3 * 104 + 1, 104)}, "outside the file, the first is chunk 1 of layer index 1"),
        ({(1, 1): (2**64 - 2, 104)}, "outside the file"),
    ],
)
def test_an_index_that_lies_is_refused(
    entries: dict[tuple[int, int], tuple[int, int]], message: str
) -> None:
    data = np.frombuffer(shard(2, 2, 100, entries), dtype=np.uint8)
    with pytest.raises(IntegrityError, match=message):
        decode_index(data, 2, 2, 100)


def test_a_sound_index_is_read_and_a_damaged_or_cut_one_is_not() -> None:
    whole = np.frombuffer(shard(2, 3, 100, {}), dtype=np.uint8)
    assert decode_index(whole, 2, 3, 100).tolist() == [[0, 208, 416], [104, 312, 520]]
    for at in (len(whole) - 1, len(whole) - 50):
        flipped = whole.copy()
        flipped[at] ^= 1
        with pytest.raises(IntegrityError, match="crc32c of its chunk index is another"):
            decode_index(flipped, 2, 3, 100)
    with pytest.raises(IntegrityError, match="20 bytes, too short for the index of 6 chunks"):
        decode_index(whole[-20:], 2, 3, 100)
    # All chunks cut away, the index whole.
    with pytest.raises(IntegrityError, match="6 chunks are outside the file"):
        decode_index(whole[-100:], 2, 3, 100)
