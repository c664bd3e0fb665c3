"""How large the records of a signal may be, which decides where parts end."""

from __future__ import annotations

import math

from kdcache.formats.dense import dense_arrays
from kdcache.formats.plan import PART_BYTES
from kdcache.formats.schema import max_bytes_per_token, record_bytes, signal_schema
from kdcache.formats.signals import AttentionRecord, HiddenRecord, LogitsRecord, SignalRecord
from kdcache.formats.zarr_layout import CHUNK_ROWS, CRC_BYTES, chunk_bytes

#: Bytes of a chunk's entry in the index of its Zarr shard, and what the rest of a group may take.
_INDEX_BYTES, _GROUP_BYTES = 16, 1 << 14


def part_row_bytes(record: SignalRecord) -> int:
    """Most bytes that one record of the main column, and what belongs to it, takes in a part.

    Args:
        record: of the signal.
    """
    if isinstance(record, LogitsRecord):
        return max_bytes_per_token(record.codec, record.vocab_size, record.temperatures)
    if isinstance(record, HiddenRecord | AttentionRecord):
        chunk = sum(
            shape[1] * (chunk_bytes(shape, dtype) + CRC_BYTES + _INDEX_BYTES)
            for shape, dtype in dense_arrays(record, CHUNK_ROWS).values()
        )
        # A share of the limit, so that a part with its last chunk filled up stays below. Where not
        # even one chunk of every layer is within it, a part is that chunk.
        chunks = max(1, (PART_BYTES - _GROUP_BYTES) // chunk)
        return math.ceil(PART_BYTES / (chunks * CHUNK_ROWS))
    return sum(record_bytes(column) for column in signal_schema(record))
