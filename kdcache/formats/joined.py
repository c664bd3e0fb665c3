"""Joined columns: ragged columns of several files numbered as one, samples copied out at once.

# M samples of all files, S files, C columns, F fields of all columns, R rows asked for
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from kdcache.errors import IntegrityError
from kdcache.formats.buffers import TABLES
from kdcache.formats.native import library
from kdcache.formats.padded import Padded, padded
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.wide import widened
from kdcache.formats.wide_copy import WideCopy, supported


class JoinedColumns:
    """The same ragged columns of several files.

    What a sample has of one field lies in one piece, so it is copied as one, by Arrow's `take` of
    binary values. One call takes all fields of all files: its values are the pieces, and their
    offsets are counted from the lowest address that any field has.

    Attributes:
        nbytes: of all fields.
    """

    def __init__(self, files: Sequence[Mapping[str, Ragged]]) -> None:
        """Number the samples of the files one after another.

        Args:
            files: columns by name, of equal names, fields and dtypes; the fields are contiguous.

        Raises:
            IntegrityError: offsets point outside the values; nothing is copied unless all are in.
        """
        for file in files:
            for name, column in file.items():
                _require_inside(name, column)
        self._files = list(files)  # keeps the memory that is copied from
        self.nbytes = sum(
            array.nbytes
            for file in files
            for column in file.values()
            for array in column.fields.values()
        )
        names = list(files[0]) if files else []
        counts = [len(file[name]) for file in files for name in names[:1]]
        self._starts = offsets_of(np.array(counts, dtype=np.int64))
        # Of every file one offset more than it has samples: sample m of file s is at m + s.
        offsets = [[file[name].offsets for file in files] for name in names]
        kinds = [one.dtype for each in offsets for one in each] or [np.dtype(np.int32)]
        width = sum(counts) + len(files)
        # Those of a sample lie side by side, so that all of them are read at once.
        self._offsets = TABLES.array((width, len(names)), np.result_type(*kinds))  # [M + S, C]
        for number, each in enumerate(offsets):
            np.concatenate(each, out=self._offsets[:, number])
        fields = [
            (column, field, array.dtype)
            for column, name in enumerate(names)
            for field, array in files[0][name].fields.items()
        ]
        # Widest first, so that every field is aligned where it begins in the copy.
        self._fields = sorted(fields, key=lambda field: -field[2].itemsize)
        self._names = names
        self._column = np.array([column for column, _, _ in self._fields], dtype=np.int64)  # [F]
        self._bytes = np.array([dtype.itemsize for _, _, dtype in self._fields], dtype=np.int64)
        arrays = [[file[names[c]].fields[name] for file in files] for c, name, _ in self._fields]
        assert all(array.flags.c_contiguous and array.ndim == 1 for row in arrays for array in row)
        places = [[array.__array_interface__["data"][0] for array in row] for row in arrays]
        addresses = np.array(places, dtype=np.int64).reshape(len(arrays), len(files))
        lowest = int(addresses.min()) if addresses.size else 0
        self._addresses = addresses - lowest  # [F, S]
        self._wide = self._compiled(addresses)
        # Without an end: between the files there is memory of others, which no piece touches.
        self._memory = pa.foreign_buffer(lowest, 1 << 62)

    def take(self, rows: np.ndarray) -> dict[str, Ragged]:
        """Some samples, in the given order, copied into fresh arrays.

        Args:
            rows: [R] integer samples, repeats allowed.

        Raises:
            IndexError: there is no such sample.
        """
        if not self._names:
            return {}
        file = self._starts.searchsorted(rows, side="right") - 1
        place = rows + file
        begins = self._offsets.take(place, axis=0).T  # [C, R]; quicker than an index in brackets
        lengths = self._offsets.take(place + 1, axis=0).T - begins
        totals = lengths.sum(axis=1)  # [C]
        sizes = totals[self._column] * self._bytes  # [F]
        ends = sizes.cumsum()
        data = self._copied(file, begins, lengths, int(ends[-1]))
        fields: list[dict[str, np.ndarray]] = [{} for _ in self._names]
        for (column, name, dtype), end, size in zip(
            self._fields, ends.tolist(), sizes.tolist(), strict=True
        ):
            fields[column][name] = data[end - size : end].view(dtype)
        offsets = np.zeros((len(self._names), len(rows) + 1), dtype=np.int64)
        lengths.cumsum(axis=1, out=offsets[:, 1:])
        return {
            name: Ragged(offsets[column], fields[column]) for column, name in enumerate(self._names)
        }

    def take_wide(self, rows: np.ndarray) -> dict[str, Ragged]:
        """Some samples in their wide form (`wide`), in the given order, in fresh arrays.

        Args:
            rows: [R] integer samples, repeats allowed.

        Raises:
            IndexError: there is no such sample.
        """
        if self._wide is not None:
            return self._wide.take(rows)
        return {name: widened(name, column) for name, column in self.take(rows).items()}

    def take_padded(
        self, rows: np.ndarray, ends: np.ndarray, pads: Mapping[str, int]
    ) -> dict[str, Padded]:
        """Samples of several batches, of columns that have ids: padded matrices of them.

        Args:
            rows: [R] integer samples of all batches, repeats allowed.
            ends: [batches + 1] int64 samples before each batch, and of all.
            pads: column to the id that stands outside the mask.

        Raises:
            IndexError: there is no such sample.
        """
        if self._wide is not None:
            return self._wide.take_padded(rows, ends, pads)
        taken = self.take_wide(rows)
        return {name: padded(column, ends, pads[name]) for name, column in taken.items()}

    def _compiled(self, addresses: np.ndarray) -> WideCopy | None:
        """What copies the wide form itself; None where nothing was compiled.

        Args:
            addresses: [F, S] where the values of each field begin.
        """
        compiled = library()
        dtypes = {
            name: {field: array.dtype for field, array in column.fields.items()}
            for name, column in (self._files[0] if self._files else {}).items()
        }
        if compiled is None or not dtypes or not supported(dtypes, self._offsets):
            return None
        places = {
            (self._names[column], field): addresses[row]
            for row, (column, field, _) in enumerate(self._fields)
        }
        return WideCopy(compiled, dtypes, self._starts, self._offsets, places)

    def _copied(
        self, file: np.ndarray, begins: np.ndarray, lengths: np.ndarray, size: int
    ) -> np.ndarray:
        """[size] uint8, every field one after another.

        Args:
            file: [R] of each row.
            begins: [C, R] first record of each row, in its file.
            lengths: [C, R] records of each row.
            size: bytes in all.
        """
        if not size:
            return np.empty(0, dtype=np.uint8)
        number = len(self._fields) * len(file)
        # Two offsets a piece; what lies between two pieces is a value that nobody takes.
        spans = np.empty(2 * number + 1, dtype=np.int64)
        pairs = spans[:-1].reshape(len(self._fields), len(file), 2)
        width = self._bytes[:, None]
        first = begins.take(self._column, axis=0) * width
        first += self._addresses.take(file, axis=1)
        pairs[:, :, 0] = first
        first += lengths.take(self._column, axis=0) * width
        pairs[:, :, 1] = first
        # `take` makes room for as many values of the mean length, which this makes the right one.
        spans[-1] = spans[0] + 2 * size
        buffers = [None, pa.py_buffer(spans), self._memory]
        values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 2 * number, buffers)
        taken = values.take(pa.array(np.arange(0, 2 * number, 2)))
        return np.frombuffer(taken.buffers()[2], dtype=np.uint8, count=size)


def _require_inside(name: str, column: Ragged) -> None:
    """Arrow copies from addresses that it is given, whatever lies there."""
    offsets = column.offsets
    size = min((len(array) for array in column.fields.values()), default=0)
    if int(offsets[0]) < 0 or int(offsets[-1]) > size or bool((offsets[1:] < offsets[:-1]).any()):
        raise IntegrityError(
            f"column {name!r}: offsets run from {offsets[0]} to {offsets[-1]} over {size} values; "
            "expected them ascending within; run `kdcache verify`"
        )
