"""DistillKit's Parquet: input_ids, and compressed or plain top-k log-probs of the next tokens."""

# T tokens of a row, N labels, k entries of each

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import CorpusError, RecipeError
from kdcache.exchange.distillkit_codec import (
    CONFIG_FILE,
    CompressionConfig,
    read_config,
    unpack_ids,
    unpack_log_probs,
)
from kdcache.exchange.peer_rows import PeerLabels, PeerRow

IDS, VALUES = "bytepacked_indices", "compressed_logprobs"
PLAIN_IDS, PLAIN_VALUES = "token_ids", "top_values"

#: Rows that are read at a time: few, since a row may be long.
_BATCH_ROWS = 16


class DistillkitReader:
    """Rows of `input_ids` and, for each token but the first, the k most probable ids.

    Where `attention_mask` numbers the texts that a row packs, each is a text of its own.
    """

    limits: tuple[str, ...] = (
        "no tail: of the ids outside the k only the sum of their probabilities is known, at "
        "temperature 1; other temperatures are approximate",
        "targets outside the k have no log-prob of their own: theirs is an estimate",
        "log-probs beyond the exact ones are a curve's: approximate",
        "log-probs are taken to be at temperature 1 (preapplied_temperature: 1): a file does not "
        "say so",
        "no text: it is what the tokens decode to",
        "packed rows without attention_mask are one text each, with a false label where texts meet",
    )
    unit = "row"
    lossy = True
    has_loss = False

    def __init__(
        self,
        paths: Sequence[str],
        config: str | None = None,
        text_field: str | None = None,
        pad_id: int | None = None,
    ) -> None:
        """Look at the files' columns, and read how they are compressed.

        Args:
            paths: of Parquet files.
            config: file that says how; `compression_config.yaml` beside the first one without it.
            text_field: column of the text; none without it.
            pad_id: a last token of this id, which a capture adds for the sake of the label before
                it, is left out.

        Raises:
            CorpusError: a file is no such Parquet.
            RecipeError: it is compressed, and nothing says how.
        """
        self._paths, self._text, self._pad = paths, text_field, pad_id
        self.total: int | None = sum(_num_rows(path) for path in paths)
        self._plain = True
        for path in paths:
            with _opened(path) as file:
                self._plain = self._check(path, file.schema_arrow.names)
        self._config: CompressionConfig | None = None
        if not self._plain:
            beside = Path(paths[0]).parent / CONFIG_FILE
            if config is None and not beside.is_file():
                raise RecipeError(
                    f"{beside}: no such file, and it says how {paths[0]} is compressed; name it "
                    "with --packing"
                )
            self._config = read_config(config or beside)

    def _check(self, path: str, columns: Sequence[str]) -> bool:
        """Whether a file holds plain lists; refuses what is not of the format."""
        wanted = ["input_ids"] if self._text is None else ["input_ids", self._text]
        missing = [name for name in wanted if name not in columns]
        if not missing and {PLAIN_IDS, PLAIN_VALUES} <= set(columns):
            return True
        if not missing and {IDS, VALUES} <= set(columns):
            return False
        if "packed_indices" in columns:
            raise CorpusError(
                f"{path}: DistillKit's old form (packed_indices): its logits are centred, so their "
                "probabilities are not known; capture the teacher again with a present DistillKit"
            )
        raise CorpusError(
            f"{path}: found the columns {list(columns)}; expected "
            f"{', '.join([*wanted, VALUES])} and {IDS}, or {PLAIN_IDS} and {PLAIN_VALUES}"
        )

    def rows(self, advance: Callable[[int], object], start: int = 0) -> Iterator[PeerRow]:
        """See `Reader`."""
        names = (PLAIN_IDS, PLAIN_VALUES) if self._plain else (IDS, VALUES)
        number = 0
        for path in self._paths:
            with _opened(path) as file:
                has_mask = "attention_mask" in file.schema_arrow.names
                wanted = ["input_ids", *names, *(["attention_mask"] if has_mask else [])]
                wanted += [self._text] if self._text else []
                at = 0
                for batch in _batches(path, file, wanted):
                    for inside in range(batch.num_rows):
                        where = f"{path}: row {at + inside} (from 0)"
                        for row in self._texts(batch, inside, where, names, has_mask):
                            if number >= start:
                                yield PeerRow(number, *row)
                            number += 1
                    advance(batch.num_rows)
                    at += batch.num_rows

    def _texts(
        self, batch: pa.RecordBatch, index: int, where: str, names: tuple[str, str], has_mask: bool
    ) -> Iterator[tuple[Any, ...]]:
        """What a row holds: one text, or those that it packs; a PeerRow without its number."""
        ids = np.array(batch.column("input_ids")[index].as_py() or [], dtype=np.int64)
        num_labels = len(batch.column(names[0])[index])
        if num_labels not in (len(ids) - 1, len(ids)):
            raise CorpusError(
                f"{where}: {num_labels} labels for {len(ids)} input_ids; expected one for each "
                "token but the first (or one more, of a token that was cut off)"
            )
        if len(ids) and ids[-1] == self._pad:
            ids = ids[:-1]
        text = batch.column(self._text)[index].as_py() if self._text else None
        mask = batch.column("attention_mask")[index].as_py() if has_mask else None
        mask = mask if mask is None else mask[: len(ids)]
        part = np.zeros(len(ids), np.int64) if mask is None else np.array(mask, dtype=np.int64)
        if len(part) != len(ids):
            raise CorpusError(f"{where}: {len(part)} in attention_mask for {len(ids)} input_ids")
        cuts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(ids)]
        for begin, end in pairwise(cuts):
            if mask is not None and (begin == end or not part[begin]):
                continue  # padding
            read = _Labels(batch, index, where, names, self._config, begin, end)
            yield where, ids[begin:end], text if len(cuts) == 2 else None, None, None, read


class _Labels:
    """Labels of the tokens [begin + 1, end) of a row, decoded when they are asked for."""

    def __init__(
        self,
        batch: pa.RecordBatch,
        index: int,
        where: str,
        names: tuple[str, str],
        config: CompressionConfig | None,
        begin: int,
        end: int,
    ) -> None:
        self._ids, self._values = (batch.column(name)[index].values for name in names)
        self._where, self._config, self._names = where, config, names
        self._here = slice(begin, max(begin, end - 1))

    def __call__(self) -> PeerLabels:
        ids = self._matrix(self._ids, self._names[0])
        values = self._matrix(self._values, self._names[1])
        config = self._config
        if config is not None:
            widths = ids.shape[1], values.shape[1]
            if widths != (config.id_bytes, config.value_bytes) and len(ids):
                raise CorpusError(
                    f"{self._where}: {widths[0]} bytes of ids and {widths[1]} of log-probs at a "
                    f"token; its compression config says {config.id_bytes} and "
                    f"{config.value_bytes}: it is another's"
                )
            ids = unpack_ids(ids.astype(np.uint8), config)
            values = unpack_log_probs(values.astype(np.uint8), config)
        elif ids.shape != values.shape:
            raise CorpusError(f"{self._where}: {ids.shape[1]} ids, {values.shape[1]} values")
        num, k = ids.shape
        return PeerLabels(
            1,
            np.full(num, k, dtype=np.int64),
            ids.astype(np.int64).ravel(),
            values.astype(np.float64).ravel(),
            np.full(num, np.nan),
        )

    def _matrix(self, lists: Any, name: str) -> np.ndarray:
        """[N, width] from a list of lists of one length."""
        if not len(lists):
            return np.empty((0, 0))
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        if len(set(lengths.tolist())) != 1:
            raise CorpusError(f"{self._where}: the lists of {name!r} differ in length")
        flat = lists.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(lengths), -1)[self._here]


def _num_rows(path: str) -> int:
    with _opened(path) as file:
        rows: int = file.metadata.num_rows
        return rows


def _opened(path: str) -> pq.ParquetFile:
    """A Parquet file, or an error in one line."""
    try:
        return pq.ParquetFile(path, pre_buffer=False)  # or a whole row group is in memory
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise CorpusError(f"{path}: cannot be read as Parquet: {reason}") from None


def _batches(path: str, file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some rows at a time."""
    try:
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise CorpusError(f"{path}: cannot be read as Parquet: {reason}") from None
