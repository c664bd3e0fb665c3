"""Rows of tables that are read at random: the next ones are asked for before they are needed."""

# M rows of a table, U columns, R rows asked for

from __future__ import annotations

import numpy as np

from kdcache.formats.native import library


def take_rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a table, copied.

    Args:
        table: [M, U] int64, contiguous.
        rows: [R] int64, repeats allowed.

    Returns:
        [R, U] int64.

    Raises:
        IndexError: there is no such row.
    """
    compiled = library()
    if compiled is None:
        return table.take(rows, axis=0)
    taken = np.empty((len(rows), table.shape[1]), dtype=np.int64)
    missing = compiled.kdcache_rows(
        table.ctypes.data, *table.shape, rows.ctypes.data, len(rows), taken.ctypes.data
    )
    if missing:
        raise _missing(table, rows)
    return taken


def sum_rows(table: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of rows of several batches.

    Args:
        table: [M, U] int32, contiguous.
        rows: [R] int64 of all batches, repeats allowed.
        ends: [batches + 1] int64 rows before each batch, and of all.

    Returns:
        [batches, U] int64.

    Raises:
        IndexError: there is no such row.
    """
    compiled = library()
    if compiled is None:
        before = np.zeros((len(rows) + 1, table.shape[1]), dtype=np.int64)
        table.take(rows, axis=0).cumsum(axis=0, dtype=np.int64, out=before[1:])
        return np.diff(before.take(ends, axis=0), axis=0)
    sums = np.empty((len(ends) - 1, table.shape[1]), dtype=np.int64)
    missing = compiled.kdcache_sums(
        table.ctypes.data,
        *table.shape,
        rows.ctypes.data,
        len(sums),
        ends.ctypes.data,
        sums.ctypes.data,
    )
    if missing:
        raise _missing(table, rows)
    return sums


def _missing(table: np.ndarray, rows: np.ndarray) -> IndexError:
    return IndexError(f"rows from {rows.min()} to {rows.max()}, of {len(table)}")
