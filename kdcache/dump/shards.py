"""The loop that all signals share: shard by shard, part by part, batch by batch, then a commit."""

# F items, M samples, B rows of a batch

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.dump.background import Background
from kdcache.dump.batches import plan_batches
from kdcache.dump.part import PartBuilder
from kdcache.dump.signals.encoder import Columns, SignalEncoder
from kdcache.dump.signals.items import Items
from kdcache.dump.teacher import Teacher
from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.manifest import CommitRecord, PartRecord
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import concat
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import SignalRecord
from kdcache.formats.writer import CacheWriter
from kdcache.progress import progress


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
