"""Copies of samples in their wide form by compiled code: from mapped files to tensors, once.

# M samples of all files, S files, C columns, F stored fields of all columns, R rows asked for
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from kdcache.formats.buffers import BUFFERS
from kdcache.formats.padded import Padded
from kdcache.formats.ragged import Ragged
from kdcache.formats.wide import TAIL, WideField, wide_fields


class _Fields:
    """Some fields as `kdcache_copy` wants them.

    Attributes:
        wide: each with the number of its column and its first row in the table.
        table: [F, 7] of `Field` in native.c; several rows of a field that is made of several.
    """

    def __init__(self) -> None:
        self.wide: list[tuple[int, WideField, int]] = []
        self._rows: list[tuple[int, ...]] = []

    def add(
        self, column: int, field: WideField, stored: Mapping[str, np.dtype], places: Sequence[int]
    ) -> None:
        """One more.

        Args:
            column: its number.
            field: the wide form.
            stored: dtypes of the column's stored fields.
            places: where the [S] addresses of each field that it is made of are.
        """
        self.wide.append((column, field, len(self._rows)))
        if field.name == "id":
            low, high = places[0], places[1] if len(places) == 2 else 0
            widths = stored["id"].itemsize, field.dtype.itemsize
            self._rows.append((low, high, column, *widths, 1, 0))
            return
        for knot, (name, low) in enumerate(zip(field.stored, places, strict=True)):
            widths = stored[name].itemsize, field.dtype.itemsize
            self._rows.append((low, 0, column, *widths, field.step, knot))

    @cached_property
    def table(self) -> np.ndarray:
        return np.array(self._rows, dtype=np.int64).reshape(len(self._rows), 7)


class _Found:
    """Where some samples lie, and where copies of some fields of them will.

    Attributes:
        ends: [C, R + 1] int64 records up to each sample.
        firsts: [F + 1] int64 where each row of the table begins in the copy, and the end.
        where: pointers to the file [R] of each sample, its first records [C, R], and the ends.
    """

    def __init__(self, num_rows: int, num_columns: int, num_fields: int) -> None:
        self._file = np.empty(num_rows, dtype=np.int32)
        self._begins = np.empty((num_columns, num_rows), dtype=np.int64)
        self.ends = np.empty((num_columns, num_rows + 1), dtype=np.int64)
        self.firsts = np.empty(num_fields + 1, dtype=np.int64)
        self.where = tuple(_pointer(array) for array in (self._file, self._begins, self.ends))


class WideCopy:
    """What compiled code needs to know of joined columns.

    Args:
        library: from `native.library`.
        dtypes: column to the dtypes of its stored fields.
        starts: [S + 1] int64 first sample of each file.
        offsets: [M + S, C] int32 first record of each sample, of every file one more.
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
        self._all, self._beside_ids = _Fields(), _Fields()
        self._ids: list[_Fields] = []  # of each column that has any
        for number, (column, stored) in enumerate(dtypes.items()):
            for field in wide_fields(column, stored):
                places = [_pointer(self._addresses[column, name]) for name in field.stored]
                if field.name == "id":
                    self._ids.append(_Fields())
                apart = self._ids[-1] if field.name == "id" else self._beside_ids
                for fields in (self._all, apart):
                    fields.add(number, field, stored, places)
        self._fixed = (_pointer(self._starts), len(starts) - 1, _pointer(self._offsets))

    def take(self, rows: np.ndarray) -> dict[str, Ragged]:
        """Some samples, in the given order, copied into fresh arrays.

        Args:
            rows: [R] integer samples, repeats allowed.

        Raises:
            IndexError: there is no such sample.
        """
        return self._copied(self._found(rows, self._all), self._all)

    def take_padded(
        self, rows: np.ndarray, ends: np.ndarray, pads: Mapping[str, int]
    ) -> dict[str, Padded]:
        """Samples of several batches as padded matrices, see `JoinedColumns.take_padded`."""
        found = self._found(rows, self._beside_ids)
        beside = self._copied(found, self._beside_ids)
        batches = len(ends) - 1, _pointer(ends)
        widths = np.empty(len(ends) - 1, dtype=np.int64)
        made = {}
        for number, name in enumerate(self._names):
            mine = _pointer(found.ends[number])
            area = self._library.kdcache_widths(mine, *batches, _pointer(widths))
            data = BUFFERS.empty(9 * area)
            ids, mask = data[: 8 * area].view(np.int64), data[8 * area :].view(np.bool_)
            unknown = self._library.kdcache_pad(
                _pointer(self._ids[number].table),
                len(rows),
                *found.where,
                *batches,
                _pointer(widths),
                pads[name],
                _pointer(data),
                _pointer(data) + 8 * area,
            )
            assert not unknown, self._ids[number].wide
            made[name] = Padded(ids, mask, widths.tolist(), beside[name])
        return made

    def _found(self, rows: np.ndarray, fields: _Fields) -> _Found:
        """Where samples lie, and where copies of those fields will."""
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        found = _Found(len(rows), len(self._names), len(fields.table))
        missing = self._library.kdcache_find(
            *self._fixed,
            len(self._names),
            _pointer(rows),
            len(rows),
            _pointer(fields.table),
            len(fields.table),
            *found.where,
            _pointer(found.firsts),
        )
        if missing:
            raise IndexError(f"rows from {rows.min()} to {rows.max()}, of {self._starts[-1]}")
        return found

    def _copied(self, found: _Found, fields: _Fields) -> dict[str, Ragged]:
        """Those fields as columns."""
        copies: list[dict[str, np.ndarray]] = [{} for _ in self._names]
        if fields.wide:
            data = BUFFERS.empty(int(found.firsts[-1]))
            unknown = self._library.kdcache_copy(
                _pointer(fields.table),
                len(fields.table),
                found.ends.shape[1] - 1,
                *found.where,
                _pointer(found.firsts),
                _pointer(data),
            )
            assert not unknown, fields.wide
            places, totals = found.firsts.tolist(), found.ends[:, -1].tolist()
            for column, field, number in fields.wide:
                size = totals[column] * field.step * field.dtype.itemsize
                values = data[places[number] : places[number] + size].view(field.dtype)
                if field.name == TAIL:
                    values = values.reshape(-1, field.step)
                copies[column][field.name] = values
        columns = zip(self._names, found.ends, copies, strict=True)
        return {name: Ragged(ends, copy) for name, ends, copy in columns}


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
