"""Dense signals: hidden states and attentions of a shard, read layer by layer from mapped chunks.

A chunk is checked against its crc32c the first time it is read, and only chunks of the layer that
was asked for are touched. The rule for reading is to map: benchmarks/bench_hidden.py took 4.8 times
as long with zarr-python for a window of 8,192 rows of one layer and 42 times for a random sample,
with TensorStore 2.5 and 15, with zarrs 1.1 (on two threads; 1.5 times the processor time) and 18.
`DensePart.decode_through_zarr` reads through zarr-python all the same.

# M samples, R rows of a part, L layers, W width (features, or heads)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcache.errors import FormatError
from kdcache.formats.identity import differences
from kdcache.formats.mapped_array import MappedArray
from kdcache.formats.signals import AttentionRecord, HiddenRecord
from kdcache.formats.stores.store import REPAIR
from kdcache.formats.zarr_layout import (
    CHECKSUMS,
    METADATA_NAME,
    array_metadata,
    decode_checksums,
    group_metadata,
    num_row_chunks,
    shard_path,
)

DenseRecord = HiddenRecord | AttentionRecord

VALUES, SCALE = "values", "scale"

_STORED: dict[str, np.dtype] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
_SCALE = np.dtype("<f4")


def dense_arrays(record: DenseRecord, rows: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and stored dtype of every array of a part, by name.

    Args:
        record: of the signal.
        rows: R.
    """
    layers = len(record.layers)
    width = record.width if isinstance(record, HiddenRecord) else record.heads
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        VALUES: ((rows, layers, width), _STORED[record.values])
    }
    if record.values == "int8":
        arrays[SCALE] = ((rows, layers), _SCALE)
    return arrays


def dense_row_bytes(record: DenseRecord) -> int:
    """Bytes that one row takes in all layers, scales included, checksums left out."""
    arrays = dense_arrays(record, 1).values()
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in arrays)


def decode_values(stored: np.ndarray, values: str, scale: np.ndarray | None = None) -> np.ndarray:
    """Float32 numbers from what is stored.

    Args:
        stored: [R, W] float16, uint16 (the bits of bfloat16) or int8.
        values: `values` of the signal's record.
        scale: [R] float32, for int8.
    """
    if values == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    numbers: np.ndarray = stored.astype(np.float32)
    return numbers if scale is None else numbers * scale[:, None]


@dataclass(frozen=True)
class DensePart:
    """The samples [start, stop) of a dense signal.

    Attributes:
        start: first sample, counted over the corpus.
        stop: sample after the last.
        folder: path or URL of the Zarr group.
        kind: `values` of the signal's record.
        values: [R, L, W] as stored.
        scale: [R, L] float32 for int8, else None.
    """

    start: int
    stop: int
    folder: str
    kind: str
    values: MappedArray
    scale: MappedArray | None

    @property
    def rows(self) -> int:
        """R."""
        return self.values.shape[0]

    @property
    def chunks_read(self) -> int:
        """Chunks that were read so far, each counted once, those of scales too."""
        return self.values.chunks_read + (self.scale.chunks_read if self.scale else 0)

    def read(self, start_row: int, stop_row: int, layer_index: int) -> np.ndarray:
        """[rows, W] values of one layer as they are stored.

        Args:
            start_row: first row of the part.
            stop_row: row after the last.
            layer_index: which of the record's `layers`, from 0.

        Raises:
            IndexError: there are no such rows or layer.
            IntegrityError: a chunk is not what its crc32c says.
        """
        return self.values.read(start_row, stop_row, layer_index)

    def decode(self, start_row: int, stop_row: int, layer_index: int) -> np.ndarray:
        """[rows, W] float32 values of one layer; arguments and errors as in `read`."""
        stored = self.read(start_row, stop_row, layer_index)
        scale = self.scale.read(start_row, stop_row, layer_index) if self.scale else None
        return decode_values(stored, self.kind, scale)

    def decode_through_zarr(self, start_row: int, stop_row: int, layer_index: int) -> np.ndarray:
        """The same as `decode` through zarr-python, slower and with fewer checks."""
        import zarr

        group: Any = zarr.open_group(self.folder, mode="r")
        stored = group[VALUES][start_row:stop_row, layer_index]
        scale = group[SCALE][start_row:stop_row, layer_index] if self.scale else None
        return decode_values(stored, self.kind, scale)


@dataclass(frozen=True)
class DenseShard:
    """A dense signal of the samples [start, stop).

    Attributes:
        start: first sample, counted over the corpus.
        stop: sample after the last.
        offsets: [M + 1] int64: sample start + m has the rows [offsets[m], offsets[m + 1]) of the
            shard.
        parts: contiguous.
    """

    start: int
    stop: int
    offsets: np.ndarray
    parts: list[DensePart]

    def decode(self, start: int, stop: int, layer_index: int) -> np.ndarray:
        """[rows, W] float32 values of the samples [start, stop), counted over the corpus.

        Args:
            start: first sample.
            stop: sample after the last.
            layer_index: which of the record's `layers`, from 0.

        Raises:
            IndexError: there are no such samples or layer.
            IntegrityError: a chunk is not what its crc32c says.
        """
        if not self.start <= start < stop <= self.stop:
            raise IndexError(f"samples {start} to {stop} of {self.start} to {self.stop}")
        pieces = [
            part.decode(*self._rows(part, start, stop), layer_index)
            for part in self.parts
            if start < part.stop and stop > part.start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _rows(self, part: DensePart, start: int, stop: int) -> tuple[int, int]:
        """Rows of a part that some samples have there."""
        base = int(self.offsets[part.start - self.start])
        first, last = (
            int(self.offsets[min(max(sample, part.start), part.stop) - self.start]) - base
            for sample in (start, stop)
        )
        return first, last


def open_dense_part(
    opened: Callable[[str, bool], memoryview],
    folder: str,
    start: int,
    stop: int,
    record: DenseRecord,
    rows: int,
) -> DensePart:
    """Read the metadata of one part.

    Args:
        opened: gives all bytes of a file by its path inside the group, mapped, and checks all of
            them if the second argument says so, else their number.
        folder: path or URL of the Zarr group, for messages.
        start: first sample, counted over the corpus.
        stop: sample after the last.
        record: of the signal.
        rows: R that its samples have.

    Raises:
        FormatError: its metadata are not those of such a part.
        IntegrityError: a file is short, or a chunk index is damaged.
    """

    def metadata(path: str, expected: dict[str, Any]) -> dict[str, Any]:
        return _checked_metadata(bytes(opened(path, True)), f"{folder}/{path}", expected)

    metadata(METADATA_NAME, group_metadata())
    arrays = {}
    for name, (shape, dtype) in dense_arrays(record, rows).items():
        found = metadata(f"{name}/{METADATA_NAME}", array_metadata(shape, dtype))
        checksums = _checksums(found, f"{folder}/{name}/{METADATA_NAME}", shape)
        path = shard_path(name, len(shape))
        # Another writer may not repeat them; then the whole file is read once.
        data = opened(path, checksums is None) if shape[0] else memoryview(b"")
        arrays[name] = MappedArray(data, f"{folder}/{path}", shape, dtype, checksums)
    return DensePart(start, stop, folder, record.values, arrays[VALUES], arrays.get(SCALE))


def _checksums(metadata: dict[str, Any], file: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """What metadata repeat of the chunks' checksums, if they do."""
    attributes = metadata.get("attributes")
    if not isinstance(attributes, dict) or CHECKSUMS not in attributes:
        return None
    try:
        return decode_checksums(attributes[CHECKSUMS], num_row_chunks(shape[0]), shape[1])
    except FormatError as error:
        raise FormatError(f"{file}: {error}; {REPAIR}") from None


def _checked_metadata(data: bytes, file: str, expected: dict[str, Any]) -> dict[str, Any]:
    """What a zarr.json says, which must be what the record and the samples demand."""
    try:
        tree = json.loads(data.decode("utf-8"))
        faults = differences(tree, expected, ignore=("attributes",))
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise FormatError(f"{file}: not a JSON object in UTF-8; {REPAIR}")
    if faults:
        fault = faults[0].removesuffix(" given").replace(" in the cache, ", ", expected ")
        raise FormatError(f"{file}: " + "".join(c if c.isprintable() else "?" for c in fault))
    return tree
