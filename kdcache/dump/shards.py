"""The loop that all signals share: shard by shard, part by part, batch by batch, then a commit."""

# F items, M samples, B rows of a batch

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from kdcache.dump.background import Background
from kdcache.dump.batches import plan_batches
from kdcache.dump.items import Items
from kdcache.dump.teacher import Teacher
from kdcache.dump.tokenize import Tokenizer
from kdcache.dump.versions import library_versions
from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.manifest import CommitRecord, PartRecord
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged, concat, offsets_of, segment_indices
from kdcache.formats.schema import ragged_batch, signal_schema
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import SignalRecord
from kdcache.formats.writer import CacheWriter
from kdcache.progress import progress
from kdcache.recipe import DumpSection, signal_streams

#: Columns of some items, each as many samples long, ready to be put into the order of the shard.
Columns = dict[str, Ragged]

#: Most bytes reordered at a time, so that the index of a large part stays small.
REORDER_BYTES = 1 << 25


class SignalEncoder(ABC):
    """What one signal of a recipe says of a shard, batch by batch.

    Attributes:
        record: the signal's.
        teacher: the model; None for signals that need none.
        main: the column with one record for each thing described.
    """

    main: ClassVar[str]
    record: SignalRecord

    def __init__(
        self, cache: Cache, section: DumpSection, name: str, teacher: Teacher | None
    ) -> None:
        """Keep the teacher; a kind makes its record.

        Args:
            cache: whose streams are described.
            section: the recipe's.
            name: of the signal.
            teacher: that speaks, checked by `check`.
        """
        self.teacher = teacher

    @classmethod
    def check(
        cls,
        section: DumpSection,
        name: str,
        teacher: Teacher | None,
        tokenizers: Mapping[str, Tokenizer],
    ) -> None:
        """Refuse what this kind of signal cannot be made with, before anything is written.

        Args:
            section: the recipe's.
            name: of the signal.
            teacher: of the signal, loaded; None where it needs none.
            tokenizers: by name, those that exist before the corpus is read.

        Raises:
            RecipeError: the recipe asks for what there is not.
            ModelError: the teacher is of the wrong kind, or lacks a layer.
        """

    @property
    @abstractmethod
    def max_bytes_per_row(self) -> int:
        """Most bytes that one record of the main column, and what belongs to it, takes."""

    @abstractmethod
    def items(self, samples: SampleShard, inputs: Mapping[str, Columns]) -> Items:
        """What the teacher reads, for all samples of a shard.

        Args:
            samples: the shard.
            inputs: columns of the signals that this one is made from, by name.
        """

    @abstractmethod
    def counts(self, items: Items) -> np.ndarray:
        """[F] int64 records (at most) that each item will have in the main column."""

    def plan_lengths(self, items: Items) -> tuple[np.ndarray, np.ndarray]:
        """[F] and [F] lengths whose padded sum `dump.batch_tokens` bounds."""
        return items.lengths()

    @abstractmethod
    def encode(self, items: Items, rows: np.ndarray) -> Callable[[], Columns]:
        """Run the teacher on some items and code what it says, on its device.

        Args:
            items: of the shard.
            rows: [B] which of them.

        Returns:
            What brings the columns to the host; it is called in the writer's thread. Every
            column has B samples.

        Raises:
            ModelError: what the teacher said cannot be stored; `located` adds where.
        """

    def write(
        self, writer: CacheWriter, shard: int, part: int, span: tuple[int, int], columns: Columns
    ) -> PartRecord:
        """Write one part; as Arrow, unless a kind does otherwise.

        Args:
            writer: the cache.
            shard: shard number.
            part: part number.
            span: its samples [start, stop), counted over the corpus.
            columns: one record list for each of them.
        """
        batch = ragged_batch(signal_schema(self.record), columns)
        return writer.write_part(self.record.name, shard, part, *span, batch)


def common_fields(
    cache: Cache, dump: DumpSection, name: str, teacher: Teacher | None
) -> dict[str, Any]:
    """What the record of a signal says whatever its kind.

    Args:
        cache: whose streams it is of.
        dump: the recipe's section.
        name: of the signal.
        teacher: that makes it.
    """
    section = dump.signals[name]
    streams = signal_streams(section)
    source = streams.get("source")
    used = dump.teacher_of(name)
    return {
        "name": name,
        "stream": streams["stream"],
        "stream_digest": cache.stream(streams["stream"]).digest,
        "source": source,
        "source_digest": None if source is None else cache.stream(source).digest,
        "seed": dump.seed,
        "teacher": None if teacher is None else teacher.record,
        "recipe": {
            "signal": section.model_dump(mode="json"),
            "teacher": None if used is None else used.model_dump(mode="json"),
            "batch_tokens": dump.batch_tokens,
        },
        "versions": library_versions(),
    }


def dump_signal(writer: CacheWriter, cache: Cache, encoder: SignalEncoder) -> dict[str, Any]:
    """Make every shard of a signal that is not committed, and commit it.

    Args:
        writer: the cache, its manifest written.
        cache: the same cache, for reading.
        encoder: of the signal.

    Returns:
        shards_written, shards_skipped and labels_written (records of the main column of this run).

    Raises:
        IdentityError: the signal was begun with another teacher, setting, seed or batch plan.
        ModelError: samples are longer than the teacher takes, or what it says is not finite.
        StorageError: the disk refused.
    """
    given = encoder.record
    record = encoder.record = writer.write_signal(given)
    done = writer.committed(record.name)
    shards = [shard for shard in range(cache.num_shards) if shard not in done]
    summary = {"shards_written": len(shards), "shards_skipped": len(done), "labels_written": 0}
    if not shards:
        return summary
    batch_tokens = _checked_plan(cache, record, given)
    if encoder.teacher is not None:
        _check_lengths(cache, record, encoder.teacher)
    total = sum(int(cache.samples(n).streams[record.stream].lengths.sum()) for n in shards)
    with (
        progress(total, f"{record.kind} ({record.name})", "token") as bar,
        Background("writer") as background,
    ):
        for number in shards:
            shard = _Shard(writer, cache, encoder, background, bar)
            shard.run(number, batch_tokens)
            background.submit(partial(_add, summary, shard))
    return summary


def shard_inputs(cache: Cache, record: SignalRecord, shard: int) -> dict[str, Columns]:
    """Columns of the signals that a signal is made from, by name.

    Args:
        cache: that has them.
        record: of the signal that is made.
        shard: shard number.
    """
    found = {}
    for name in record.inputs:
        parts = [columns for _, _, columns in cache.signal_shard(name, shard).parts]
        found[name] = {column: concat([part[column] for part in parts]) for column in parts[0]}
    return found


def _add(summary: dict[str, Any], shard: _Shard) -> None:
    """Count a finished shard; runs in the writer's thread, after its commit."""
    summary["labels_written"] += shard.entries[shard.encoder.main]


def _checked_plan(cache: Cache, stands: SignalRecord, given: SignalRecord) -> int:
    """Batches of another size would give other bytes than those that stand."""
    begun, asked = (record.recipe.get("batch_tokens") for record in (stands, given))
    if begun != asked:
        raise IdentityError(
            f"{cache.path}: signal {stands.name!r} is unfinished and was begun with "
            f"dump.batch_tokens {begun}, {asked} given: use {begun} to finish it"
        )
    return int(begun or 0)


def _check_lengths(cache: Cache, record: SignalRecord, teacher: Teacher) -> None:
    """A cache may hold samples that are longer than this teacher takes."""
    if teacher.max_positions is None:
        return
    for name in {record.stream, record.source} - {None}:
        for number in range(cache.num_shards):
            shard = cache.samples(number)
            lengths = shard.streams[str(name)].lengths
            longest = int(lengths.argmax())
            if lengths[longest] > teacher.max_positions:
                raise ModelError(
                    f"{cache.path}: row {shard.row[longest]} has {lengths[longest]} tokens in "
                    f"stream {name!r}, the teacher {teacher.record.path} takes "
                    f"{teacher.max_positions}; dump with dump.max_tokens "
                    f"{teacher.max_positions} to another output"
                )


def located(error: ModelError, record: SignalRecord, rows: np.ndarray) -> ModelError:
    """The same error with the signal and the corpus rows of its batch before it."""
    return ModelError(f"signal {record.name!r}, corpus rows {rows.min()} to {rows.max()}: {error}")


class _Shard:
    """One shard of a signal on its way from the teacher to its commit."""

    def __init__(
        self,
        writer: CacheWriter,
        cache: Cache,
        encoder: SignalEncoder,
        background: Background,
        bar: tqdm[Any],
    ) -> None:
        self.writer, self.cache, self.encoder = writer, cache, encoder
        self.background, self.bar = background, bar
        self.parts: list[PartRecord] = []
        self.entries: dict[str, int] = {encoder.main: 0}
        self.tokens_done = 0.0

    def run(self, number: int, batch_tokens: int) -> None:
        """Hand every batch of every part to the writer's thread, then the commit."""
        encoder, samples = self.encoder, self.cache.samples(number)
        items = encoder.items(samples, shard_inputs(self.cache, encoder.record, number))
        counts, (wide, high) = encoder.counts(items), encoder.plan_lengths(items)
        num_samples = samples.stop - samples.start
        per_sample = np.bincount(items.sample, weights=counts, minlength=num_samples)
        shares = self._shares(items, samples)
        plan = plan_parts(per_sample.astype(np.int64), encoder.max_bytes_per_row)
        for part, (start, stop) in enumerate(plan):
            first, last = items.of_samples(start, stop)
            builder = PartBuilder(items.sample[first:last] - start, stop - start)
            batches = plan_batches(wide[first:last], high[first:last], batch_tokens)
            # A part whose samples are all of other tasks is one empty batch.
            for batch in batches or [np.empty(0, dtype=np.int64)]:
                columns = self._encode(items, batch + first, samples)
                self.background.submit(partial(_take_in, builder, batch, columns))
                self._advance(float(shares[batch + first].sum()))
            span = samples.start + start, samples.start + stop
            self.background.submit(partial(self._write, number, part, span, builder))
        self._advance(0.5)  # what rounding has left
        self.background.submit(partial(self._commit, number, samples))

    def _shares(self, items: Items, samples: SampleShard) -> np.ndarray:
        """[F] tokens of the stream that each item stands for on the progress bar."""
        tokens = samples.streams[self.encoder.record.stream].lengths
        siblings = np.bincount(items.sample, minlength=len(tokens))
        shares: np.ndarray = tokens[items.sample] / siblings[items.sample]
        return shares

    def _advance(self, tokens: float) -> None:
        before, self.tokens_done = int(self.tokens_done), self.tokens_done + tokens
        self.bar.update(int(self.tokens_done) - before)

    def _encode(
        self, items: Items, rows: np.ndarray, samples: SampleShard
    ) -> Callable[[], Columns]:
        try:
            return self.encoder.encode(items, rows)
        except ModelError as error:
            corpus_rows = samples.row[items.sample[rows]]
            raise located(error, self.encoder.record, corpus_rows) from None

    def _write(self, number: int, part: int, span: tuple[int, int], builder: PartBuilder) -> None:
        """Write one part; runs in the writer's thread."""
        columns = builder.finish()
        for name, column in columns.items():
            self.entries[name] = self.entries.get(name, 0) + int(column.offsets[-1])
        self.parts.append(self.encoder.write(self.writer, number, part, span, columns))

    def _commit(self, number: int, samples: SampleShard) -> None:
        """Commit the shard; runs in the writer's thread, after all of its parts."""
        record = self.encoder.record
        self.writer.commit(
            CommitRecord(
                signal=record.name,
                shard=number,
                start=samples.start,
                stop=samples.stop,
                tokens=self.entries[self.encoder.main],
                entries=self.entries,
                inputs={
                    name: self.cache.commit_record(name, number).digest for name in record.inputs
                },
                parts=self.parts,
            )
        )


def _take_in(builder: PartBuilder, rows: np.ndarray, columns: Callable[[], Columns]) -> None:
    """Bring a batch to the host; runs in the writer's thread."""
    builder.add(rows, columns())


class PartBuilder:
    """Collects encoded batches of one part and puts them into sample order."""

    def __init__(self, sample: np.ndarray, num_samples: int) -> None:
        """Start an empty part.

        Args:
            sample: [F] int64 sample of the part that each item is of, ascending.
            num_samples: samples of the part; some may have no item.
        """
        self._first = np.searchsorted(sample, np.arange(num_samples + 1))  # item of each sample
        self._rows: list[np.ndarray] = []
        self._lengths: dict[str, list[np.ndarray]] = {}
        self._pieces: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(self, rows: np.ndarray, columns: Mapping[str, Ragged]) -> None:
        """Take in one batch.

        Args:
            rows: [B] items of the part, in the order of the batch.
            columns: what was said of them, B samples each.
        """
        self._rows.append(rows)
        for name, ragged in columns.items():
            self._lengths.setdefault(name, []).append(ragged.lengths)
            column = self._pieces.setdefault(name, {})
            for field, values in ragged.fields.items():
                column.setdefault(field, []).append(values)

    def finish(self) -> Columns:
        """The columns of the part, samples in order. Empties the builder."""
        rows = np.concatenate(self._rows)
        place = np.empty(len(rows), dtype=np.int64)
        place[rows] = np.arange(len(rows))
        columns = {}
        for name in list(self._pieces):
            lengths = np.concatenate(self._lengths.pop(name))
            starts = offsets_of(lengths)[:-1]
            pieces = self._pieces.pop(name)
            fields = {
                field: _reorder(np.concatenate(pieces.pop(field)), starts[place], lengths[place])
                for field in list(pieces)
            }
            columns[name] = Ragged(offsets_of(lengths[place])[self._first], fields)
        return columns


def _reorder(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Segments of an array one after another, copied in slices of bounded size."""
    ends = np.cumsum(lengths)
    out = np.empty((int(lengths.sum()), *values.shape[1:]), dtype=values.dtype)
    most = max(1, REORDER_BYTES // max(1, values[:1].nbytes))
    begin = done = 0
    while begin < len(lengths):
        stop = int(np.searchsorted(ends, done + most, side="right"))
        stop = max(stop, begin + 1)
        index = segment_indices(starts[begin:stop], lengths[begin:stop])
        out[done : done + len(index)] = values[index]
        begin, done = stop, done + len(index)
    return out
