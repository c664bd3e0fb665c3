"""Rows of tables that are read at random: the next ones are asked for before they are needed."""

# M rows of a table, R rows asked for

from __future__ import annotations

import math

import numpy as np

from kdcache.formats.native import library


def take_rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a table, copied.

    Args:
        table: [M, ...], contiguous.
        rows: [R] int64, repeats allowed.

    Returns:
        [R, ...].

    Raises:
        IndexError: there is no such row.
    """
    compiled = library()
    width = table.itemsize * math.prod(table.shape[1:])
    if compiled is None or width % 8:
        return table.take(rows, axis=0)
    taken = np.empty((len(rows), *table.shape[1:]), dtype=table.dtype)
    missing = compiled.kdcache_rows(
        table.ctypes.data, len(table), width, rows.ctypes.data, len(rows), taken.ctypes.data
    )
    if missing:
        raise IndexError(f"rows from {rows.min()} to {rows.max()}, of {len(table)}")
    return taken
