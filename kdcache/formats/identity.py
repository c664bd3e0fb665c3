"""What two things must share to be the same: digests, and how records differ.

# M samples, N tokens
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

#: Bytes of texts that are copied together: what is copied stays in the processor's cache.
_BYTES_AT_ONCE = 1 << 20


def sample_id(fields: Sequence[str], task: str = "", label: str = "") -> bytes:
    """128-bit id of a sample: xxh3_128 of its values, each after its length.

    Args:
        fields: raw texts in the manifest's order.
        task: task the sample belongs to; empty where there is one.
        label: its label; empty where there is none.

    Returns:
        16 bytes, most significant first.
    """
    hasher = xxhash.xxh3_128()
    for value in (*fields, task, label):
        encoded = value.encode()
        hasher.update(len(encoded).to_bytes(8, "little"))
        hasher.update(encoded)
    return hasher.digest()


def sample_ids(
    fields: Sequence[pa.Array], task: pa.Array | None = None, label: pa.Array | None = None
) -> np.ndarray:
    """`sample_id` of many samples, some hundred nanoseconds each.

    Args:
        fields: raw texts in the manifest's order, Arrow string arrays of M values without nulls.
        task: M names; None where there are no tasks.
        label: M labels; None where there are none.

    Returns:
        [M, 16] uint8.
    """
    num_samples = len(fields[0])
    empty = pa.array([""]).take(pa.array(np.zeros(num_samples, dtype=np.int32)))
    values = [*fields, empty if task is None else task, empty if label is None else label]
    lengths = [pc.binary_length(value).to_numpy().astype("<i8") for value in values]  # [M] each
    ends = np.cumsum(8 * len(values) + sum(lengths))
    pieces: list[bytes] = []
    start = 0
    while start < num_samples:
        before = int(ends[start - 1]) if start else 0
        fit = int(np.searchsorted(ends, before + _BYTES_AT_ONCE, side="right"))
        some = slice(start, max(start + 1, fit))
        pieces += _sample_ids([v[some] for v in values], [n[some] for n in lengths])
        start = some.stop
    return np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(-1, 16)


def _sample_ids(values: Sequence[pa.Array], lengths: Sequence[np.ndarray]) -> list[bytes]:
    """Ids of a few samples from all of their values and how long these are."""
    offsets = pa.py_buffer(8 * np.arange(len(values[0]) + 1, dtype=np.int32))
    joined = []
    for value, length in zip(values, lengths, strict=True):
        buffers = [None, offsets, pa.py_buffer(np.ascontiguousarray(length))]
        joined.append(pa.BinaryArray.from_buffers(pa.binary(), len(value), buffers))
        joined.append(value.cast(pa.binary()))
    whole = pc.binary_join_element_wise(*joined, pa.scalar(b"", type=pa.binary()))
    counts = np.diff(np.frombuffer(whole.buffers()[1], dtype=np.int32)[: len(whole) + 1])
    messages = map(io.BytesIO(whole.buffers()[2]).read, counts.tolist())
    return list(map(xxhash.xxh3_128_digest, messages))


class CorpusDigest:
    """Digest of a corpus: xxh3_128 over sample id and row of every sample, in order."""

    def __init__(self) -> None:
        """Start with no samples."""
        self._hasher = xxhash.xxh3_128()

    def update(self, sample_ids: np.ndarray, rows: np.ndarray) -> None:
        """Take in the next samples.

        Args:
            sample_ids: [M, 16] uint8.
            rows: [M] integer corpus rows.
        """
        packed = np.empty((len(rows), 24), dtype=np.uint8)
        packed[:, :16] = sample_ids
        packed[:, 16:] = np.asarray(rows, dtype="<i8").reshape(-1, 1).view(np.uint8)
        self._hasher.update(packed.tobytes())

    def hexdigest(self) -> str:
        """32 hex digits of the samples so far."""
        return self._hasher.hexdigest()


class StreamDigest:
    """Digest of a stream: its tokenizer, the length of every sample and every token id.

    What is kept of every token beside its id (its segment, its loss) is in it too.
    """

    def __init__(self, tokenizer_digest: str) -> None:
        """Start with no samples."""
        self._tokenizer_digest = tokenizer_digest
        self._lengths = xxhash.xxh3_128()
        self._ids = xxhash.xxh3_128()
        self._extras: dict[str, xxhash.xxh3_128] = {}

    def update(
        self, lengths: np.ndarray, ids: np.ndarray, extras: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Take in the next samples.

        Args:
            lengths: [M] integer tokens of each sample.
            ids: [sum(lengths)] integer token ids.
            extras: name to [sum(lengths)] uint8, the same names in every update.
        """
        self._lengths.update(np.asarray(lengths, dtype="<i8").tobytes())
        self._ids.update(np.asarray(ids, dtype="<i4").tobytes())
        for name, values in (extras or {}).items():
            hasher = self._extras.setdefault(name, xxhash.xxh3_128())
            hasher.update(np.asarray(values, dtype=np.uint8).tobytes())

    def hexdigest(self) -> str:
        """32 hex digits of the samples so far."""
        joined = self._tokenizer_digest.encode() + self._lengths.digest() + self._ids.digest()
        for name in sorted(self._extras):
            joined += name.encode() + self._extras[name].digest()
        return xxhash.xxh3_128_hexdigest(joined)


def differences(
    standing: Mapping[str, Any], given: Mapping[str, Any], ignore: Sequence[str] = ()
) -> list[str]:
    """Where two trees of plain values differ, as "key: standing, not given" lines.

    Args:
        standing: what the cache has.
        given: what was to be written.
        ignore: dotted keys left out, with all below them.
    """
    left, right = dict(_leaves(standing, "")), dict(_leaves(given, ""))
    out = []
    for key in [*left, *(key for key in right if key not in left)]:
        if any(key == skip or key.startswith(f"{skip}.") for skip in ignore):
            continue
        if key not in left or key not in right or left[key] != right[key]:
            sides = [repr(side[key]) if key in side else "absent" for side in (left, right)]
            out.append(f"{key}: {sides[0]} in the cache, {sides[1]} given")
    return out


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a tree; an empty mapping or list is a leaf."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    if not items:
        yield path, value
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
