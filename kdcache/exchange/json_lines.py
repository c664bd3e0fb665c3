"""Lines of JSON, read one at a time, with words for where each stands."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from kdcache.errors import CorpusError

#: Bytes after which progress is told.
_STEP = 1 << 20


def total_bytes(paths: Sequence[str]) -> int | None:
    """Bytes that `json_lines` will advance by; None where a file is compressed."""
    if any(path.endswith(".gz") for path in paths):
        return None
    return sum(Path(path).stat().st_size for path in paths)


def json_lines(
    paths: Sequence[str], advance: Callable[[int], object], start: int = 0
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number (over all files, from 0), place and object of every line that is not blank.

    Args:
        paths: of files; one that ends in .gz is decompressed.
        advance: called with the bytes that were read.
        start: lines before it are not parsed.

    Raises:
        CorpusError: a file cannot be read, or a line is no JSON object.
    """
    number = 0
    for path in paths:
        read = 0
        try:
            with cast(BinaryIO, gzip.open(path) if path.endswith(".gz") else open(path, "rb")) as f:
                for line_number, line in enumerate(f, start=1):
                    read += len(line)
                    if read >= _STEP:
                        advance(read)
                        read = 0
                    if line.isspace():
                        continue
                    if number >= start:
                        where = f"{path}: line {line_number}"
                        yield number, where, _object(line, where)
                    number += 1
        except (OSError, EOFError) as error:
            raise CorpusError(f"{path}: cannot be read: {str(error).split(chr(10))[0]}") from None
        advance(read)


def _object(line: bytes, where: str) -> dict[str, Any]:
    """One line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be decoded"
        raise CorpusError(f"{where} is not JSON: {reason}; was the file cut off?") from None
    if not isinstance(value, dict):
        raise CorpusError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def required(row: dict[str, Any], names: Sequence[str], what: str, where: str) -> Any:
    """The value of the first of some keys that a row has.

    Raises:
        CorpusError: it has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise CorpusError(
        f"{where}: no {what}: expected the key {' or '.join(map(repr, names))}, found {sorted(row)}"
    )
