"""Plain text for terminals: numbers, listings and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def number(value: object, key: str = "") -> str:
    """A value as people read it; `key` tells sizes and durations from other numbers."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return size(value) if key == "bytes" or key.endswith("_bytes") else f"{value:,}"
    if isinstance(value, float):
        seconds = "seconds" in key and not key.endswith("_per_second")
        return f"{value:.4g}{' s' if seconds else ''}"
    if isinstance(value, list | tuple):
        return ", ".join(number(item) for item in value) or "-"
    return str(value)


def size(num_bytes: float) -> str:
    """Bytes in binary units: 1536 is `1.5 KiB`."""
    if num_bytes < 1024:
        return f"{num_bytes:,.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        num_bytes /= 1024
        if num_bytes < 1024 or unit == "TiB":
            break
    return f"{num_bytes:,.1f} {unit}"


def percent(share: float) -> str:
    """A share in hundredths: 0.1512 is `15.1%`."""
    return f"{100 * share:.1f}%"


def one_line(text: str, most: int | None = None) -> str:
    """A text without line breaks and control characters, which are shown escaped.

    Args:
        text: any text.
        most: letters that are shown; the rest is counted. None: all.
    """
    shown = text if most is None else text[:most]
    rest = len(text) - len(shown)
    # Only what prints goes to a terminal: other characters could move its cursor.
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return safe + (f" ... {rest:,} more characters" if rest else "")


def listing(values: Mapping[str, Any]) -> str:
    """One `key  value` line per entry, nested keys joined by dots, values in one column."""
    lines = list(_flat(values, (), ()))
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)


#: Keys of a listing below which stand names of the user's, shown as they are written.
_OVER_NAMES = ("signals", "tokens")


def _flat(
    values: Mapping[str, Any], path: tuple[str, ...], shown: tuple[str, ...]
) -> Iterable[tuple[str, str]]:
    named = path[-1:] and path[-1] in _OVER_NAMES
    for key, value in values.items():
        here = (*path, str(key))
        words = (*shown, str(key) if named else str(key).replace("_", " "))
        if isinstance(value, Mapping):
            yield from _flat(value, here, words)
        else:
            yield ".".join(words), number(value, ".".join(here))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a rule under its header; columns of numbers are right-aligned."""
    cells = [[number(cell) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    right = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(header))
    ]

    def line(row: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])
