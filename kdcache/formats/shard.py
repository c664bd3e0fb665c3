"""Data files of a shard, mapped: checked against their record before the first use.

# M samples, N positions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcache.errors import FormatError
from kdcache.formats.manifest import PartRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import FIELD_PREFIX, STREAM_PREFIX, TASK, ragged_columns


@dataclass(frozen=True)
class SampleShard:
    """The samples [start, stop): raw texts and streams.

    Attributes:
        start: first sample, counted over the corpus.
        stop: sample after the last.
        sample_id: [M, 16] uint8.
        row: [M] int64 corpus rows.
        streams: name to ragged token ids (`schema.join_ids` makes them int32), and what is kept
            beside them: `segment` of a pair, `loss` of a chat.
    """

    start: int
    stop: int
    sample_id: np.ndarray
    row: np.ndarray
    streams: dict[str, Ragged]
    _batch: pa.RecordBatch

    def text(self, name: str) -> pa.Array:
        """Raw texts of one field, as an Arrow string array of M values."""
        return self._batch.column(FIELD_PREFIX + name)

    def tasks(self) -> pa.Array | None:
        """Task of every sample, as an Arrow string array of M values; None without tasks."""
        return self._batch.column(TASK) if TASK in self._batch.schema.names else None

    def task_index(self, tasks: Sequence[str]) -> np.ndarray:
        """Task of every sample by its number.

        Args:
            tasks: the manifest's `corpus.tasks`.

        Returns:
            [M] int64 into `tasks`; 0 throughout where the corpus has none.

        Raises:
            FormatError: a sample is of a task that the manifest does not name.
        """
        names = self.tasks()
        if names is None:
            return np.zeros(len(self.row), dtype=np.int64)
        index = pc.index_in(names, value_set=pa.array(tasks, type=pa.string()))
        if index.null_count:
            unknown = names.filter(index.is_null())[0].as_py()
            raise FormatError(
                f"samples {self.start} to {self.stop}: task {unknown!r}, expected one of "
                f"{list(tasks)}"
            )
        return index.to_numpy().astype(np.int64)


@dataclass(frozen=True)
class SignalShard:
    """One signal of the samples [start, stop).

    Attributes:
        start: first sample, counted over the corpus.
        stop: sample after the last.
        parts: (start, stop, column name to ragged column), contiguous.
    """

    start: int
    stop: int
    parts: list[tuple[int, int, dict[str, Ragged]]]


def open_part(
    data: memoryview, where: str, part: PartRecord, schema: pa.Schema, checked: bool
) -> pa.RecordBatch:
    """Open one data file whose size and checksum were compared with its record.

    Args:
        data: all of its bytes, mapped or in memory.
        where: how messages call it.
        part: its record.
        schema: what it must hold.
        checked: whether the values were validated before.

    Raises:
        FormatError: it is not one record batch of that schema with the part's samples.
    """
    try:
        with pa.ipc.open_file(pa.BufferReader(pa.py_buffer(data))) as reader:
            if not reader.schema.equals(schema):
                raise FormatError(f"{where}: {_schema_fault(reader.schema, schema)}")
            if reader.num_record_batches != 1:
                number = reader.num_record_batches
                raise FormatError(f"{where}: {number} record batches, expected 1")
            batch = reader.get_batch(0)
        if not checked:
            batch.validate(full=True)
    except (pa.ArrowException, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{where}: not an Arrow file of a cache: {_line(error)}") from None
    if batch.num_rows != part.num_samples:
        raise FormatError(f"{where}: {batch.num_rows} rows, expected {part.num_samples}")
    if any(array.null_count for array in _arrays(batch)):
        raise FormatError(f"{where}: it holds nulls, a cache has none")
    return batch


def _arrays(batch: pa.RecordBatch) -> list[pa.Array]:
    arrays = list(batch.columns)
    for column in batch.columns:
        if pa.types.is_list(column.type):
            arrays += [column.values, *column.values.flatten()]
    return arrays


def _schema_fault(found: pa.Schema, expected: pa.Schema) -> str:
    for column in expected:
        index = found.get_field_index(column.name)
        if index < 0:
            return f"no column {column.name!r}; it has {found.names}"
        if not found.field(index).equals(column):
            return f"column {column.name!r} is {found.field(index).type}, expected {column.type}"
    return f"columns {found.names}, expected {expected.names}"


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]


def sample_shard(part: PartRecord, batch: pa.RecordBatch) -> SampleShard:
    """The samples of a shard's only part."""
    packed = np.frombuffer(batch.column(0).buffers()[1], dtype=np.uint8)
    first = batch.column(0).offset * 16
    sample_ids = packed[first : first + 16 * batch.num_rows].reshape(-1, 16)
    streams = {
        name.removeprefix(STREAM_PREFIX): column for name, column in ragged_columns(batch).items()
    }
    row = batch.column(1).to_numpy(zero_copy_only=True)
    return SampleShard(part.start, part.stop, sample_ids, row, streams, batch)
