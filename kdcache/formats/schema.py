"""Arrow schemas of shards, and the way between flat numpy arrays and record batches.

A shard file is one record batch with one row per sample; a ragged column is
`list<struct<...>>`, whose offsets index the samples and whose fields are flat buffers.

# M samples, N positions, E entries, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from kdcache.errors import FormatError
from kdcache.formats.codec import Codec, SampledCodec, Values
from kdcache.formats.manifest import MAX_VOCAB_SIZE
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import (
    BeamsRecord,
    ClassesRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)

FIELD_PREFIX = "field."
STREAM_PREFIX = "stream."
#: Column of a samples shard that names every sample's task.
TASK = "task"

_VALUE_TYPES = {"uint8": pa.uint8(), "float16": pa.float16(), "float32": pa.float32()}


def _field(name: str, data_type: pa.DataType) -> pa.Field:
    """A field that is never null; nothing in a cache is."""
    return pa.field(name, data_type, nullable=False)


def _ragged_field(name: str, fields: Sequence[pa.Field]) -> pa.Field:
    return _field(name, pa.list_(_field("item", pa.struct(list(fields)))))


def id_fields(vocab_size: int) -> list[pa.Field]:
    """Struct fields of one token id: two bytes, three above 65,536 ids."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise FormatError(
            f"a vocabulary of {vocab_size} ids: an id has three bytes, so at most {MAX_VOCAB_SIZE}"
        )
    fields = [_field("id", pa.uint16())]
    if vocab_size > 1 << 16:
        fields.append(_field("id_high", pa.uint8()))
    return fields


def split_ids(ids: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """Token ids as their stored fields.

    Args:
        ids: [E] integer, in [0, V).
        vocab_size: V.

    Raises:
        FormatError: an id is outside [0, V).
    """
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise FormatError(
            f"token ids run from {int(ids.min())} to {int(ids.max())}, "
            f"but the vocabulary has {vocab_size}"
        )
    fields = {"id": (ids & 0xFFFF).astype(np.uint16)}
    if vocab_size > 1 << 16:
        fields["id_high"] = (ids >> 16).astype(np.uint8)
    return fields


def join_ids(fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """[E] int32 token ids from their stored fields."""
    ids: np.ndarray = fields["id"].astype(np.int32)
    if "id_high" in fields:
        ids |= fields["id_high"].astype(np.int32) << 16
    return ids


def count_dtype(largest: int) -> np.dtype:
    """Smallest unsigned dtype of one, two or four bytes that holds a count."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if largest <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise FormatError(f"a count of {largest} does not fit four bytes")


def stream_extras(pair: str | None, template: str) -> tuple[str, ...]:
    """Names of the uint8 fields that a stream's tokens have beside their id.

    Args:
        pair: second field of the stream, which gives every token a segment; None without one.
        template: "chat" tells of every token whether it has a loss; "none" does not.
    """
    segment = () if pair is None else ("segment",)
    return (*segment, "loss") if template == "chat" else segment


def extra_fields(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a stream keeps of its tokens beside the ids."""
    return {name: values for name, values in fields.items() if name not in ("id", "id_high")}


def samples_schema(
    fields: Sequence[str],
    streams: Mapping[str, int],
    extras: Mapping[str, Sequence[str]] | None = None,
    tasks: bool = False,
) -> pa.Schema:
    """Schema of a samples shard.

    Args:
        fields: names of the raw text fields, in manifest order.
        streams: name to vocabulary size, in any order; the columns are sorted by name.
        extras: name of a stream to the uint8 fields of its tokens beside the id; none without it.
        tasks: whether the corpus has tasks, so that every sample names its own.
    """
    columns = [_field("sample_id", pa.binary(16)), _field("row", pa.int64())]
    columns += [_field(TASK, pa.string())] if tasks else []
    columns += [_field(FIELD_PREFIX + name, pa.string()) for name in fields]
    for name, vocab_size in sorted(streams.items()):
        beside = [_field(extra, pa.uint8()) for extra in (extras or {}).get(name, ())]
        columns.append(_ragged_field(STREAM_PREFIX + name, [*id_fields(vocab_size), *beside]))
    return pa.schema(columns)


def logits_schema(codec: Codec, vocab_size: int, temperatures: Sequence[float]) -> pa.Schema:
    """Schema of a logits shard.

    Args:
        codec: how the distributions were made sparse.
        vocab_size: V, rows of the teacher's output layer.
        temperatures: knots at which the tail is stored; unused by codecs without a tail.
    """
    full = codec.name == "full"
    tokens = []
    if codec.has_exact and not full:
        tokens.append(_count_field("num_exact", codec.max_exact(vocab_size)))
    if codec.has_drawn:
        tokens.append(_count_field("num_drawn", codec.max_drawn(vocab_size)))
    tokens += [_field("gold", pa.uint8()), _field("entropy", pa.uint8())]
    if codec.has_tail:
        tokens += [_field(f"tail_{i}", pa.float16()) for i in range(len(temperatures))]
    columns = [_ragged_field("tokens", tokens)]
    if codec.has_exact:
        ids = [] if full else id_fields(vocab_size)
        code = _field("code", _VALUE_TYPES[codec.values])
        columns.append(_ragged_field("exact", [*ids, code]))
    if codec.has_drawn:
        drawn = id_fields(vocab_size)
        if isinstance(codec, SampledCodec):
            drawn.append(_count_field("code", codec.n))
        elif codec.has_drawn_log_probs:
            drawn.append(_field("code", _VALUE_TYPES[codec.values]))
        columns.append(_ragged_field("drawn", drawn))
    return pa.schema(columns)


def beams_schema(vocab_size: int) -> pa.Schema:
    """Schema of a beams shard: hypotheses best first, and their tokens one after another.

    Args:
        vocab_size: V of the stream they are written in.
    """
    hypothesis = [
        _field("num_tokens", pa.uint16()),
        _field("log_prob", pa.float32()),
        _field("score", pa.float32()),
    ]
    return pa.schema(
        [
            _ragged_field("hypotheses", hypothesis),
            _ragged_field("tokens", id_fields(vocab_size)),
        ]
    )


def masks_schema(vocab_size: int) -> pa.Schema:
    """Schema of a masks shard: replicas, and their masked positions one after another.

    Args:
        vocab_size: V of the masked stream.
    """
    masked = [_field("position", pa.uint16()), *id_fields(vocab_size)]
    return pa.schema(
        [
            _ragged_field("replicas", [_field("num_masked", pa.uint16())]),
            _ragged_field("masked", masked),
        ]
    )


def classes_schema(values: Values) -> pa.Schema:
    """Schema of a classes shard: the scores of every label, replica by replica."""
    return pa.schema([_ragged_field("scores", [_field("value", _VALUE_TYPES[values])])])


def signal_schema(record: SignalRecord) -> pa.Schema:
    """Schema of the shards of a signal that is kept in Arrow.

    Raises:
        FormatError: it is kept in Zarr.
    """
    if isinstance(record, LogitsRecord):
        return logits_schema(record.codec, record.vocab_size, record.temperatures)
    if isinstance(record, BeamsRecord):
        return beams_schema(record.vocab_size)
    if isinstance(record, MasksRecord):
        return masks_schema(record.vocab_size)
    if isinstance(record, ClassesRecord):
        return classes_schema(record.values)
    raise FormatError(f"signal {record.name!r} is of kind {record.kind}, which has no Arrow files")


def _count_field(name: str, largest: int) -> pa.Field:
    return _field(name, pa.from_numpy_dtype(count_dtype(largest)))


def max_bytes_per_token(codec: Codec, vocab_size: int, temperatures: Sequence[float]) -> int:
    """Most bytes that one position can take in a logits shard, list offsets aside."""
    most = {
        "tokens": 1,
        "exact": codec.max_exact(vocab_size),
        "drawn": codec.max_drawn(vocab_size),
    }
    schema = logits_schema(codec, vocab_size, temperatures)
    return sum(most[column.name] * record_bytes(column) for column in schema)


def record_bytes(column: pa.Field) -> int:
    """Bytes of one record of a ragged column."""
    return sum(field.type.bit_width // 8 for field in column.type.value_type)


def samples_batch(
    schema: pa.Schema,
    sample_ids: np.ndarray,
    rows: np.ndarray,
    fields: Mapping[str, Sequence[str]],
    streams: Mapping[str, Ragged],
    tasks: Sequence[str] | None = None,
) -> pa.RecordBatch:
    """Record batch of a samples shard.

    Args:
        schema: from `samples_schema`.
        sample_ids: [M, 16] uint8.
        rows: [M] integer corpus rows.
        fields: name to M texts.
        streams: name to a ragged column with the fields of `split_ids`, and those beside the id.
        tasks: M names, where the schema has tasks.
    """
    packed = np.ascontiguousarray(sample_ids, dtype=np.uint8).reshape(-1)
    ids = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(rows), [None, pa.py_buffer(packed)]
    )
    arrays = [ids, pa.array(np.asarray(rows, dtype=np.int64))]
    for column in list(schema)[2:]:
        if column.name.startswith(FIELD_PREFIX):
            texts = fields[column.name.removeprefix(FIELD_PREFIX)]
            arrays.append(pa.array(texts, type=pa.string()))
        elif column.name == TASK:
            arrays.append(pa.array(tasks, type=pa.string()))
        else:
            arrays.append(_list_array(column, streams[column.name.removeprefix(STREAM_PREFIX)]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def ragged_batch(schema: pa.Schema, columns: Mapping[str, Ragged]) -> pa.RecordBatch:
    """Record batch whose columns are all ragged.

    Raises:
        FormatError: columns, fields, dtypes or lengths are not the schema's.
    """
    if set(columns) != set(schema.names):
        raise FormatError(f"columns {sorted(columns)} given, the schema has {sorted(schema.names)}")
    if len({len(column) for column in columns.values()}) > 1:
        counts = {name: len(column) for name, column in columns.items()}
        raise FormatError(f"columns differ in samples: {counts}")
    arrays = [_list_array(column, columns[column.name]) for column in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _list_array(column: pa.Field, ragged: Ragged) -> pa.ListArray:
    """One ragged column as Arrow, its dtypes checked, never converted."""
    begin, end = int(ragged.offsets[0]), int(ragged.offsets[-1])
    if end - begin > np.iinfo(np.int32).max:
        raise FormatError(f"{column.name}: {end - begin} entries in one file exceed 2^31 - 1")
    struct = column.type.value_type
    if set(ragged.fields) != {field.name for field in struct}:
        raise FormatError(
            f"{column.name}: fields {sorted(ragged.fields)} given, "
            f"the schema has {[field.name for field in struct]}"
        )
    arrays = []
    for field in struct:
        values = ragged.fields[field.name]
        if pa.from_numpy_dtype(values.dtype) != field.type or len(values) < end:
            raise FormatError(
                f"{column.name}.{field.name}: {len(values)} values of {values.dtype} given, "
                f"the schema wants {end} of {field.type}"
            )
        arrays.append(pa.array(np.ascontiguousarray(values[begin:end])))
    values = pa.StructArray.from_arrays(arrays, fields=list(struct))
    offsets = pa.array((ragged.offsets - begin).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, values, type=column.type)


def ragged_column(array: pa.ListArray) -> Ragged:
    """One `list<struct>` column as flat arrays that share Arrow's memory."""
    struct = array.values
    fields = {
        struct.type[i].name: struct.field(i).to_numpy(zero_copy_only=True)
        for i in range(struct.type.num_fields)
    }
    return Ragged(array.offsets.to_numpy(zero_copy_only=True), fields)


def ragged_columns(batch: pa.RecordBatch) -> dict[str, Ragged]:
    """Every `list<struct>` column of a batch, without copies, by column name."""
    return {
        name: ragged_column(batch.column(i))
        for i, name in enumerate(batch.schema.names)
        if pa.types.is_list(batch.schema.field(i).type)
    }
