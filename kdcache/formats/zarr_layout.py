"""Zarr v3 arrays as bytes: what their metadata says, and where their chunks lie.

An array [rows, layers, ...] is one Zarr shard: chunks of 512 rows of one layer, each followed by
its crc32c, then the index. The chunks of a layer lie one after another, so a run of rows of one
layer is one run of bytes. The bytes are a function of the values alone, whatever zarr-python is
installed (a resumed dump must give the same), and any Zarr v3 library reads them.

# R rows, L layers, C chunks of rows
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

from kdcache.errors import FormatError, IntegrityError

#: Rows of a chunk.
CHUNK_ROWS = 512

#: Bytes of a crc32c, which ends every chunk and the index.
CRC_BYTES = 4

METADATA_NAME = "zarr.json"

#: Attribute of an array that repeats the crc32c of all of its chunks: 8 hex digits for each, in the
#: order of the index. The one behind a chunk is right of any chunk; the commit vouches for these.
CHECKSUMS = "chunk_crc32c"

_NUMPY_TO_ZARR = {"<f2": "float16", "<f4": "float32", "<u2": "uint16", "|i1": "int8"}
_CRC32C = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_HEX = re.compile("[0-9a-f]*")
_MISSING = np.uint64(2**64 - 1)


def num_row_chunks(rows: int) -> int:
    """Chunks that a layer of so many rows lies in."""
    return -(-rows // CHUNK_ROWS)


def chunk_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    """Bytes of the values of one chunk of an array [R, L, ...]."""
    return CHUNK_ROWS * math.prod(shape[2:]) * dtype.itemsize


def group_metadata() -> dict[str, Any]:
    """What zarr.json of a group says."""
    return {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def array_metadata(
    shape: Sequence[int], dtype: np.dtype, checksums: np.ndarray | None = None
) -> dict[str, Any]:
    """What zarr.json of an array says.

    Args:
        shape: [R, L, ...].
        dtype: of the values, little-endian.
        checksums: [C, L] uint32 crc32c of the chunks; they are not repeated without it.

    Raises:
        FormatError: it is none that a cache stores.
    """
    if dtype.str not in _NUMPY_TO_ZARR:
        raise FormatError(f"{dtype} given, a cache stores {sorted(_NUMPY_TO_ZARR.values())}")
    inner = [CHUNK_ROWS, 1, *shape[2:]]
    outer = [CHUNK_ROWS * max(1, num_row_chunks(shape[0])), *shape[1:]]
    # One byte has no order: Zarr's own writers leave `endian` out there.
    codecs = [{"name": "bytes"}, {"name": "crc32c"}] if dtype.itemsize == 1 else _CRC32C
    sharding = {
        "chunk_shape": inner,
        "codecs": codecs,
        "index_codecs": _CRC32C,
        "index_location": "end",
    }
    return {
        "shape": list(shape),
        "data_type": _NUMPY_TO_ZARR[dtype.str],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {} if checksums is None else {CHECKSUMS: encode_checksums(checksums)},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def encode_metadata(tree: dict[str, Any]) -> bytes:
    """Bytes of a zarr.json."""
    return json.dumps(tree, indent=2).encode()


def shard_path(name: str, dimensions: int) -> str:
    """Path of an array's only shard inside its group."""
    return "/".join([name, "c", *["0"] * dimensions])


def group_files(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Iterator[memoryview]]]:
    """Every file of a group, as (path inside it, pieces of its bytes), in order of path.

    Args:
        arrays: name to [R, L, ...] array; with R = 0 there is no shard file.
    """
    for name, array in sorted(arrays.items()):
        checksums = np.zeros((num_row_chunks(len(array)), array.shape[1]), dtype=np.uint32)
        if len(array):
            yield shard_path(name, array.ndim), shard_pieces(array, checksums)
        yield f"{name}/{METADATA_NAME}", _array_pieces(array, checksums)
    yield METADATA_NAME, iter([memoryview(encode_metadata(group_metadata()))])


def _array_pieces(array: np.ndarray, checksums: np.ndarray) -> Iterator[memoryview]:
    """Bytes of an array's metadata; made when they are asked for, after those of its shard."""
    yield memoryview(encode_metadata(array_metadata(array.shape, array.dtype, checksums)))


def encode_checksums(checksums: np.ndarray) -> str:
    """8 hex digits for each of [C, L] uint32 checksums, layers innermost."""
    return checksums.astype(">u4").tobytes().hex()


def decode_checksums(text: object, row_chunks: int, layers: int) -> np.ndarray:
    """[C, L] uint32 checksums of chunks, from what metadata say.

    Raises:
        FormatError: they are not so many.
    """
    count = row_chunks * layers
    if not isinstance(text, str) or len(text) != 8 * count or not _HEX.fullmatch(text):
        raise FormatError(f"attributes.{CHECKSUMS}: expected {8 * count} hex digits, 8 a chunk")
    found = np.frombuffer(bytes.fromhex(text), dtype=">u4")
    return found.astype(np.uint32).reshape(row_chunks, layers)


def shard_pieces(array: np.ndarray, checksums: np.ndarray) -> Iterator[memoryview]:
    """Bytes of a shard file, chunk by chunk and then the index.

    Args:
        array: [R, L, ...], R at least 1, little-endian.
        checksums: [C, L] uint32, filled with the crc32c of the chunks as they are made.
    """
    rows, layers = array.shape[:2]
    # + CRC_BYTES: a chunk and its checksum are one piece.
    size = chunk_bytes(array.shape, array.dtype)
    for layer in range(layers):
        for begin in range(0, rows, CHUNK_ROWS):
            piece = np.zeros(size + CRC_BYTES, dtype=np.uint8)
            values = np.ascontiguousarray(array[begin : begin + CHUNK_ROWS, layer])
            flat = values.reshape(-1).view(np.uint8)
            piece[: len(flat)] = flat
            piece[size:] = crc = crc_bytes(piece[:size])
            checksums[begin // CHUNK_ROWS, layer] = crc.view("<u4")[0]
            yield piece.data
    yield encode_index(num_row_chunks(rows), layers, size).data


def encode_index(row_chunks: int, layers: int, size: int) -> np.ndarray:
    """[n] uint8 index of a shard whose chunks lie layer after layer.

    Args:
        row_chunks: C.
        layers: L.
        size: bytes of a chunk, its checksum left out.
    """
    number = np.arange(layers * row_chunks, dtype="<u8").reshape(layers, row_chunks).T
    entries = np.empty((row_chunks, layers, 2), dtype="<u8")  # offset, bytes
    entries[..., 0] = number * (size + CRC_BYTES)
    entries[..., 1] = size + CRC_BYTES
    flat = entries.reshape(-1).view(np.uint8)
    return np.concatenate([flat, crc_bytes(flat)])


def decode_index(data: np.ndarray, row_chunks: int, layers: int, size: int) -> np.ndarray:
    """Where the chunks of a shard begin.

    Args:
        data: [n] uint8, the whole shard file.
        row_chunks: C.
        layers: L.
        size: bytes of a chunk, its checksum left out.

    Returns:
        [C, L] int64 offsets in the file.

    Raises:
        IntegrityError: the file is too short, or the index is damaged, lacks a chunk or points
            outside the chunks.
    """
    length = 16 * row_chunks * layers
    if len(data) < length + CRC_BYTES:
        raise IntegrityError(
            f"{len(data)} bytes, too short for the index of {row_chunks * layers} chunks"
        )
    end = len(data) - length - CRC_BYTES
    index = data[end : end + length]
    if not np.array_equal(crc_bytes(index), data[end + length :]):
        raise IntegrityError("the crc32c of its chunk index is another")
    entries = np.frombuffer(index.tobytes(), dtype="<u8").reshape(row_chunks, layers, 2)
    starts, counts = entries[..., 0], entries[..., 1]
    last = end - size - CRC_BYTES  # where the last chunk may begin; below 0 for none
    faults = {
        "missing": (starts == _MISSING) | (counts == _MISSING),
        f"not of {size + CRC_BYTES} bytes": counts != size + CRC_BYTES,
        "outside the file": (starts > np.uint64(max(0, last))) | (last < 0),
    }
    for what, wrong in faults.items():
        if wrong.any():
            chunk, layer = np.argwhere(wrong)[0]
            raise IntegrityError(
                f"{int(wrong.sum())} chunks are {what}, the first is chunk {chunk} of layer "
                f"index {layer}"
            )
    return starts.astype(np.int64)


def crc_bytes(data: np.ndarray) -> np.ndarray:
    """[4] uint8 crc32c of bytes, little-endian as Zarr has it."""
    return np.frombuffer(google_crc32c.value(data).to_bytes(CRC_BYTES, "little"), dtype=np.uint8)
