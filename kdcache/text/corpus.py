"""Rows of text from files: parallel text, TSV, JSONL or Parquet, the same rows from each.

Rows keep their number in the file, from 0; those of several tasks are numbered through. Lines
end with a line feed alone; one carriage return before it and a byte order mark at the start of
the file are not text. A null is an empty text.
"""

# R rows of one batch

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import CorpusError
from kdcache.recipe import CorpusSection, TaskSection
from kdcache.text import messages
from kdcache.text.augment import with_copies
from kdcache.text.detokenize import DETOKENIZERS

BATCH_ROWS = 4096
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one task of a corpus, those that were left out excepted.

    Attributes:
        rows: [R] int64 row numbers, ascending, counted over all tasks.
        fields: name to R texts, for every field of the corpus.
        num_read: rows read for this batch, the dropped ones included.
        dropped: rows left out because a field was empty.
        task: the task's name; empty for a corpus without tasks.
        start: the task's first row.
        copies: that follow every row of the task's files, each as a row of its own.
    """

    rows: np.ndarray
    fields: dict[str, list[str]]
    num_read: int
    dropped: int
    task: str = ""
    start: int = 0
    copies: int = 0

    def place(self, index: int) -> str:
        """Row `index` of the batch in words, by its number in the task's own files."""
        task = f" of task {self.task!r}" if self.task else ""
        row, copy = divmod(int(self.rows[index]) - self.start, 1 + self.copies)
        return f"row {row} (from 0){task}" + (f", copy {copy}" if copy else "")

    def only(self, chosen: np.ndarray) -> RowBatch:
        """The same batch with those of its rows that are chosen.

        Args:
            chosen: row numbers, ascending.
        """
        kept = np.flatnonzero(np.isin(self.rows, chosen, assume_unique=True))
        fields = {name: [texts[i] for i in kept] for name, texts in self.fields.items()}
        return replace(self, rows=self.rows[kept], fields=fields)


def read_corpus(section: CorpusSection) -> Iterator[RowBatch]:
    """The corpus in batches of at most 4,096 rows, task after task.

    Of an augmented one the masked copies of a row follow it, and count as rows.

    Raises:
        CorpusError: a file or column is missing, texts are no UTF-8, files are of unequal
            length, a line does not follow the format, or a row is empty and should not be.
    """
    for part in section.parts.values():
        _require_files(part)
    first = 0
    for task, part in section.parts.items():
        start, copies = first, section.copies_of(task)
        each = 1 + copies
        for columns in _pieces(_limited(_READERS[part.format](part), part.limit), each):
            size = len(next(iter(columns.values())))
            filled = _filled(section, part, columns)
            if section.empty == "error" and not filled.all():
                _refuse_empty(part, columns, (first - start) // each, filled)
            fields = {name: columns.get(name, [""] * size) for name in section.field_names}
            rows = np.arange(first, first + size * each, dtype=np.int64)
            first += len(rows)
            if not filled.all():
                kept = np.flatnonzero(filled)
                fields = {name: [texts[i] for i in kept] for name, texts in fields.items()}
                rows = rows.reshape(size, each)[kept].flatten()
            if section.detokenize != "none":
                change = DETOKENIZERS[section.detokenize]
                for name in set(fields) - {section.label}:
                    fields[name] = [change(text) for text in fields[name]]
            if section.augment is not None:
                numbers = (rows[::each] - start) // each
                masked = section.masked_fields(task)
                fields = with_copies(fields, numbers, copies, section.augment, masked, task)
            yield RowBatch(rows, fields, size * each, size * each - len(rows), task, start, copies)
        if first == start:
            raise CorpusError(f"{_where(part)}: found no rows; expected at least one")


def _require_files(part: TaskSection) -> None:
    """A missing file should fail before any other is read."""
    for path in part.fields.values() if part.path is None else [part.path]:
        if not Path(path).is_file():
            raise CorpusError(f"{path}: found no such file; check the corpus section of the recipe")


def _limited(
    batches: Iterator[dict[str, list[str]]], limit: int | None
) -> Iterator[dict[str, list[str]]]:
    """The first `limit` rows; nothing behind them is read."""
    left = limit
    for columns in batches:
        size = len(next(iter(columns.values())))
        if left is not None and size >= left:
            yield {name: texts[:left] for name, texts in columns.items()}
            return
        yield columns
        if left is not None:
            left -= size


def _pieces(batches: Iterator[dict[str, list[str]]], each: int) -> Iterator[dict[str, list[str]]]:
    """The same rows, so few at a time that with their copies they are no more than a batch."""
    most = max(1, BATCH_ROWS // each)
    for columns in batches:
        size = len(next(iter(columns.values())))
        for begin in range(0, size, most):
            yield {name: texts[begin : begin + most] for name, texts in columns.items()}


def _filled(section: CorpusSection, part: TaskSection, columns: dict[str, list[str]]) -> np.ndarray:
    """[R] bool, the rows that the rule for empty texts has nothing against.

    Only the fields that the task has count.
    """
    size = len(next(iter(columns.values())))
    filled = np.ones(size, dtype=bool)
    if section.empty != "keep":
        for name in part.fields:
            texts = (bool(text) and not text.isspace() for text in columns[name])
            filled &= np.fromiter(texts, dtype=bool, count=size)
    return filled


def _refuse_empty(
    part: TaskSection, columns: dict[str, list[str]], before: int, filled: np.ndarray
) -> None:
    """Name the first empty text; `before` rows of the task stand before these."""
    first = int(np.flatnonzero(~filled)[0])
    name = next(name for name, texts in columns.items() if not texts[first].strip())
    raise CorpusError(
        f"{_where(part, name)}: row {before + first} (from 0) of field {name!r} is empty; "
        f"fill it, or set corpus.empty to drop or keep"
    )


def _where(section: TaskSection, name: str | None = None) -> str:
    """The file a message should name."""
    if section.path is not None:
        return section.path
    return section.fields[name] if name else ", ".join(section.fields.values())


def _lines(path: str) -> Iterator[list[str]]:
    """Lists of lines of a text file, decompressed by its name (.gz, .bz2, .zst...)."""
    number, rest, first = 0, b"", True
    try:
        with pa.input_stream(path, compression="detect") as stream:
            while block := stream.read(BLOCK_BYTES):
                if first:
                    block, first = block.removeprefix(b"\xef\xbb\xbf"), False
                head, newline, tail = block.rpartition(b"\n")
                if not newline:
                    rest += tail
                    continue
                lines = _decode(path, number, rest + head)
                number, rest = number + len(lines), tail
                yield lines
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{path}: cannot be read: {_one_line(error)}") from None
    if rest:
        yield _decode(path, number, rest)


def _decode(path: str, number: int, block: bytes) -> list[str]:
    """The lines of some bytes; `number` lines stand before them."""
    try:
        lines = block.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        before = block[: error.start]
        line = number + before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise CorpusError(
            f"{path}: line {line}, byte {column}: 0x{block[error.start]:02x} is not UTF-8; "
            f"convert the file"
        ) from None
    return [line.removesuffix("\r") for line in lines]


def _batched_lines(path: str) -> Iterator[list[str]]:
    """Lists of exactly 4,096 lines; the last is shorter."""
    lines = (line for block in _lines(path) for line in block)
    while batch := list(islice(lines, BATCH_ROWS)):
        yield batch


def _read_text(section: TaskSection) -> Iterator[dict[str, list[str]]]:
    """One file per field, a line a row."""
    readers = {name: _batched_lines(path) for name, path in section.fields.items()}
    count = 0
    while True:
        columns = {name: next(reader, []) for name, reader in readers.items()}
        sizes = {name: len(texts) for name, texts in columns.items()}
        if section.limit is not None:
            sizes = {name: min(size, section.limit - count) for name, size in sizes.items()}
        if len(set(sizes.values())) > 1:
            counts = "; ".join(
                f"{section.fields[name]} has "
                f"{count + len(columns[name]) + sum(len(batch) for batch in reader)}"
                for name, reader in readers.items()
            )
            raise CorpusError(f"parallel files need the same number of lines: {counts}")
        size = min(sizes.values())
        if size == 0:
            return
        yield columns
        count += size


def _read_tsv(section: TaskSection) -> Iterator[dict[str, list[str]]]:
    """A header line, then tab-separated values; nothing is quoted or escaped."""
    path = str(section.path)
    lines = (line for block in _lines(path) for line in block)
    header = next(lines, "").split("\t")
    index = {name: _column(path, header, column) for name, column in section.fields.items()}
    number = 1
    while batch := list(islice(lines, BATCH_ROWS)):
        values = [line.split("\t") for line in batch]
        for offset, row in enumerate(values):
            if len(row) != len(header):
                raise CorpusError(
                    f"{path}: line {number + offset + 1} has {len(row)} columns, the header "
                    f"has {len(header)}; a tsv corpus has no quoting, so remove stray tabs"
                )
        number += len(batch)
        yield {name: [row[i] for row in values] for name, i in index.items()}


def _column(path: str, names: list[str], column: str) -> int:
    """The place of a column, or an error that names those there are."""
    if column not in names:
        raise CorpusError(f"{path}: found no column {column!r}; it has {names}")
    return names.index(column)


def _read_jsonl(section: TaskSection) -> Iterator[dict[str, list[str]]]:
    """A JSON object per line."""
    path = str(section.path)
    number = 0
    for batch in _batched_lines(path):
        columns: dict[str, list[str]] = {name: [] for name in section.fields}
        for line in batch:
            number += 1
            record = _json_object(path, number, line)
            for name, column in section.fields.items():
                columns[name].append(_json_text(path, number, record, column))
        yield columns


def _json_object(path: str, number: int, line: str) -> dict[str, Any]:
    """One line of a JSONL file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a value is too large"
        raise CorpusError(f"{path}: line {number} is not JSON: {reason}") from None
    if not isinstance(record, dict):
        raise CorpusError(
            f"{path}: line {number}: expected an object, found {type(record).__name__}"
        )
    return record


def _json_text(path: str, number: int, record: dict[str, Any], column: str) -> str:
    """One text of a JSONL record; of messages, their canonical JSON."""
    _column(f"{path}: line {number}", list(record), column)
    text = record[column]
    if text is None:
        return ""
    if isinstance(text, list):
        try:
            text = messages.canonical(text)
        except ValueError as error:
            raise CorpusError(f"{path}: line {number}, {column!r}: {error}") from None
    if not isinstance(text, str):
        raise CorpusError(
            f"{path}: line {number}: {column!r} should be text, found {type(text).__name__}"
        )
    # An escaped lone surrogate is JSON, but no UTF-8 can hold it.
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise CorpusError(f"{path}: line {number}: {column!r} holds a lone surrogate")
    return text


def _read_parquet(section: TaskSection) -> Iterator[dict[str, list[str]]]:
    """Columns of text in a Parquet file."""
    path = str(section.path)
    wanted = sorted(set(section.fields.values()))
    try:
        with pq.ParquetFile(path) as file:
            for column in wanted:
                _column(path, file.schema_arrow.names, column)
            start = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                yield {
                    name: _parquet_texts(path, start, column, batch.column(column))
                    for name, column in section.fields.items()
                }
                start += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{path}: cannot be read as Parquet: {_one_line(error)}") from None


def _parquet_texts(path: str, start: int, column: str, array: Any) -> list[str]:
    """The texts of one column of one batch; `start` rows stand before it."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        raise CorpusError(f"{path}: column {column!r} should be text, found {array.type}")
    try:
        return [text or "" for text in array.to_pylist()]
    except UnicodeDecodeError:
        binary = array.cast(pa.large_binary()).to_pylist()
        for row, value in enumerate(binary):
            try:
                (value or b"").decode("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{path}: row {start + row} (from 0) of column {column!r}, byte "
                    f"{error.start + 1}: 0x{value[error.start]:02x} is not UTF-8; "
                    f"convert the file"
                ) from None
        raise


def _one_line(error: BaseException) -> str:
    """An error's first line."""
    return str(error).strip().split("\n")[0]


_READERS: dict[str, Callable[[TaskSection], Iterator[dict[str, list[str]]]]] = {
    "text": _read_text,
    "tsv": _read_tsv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
