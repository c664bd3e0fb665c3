"""Sealed JSON: the form of every record of a cache, and its reading.

Every JSON file opens with the line `{"crc32c": "<8 hex digits>",`; the checksum covers all
bytes after that line. Keys are sorted, one space indents, a newline ends the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

import google_crc32c
from pydantic import BaseModel, ConfigDict, ValidationError

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.stores.store import Store

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HEADER = re.compile(rb'\{"crc32c": "([0-9a-f]{8})",\n')


class Record(BaseModel):
    """Base of every record: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def check_version(cls, tree: dict[str, Any], where: str) -> None:
        """Refuse JSON of a version that this class cannot be read from, before its keys confuse.

        Args:
            tree: the record's JSON.
            where: path for messages.

        Raises:
            FormatError: it is of a newer one.
        """


def encode_record(record: Record) -> bytes:
    """Bytes of a record's JSON file: the checksum line, then everything it covers."""
    tree = record.model_dump(mode="json")
    text = json.dumps(tree, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    rest = text.removeprefix("{\n").encode()
    return b'{"crc32c": "%08x",\n' % google_crc32c.value(rest) + rest


def decode_json(data: bytes, where: str) -> dict[str, Any]:
    """The checked JSON object of a cache file, its checksum member taken off.

    Args:
        data: bytes of the file.
        where: path for messages.

    Raises:
        IntegrityError: the checksum is not that of the bytes.
        FormatError: the bytes are not such a file.
    """
    header = _HEADER.match(data)
    if header is None:
        raise IntegrityError(
            f'{where}: its first line is not {{"crc32c": "<8 hex digits>",; not a file of a '
            "cache, or damaged: restore it, or delete the cache and dump again"
        )
    found = b"%08x" % google_crc32c.value(data[header.end() :])
    if header.group(1) != found:
        raise IntegrityError(
            f"{where}: crc32c {found.decode()}, expected {header.group(1).decode()}: its bytes "
            "changed; restore the file, or delete the cache and dump again"
        )
    try:
        tree = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
        if _SURROGATE.search(data):
            json.dumps(tree, ensure_ascii=False).encode("utf-8")  # one that stands alone fails here
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(f"{where}: not the JSON of a cache: {reason}") from None
    del tree["crc32c"]
    return dict(tree)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return tree


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


R = TypeVar("R", bound=Record)
#: The class of a record, or what finds it from the JSON.
Kind = type[R] | Callable[[dict[str, Any]], type[R]]


def decode_record(kind: Kind[R], data: bytes, where: str) -> R:
    """Parse and validate the bytes of one record's file.

    Args:
        kind: which record it holds, or a function of its JSON that says so (by a ValueError
            that there is none).
        data: bytes of the file.
        where: path for messages.

    Raises:
        FormatError: one line that names every fault by its path.
    """
    tree = decode_json(data, where)
    try:
        found: type[R] = kind if isinstance(kind, type) else kind(tree)
        found.check_version(tree, where)
        return found.model_validate(tree)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'record'}: "
            f"{fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        ]
    except ValueError as error:
        faults = [str(error)]
    except (RecursionError, ArithmeticError) as error:
        faults = [f"cannot be read: {type(error).__name__}"]
    shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
    shown = shown if len(shown) <= 1000 else shown[:1000] + " ..."  # a fault may quote a long key
    # A hostile key may hold line breaks or terminal escapes.
    raise FormatError(f"{where}: " + "".join(c if c.isprintable() else "?" for c in shown))


def read_record(kind: Kind[R], store: Store, path: str) -> R:
    """Read one record's file of a cache.

    Args:
        kind: which record it holds.
        store: where the cache lies.
        path: path inside the cache.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is damaged or not a record of that kind.
        StorageError: it cannot be read.
    """
    return decode_record(kind, store.read(path), store.at(path))
