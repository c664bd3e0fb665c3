"""Stage two of an import: the labels of every sample, shard by shard."""

# T tokens of a sample, N labels

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.errors import CorpusError, IdentityError
from kdcache.exchange.gold_check import GoldCheck
from kdcache.exchange.label_coding import CleanLabels, clean, encode
from kdcache.exchange.peer_rows import PeerRow, Reader
from kdcache.formats.cache import Cache
from kdcache.formats.manifest import CommitRecord, PartRecord
from kdcache.formats.parts import part_row_bytes
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged, concat
from kdcache.formats.schema import join_ids, ragged_batch, signal_schema
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import LogitsRecord
from kdcache.formats.stores.claims import POLL_SECONDS
from kdcache.formats.units import label_counts
from kdcache.formats.writer import CacheWriter

#: Labels that are coded at once.
_BLOCK_LABELS = 1 << 14


def labelled(
    row: PeerRow, ids: np.ndarray, loss: np.ndarray | None, k: int, vocab_size: int, lossy: bool
) -> tuple[CleanLabels, np.ndarray]:
    """The labels of the tokens of a row that are learned, and these tokens.

    Args:
        row: of the file.
        ids: [T] int64 its tokens.
        loss: [T] bool, which are learned; None: all but the first.
        k: most entries of a label.
        vocab_size: V.
        lossy: as `Reader.lossy`.

    Raises:
        CorpusError: a token that is learned has no label.
    """
    labels = row.labels()
    first = len(ids) - len(labels.counts) if labels.first is None else labels.first
    wanted = np.arange(len(ids)) > 0
    if loss is not None:
        wanted &= loss
    if first < 0 or first + len(labels.counts) > len(ids):
        raise CorpusError(
            f"{row.where}: {len(labels.counts)} labels for the {len(ids)} tokens of its text: "
            "another tokenizer or chat template, or another text; name the teacher's own"
        )
    bare = np.flatnonzero(wanted)
    bare = bare[(bare < first) | (bare >= first + len(labels.counts))]
    if len(bare):
        raise CorpusError(
            f"{row.where}: token {int(bare[0])} (from 0) is learned, and the file's "
            f"{len(labels.counts)} labels are those of the tokens {first} to "
            f"{first + len(labels.counts) - 1} of {len(ids)}"
        )
    all_of = clean(labels, ids[first : first + len(labels.counts)], row.where, k, vocab_size, lossy)
    keep = wanted[first : first + len(labels.counts)]
    entries = np.repeat(keep, all_of.counts)
    kept = CleanLabels(
        all_of.counts[keep],
        all_of.ids[entries],
        all_of.log_probs[entries],
        all_of.gold[keep],
        all_of.known[keep],
        all_of.rescaled,
    )
    return kept, ids[wanted]


class LabelWriter:
    """Writes the signal of an import.

    Attributes:
        check: what was seen of the labels that were written.
        known: labels whose token has a log-prob of its own.
        rescaled: labels that were scaled down to the sum 1.
    """

    def __init__(
        self, writer: CacheWriter, cache: Cache, reader: Reader, record: LogitsRecord, k: int
    ) -> None:
        """Set up.

        Args:
            writer: of the cache, its manifest written.
            cache: the same, for reading.
            reader: of the files.
            record: of the signal.
            k: most entries of a label.
        """
        self._writer, self._cache, self._reader = writer, cache, reader
        self._record, self._k = record, k
        self._stream: Iterator[PeerRow] | None = None
        self._last = -1
        self.check = GoldCheck()
        self.known = self.rescaled = 0

    def run(self, bar: tqdm[Any], gold_check: bool) -> dict[str, int]:
        """Make every shard that is not committed.

        Args:
            bar: advanced by what the reader reads.
            gold_check: refuse a shard whose labels fit their tokens no better than neighbours.

        Returns:
            shards_written and shards_skipped.

        Raises:
            CorpusError: a row is wrong.
            IdentityError: a row is not the one that the samples were made of, or labels are
                shifted.
        """
        writer, name = self._writer, self._record.name
        self._record = writer.write_signal(self._record)  # type: ignore[assignment]
        total = self._cache.num_shards
        pending = [shard for shard in range(total) if shard not in writer.committed(name)]
        written = 0
        while pending:
            left = []
            for shard in pending:
                with writer.claimed(name, shard) as mine:
                    if not mine:
                        left.append(shard)
                    elif not writer.is_committed(name, shard):
                        self._write(shard, bar, gold_check)
                        written += 1
            pending = left
            if pending:
                time.sleep(POLL_SECONDS)
        return {"shards_written": written, "shards_skipped": total - written}

    def _write(self, shard: int, bar: tqdm[Any], gold_check: bool) -> None:
        """Read, code, write and commit one shard."""
        samples, record = self._cache.samples(shard), self._record
        counts = label_counts(self._cache, record, shard)
        assert counts is not None, "only beams are counted by themselves"
        parts: list[PartRecord] = []
        entries: dict[str, int] = {}
        for number, (a, b) in enumerate(plan_parts(counts, part_row_bytes(record))):
            columns = self._columns(samples, a, b, bar)
            for name, column in columns.items():
                entries[name] = entries.get(name, 0) + int(column.offsets[-1])
            place = record.name, shard, number, samples.start + a, samples.start + b
            batch = ragged_batch(signal_schema(record), columns)
            parts.append(self._writer.write_part(*place, batch))
        if gold_check:
            self.check.require(f"{record.name}, up to corpus row {int(samples.row[-1])}")
        self._writer.commit(
            CommitRecord(
                signal=record.name,
                shard=shard,
                start=samples.start,
                stop=samples.stop,
                tokens=entries["tokens"],
                entries=entries,
                parts=parts,
            )
        )

    def _row(self, number: int, bar: tqdm[Any]) -> PeerRow:
        """A row of the files; rows that are asked for in order are read once."""
        if self._stream is None or self._last >= number:
            self._stream = self._reader.rows(bar.update, start=number)
        for row in self._stream:
            self._last = row.number
            if row.number == number:
                return row
        raise IdentityError(
            f"{self._cache.path}: the cache was begun with {number + 1} rows or more, and the "
            "files have fewer: give the files it was begun with, or choose another output"
        )

    def _columns(
        self, samples: SampleShard, start: int, stop: int, bar: tqdm[Any]
    ) -> dict[str, Ragged]:
        """Columns of some samples of a shard, coded a block at a time."""
        stream = samples.streams[self._record.stream]
        all_ids, loss = join_ids(stream.fields).astype(np.int64), stream.fields.get("loss")
        pieces: list[dict[str, Ragged]] = []
        block: list[CleanLabels] = []
        begin, size = start, 0
        for index in range(start, stop):
            row = self._row(int(samples.row[index]), bar)
            here = slice(int(stream.offsets[index]), int(stream.offsets[index + 1]))
            ids = all_ids[here]
            if row.ids is not None and not np.array_equal(row.ids, ids):
                raise IdentityError(
                    f"{row.where}: its tokens are not those of corpus row {row.number} of "
                    f"{self._cache.path}: give the files it was begun with, or choose another "
                    "output"
                )
            mask = None if loss is None else loss[here].astype(bool)
            labels, tokens = labelled(
                row, ids, mask, self._k, self._record.vocab_size, self._reader.lossy
            )
            self.check.add(labels, tokens)
            self.known += int(labels.known.sum())
            self.rescaled += labels.rescaled
            block.append(labels)
            size += len(tokens)
            if size >= _BLOCK_LABELS or index == stop - 1:
                sample = slice(begin, index + 1)
                pieces.append(
                    encode(self._record, block, samples.sample_id[sample], samples.row[sample])
                )
                block, begin, size = [], index + 1, 0
        return {name: concat([piece[name] for piece in pieces]) for name in pieces[0]}
