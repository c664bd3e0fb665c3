"""Copies of samples in their wide form by compiled code: from mapped files to tensors, once.

# M samples of all files, S files, C columns, F stored fields of all columns, R rows asked for
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from kdcache.formats.buffers import BUFFERS
from kdcache.formats.ragged import Ragged
from kdcache.formats.wide import TAIL, WideField, wide_fields

#: Fields begin at multiples of this many bytes.
_ALIGNED = 64


class WideCopy:
    """What compiled code needs to know of joined columns.

    Args:
        library: from `native.library`.
        dtypes: column to the dtypes of its stored fields.
        starts: [S + 1] int64 first sample of each file.
        offsets: [C, M + S] int32 first record of each sample, of every file one more.
        addresses: (column, field) to [S] int64 where its values begin in each file.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        dtypes: Mapping[str, Mapping[str, np.dtype]],
        starts: np.ndarray,
        offsets: np.ndarray,
        addresses: Mapping[tuple[str, str], np.ndarray],
    ) -> None:
        self._library = library
        self._names = list(dtypes)
        self._starts = np.ascontiguousarray(starts)
        self._offsets = np.ascontiguousarray(offsets)
        self._addresses = {key: np.ascontiguousarray(each) for key, each in addresses.items()}
        self._fields: list[tuple[int, WideField]] = []
        table = []  # of `Field` in native.c
        for number, (column, stored) in enumerate(dtypes.items()):
            for field in wide_fields(column, stored):
                self._fields.append((number, field))
                places = [_pointer(self._addresses[column, name]) for name in field.stored]
                if field.name == "id":
                    low, high = places[0], places[1] if len(places) == 2 else 0
                    width = stored["id"].itemsize
                    table.append((low, high, number, width, field.dtype.itemsize, 1, 0))
                    continue
                for knot, (name, low) in enumerate(zip(field.stored, places, strict=True)):
                    widths = stored[name].itemsize, field.dtype.itemsize
                    table.append((low, 0, number, *widths, field.step, knot * widths[1]))
        self._table = np.array(table, dtype=np.int64).reshape(len(table), 7)
        parts = [len(field.stored) if field.step > 1 else 1 for _, field in self._fields]
        self._entry = np.repeat(np.arange(len(parts)), parts)  # wide field of each row of the table
        self._columns = np.array([column for column, _ in self._fields], dtype=np.int64)
        self._bytes = np.array([field.dtype.itemsize * field.step for _, field in self._fields])

    def take(self, rows: np.ndarray) -> dict[str, Ragged]:
        """Some samples, in the given order, copied into fresh arrays.

        Args:
            rows: [R] integer samples, repeats allowed.

        Raises:
            IndexError: there is no such sample.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        num_rows, num_columns = len(rows), len(self._names)
        file = np.empty(num_rows, dtype=np.int32)
        begins = np.empty((num_columns, num_rows), dtype=np.int64)
        ends = np.empty((num_columns, num_rows + 1), dtype=np.int64)
        where = [_pointer(file), _pointer(begins), _pointer(ends)]
        failed = self._library.kdcache_find(
            _pointer(self._starts),
            len(self._starts) - 1,
            _pointer(self._offsets),
            self._offsets.shape[1],
            num_columns,
            _pointer(rows),
            num_rows,
            *where,
        )
        if failed:
            raise IndexError(f"rows from {rows.min()} to {rows.max()}, of {self._starts[-1]}")
        sizes = ends[:, -1].take(self._columns) * self._bytes
        firsts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(-(-sizes // _ALIGNED) * _ALIGNED, out=firsts[1:])
        data = BUFFERS.empty(int(firsts[-1]))
        table = self._table.copy()
        table[:, 6] += firsts.take(self._entry) + _pointer(data)
        unknown = self._library.kdcache_copy(_pointer(table), len(table), num_rows, *where)
        assert not unknown, self._fields
        return self._ragged(data, firsts, sizes, ends)

    def _ragged(
        self, data: np.ndarray, firsts: np.ndarray, sizes: np.ndarray, ends: np.ndarray
    ) -> dict[str, Ragged]:
        """The copies as columns."""
        fields: list[dict[str, np.ndarray]] = [{} for _ in self._names]
        for (column, field), first, size in zip(
            self._fields, firsts.tolist(), sizes.tolist(), strict=False
        ):
            values = data[first : first + size].view(field.dtype)
            if field.name == TAIL:
                values = values.reshape(-1, field.step)
            fields[column][field.name] = values
        return {
            name: Ragged(ends[column], fields[column]) for column, name in enumerate(self._names)
        }


def supported(dtypes: Mapping[str, Mapping[str, np.dtype]], offsets: np.ndarray) -> bool:
    """Whether compiled code knows these columns: those of caches, as Arrow lists them.

    Args:
        dtypes: column to the dtypes of its stored fields.
        offsets: of the columns.
    """
    return offsets.dtype == np.int32 and all(
        _known(stored[name], field)
        for column, stored in dtypes.items()
        for field in wide_fields(column, stored)
        for name in field.stored
    )


def _known(stored: np.dtype, field: WideField) -> bool:
    widths = stored.itemsize, field.dtype.itemsize
    if field.step > 1:
        return widths == (2, 2)
    widened = stored.kind == "u" and widths in {(1, 4), (1, 8), (2, 4), (2, 8), (4, 8)}
    return widened or stored == field.dtype


def _pointer(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
