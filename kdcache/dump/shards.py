"""The loop that all signals share: shard by shard, part by part, batch by batch, then a commit."""

# F items, M samples, B rows of a batch

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from kdcache.dump.background import Background
from kdcache.dump.batches import plan_batches
from kdcache.dump.part import PartBuilder
from kdcache.dump.ranks import Ranks
from kdcache.dump.signals.encoder import Columns, SignalEncoder
from kdcache.dump.signals.items import Items
from kdcache.dump.teacher import Teacher
from kdcache.dump.watch import Watch
from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.manifest import CommitRecord, PartRecord
from kdcache.formats.parts import part_row_bytes
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import concat
from kdcache.formats.shard import SampleShard
from kdcache.formats.signals import SignalRecord
from kdcache.formats.stores.claims import POLL_SECONDS
from kdcache.formats.stores.store import Claim
from kdcache.formats.writer import CacheWriter


def dump_signal(
    writer: CacheWriter, cache: Cache, encoder: SignalEncoder, ranks: Ranks, watch: Watch
) -> dict[str, Any]:
    """Make every shard of a signal that is this process's and not committed, and commit it.

    Args:
        writer: the cache, its manifest written.
        cache: the same cache, for reading.
        encoder: of the signal.
        ranks: which shards are this process's.
        watch: is told what happens, and stops the work where that was asked for.

    Returns:
        shards_written, shards_skipped (committed before), shards_elsewhere (not committed: what
        they are made from is not there) and labels_written (records of the main column of this
        run).

    Raises:
        IdentityError: the signal was begun with another teacher, setting, seed or batch plan.
        ModelError: samples are longer than the teacher takes, or what it says is not finite.
        StorageError: the store refused.
        StoppedError: the process was asked to stop; what was committed stays.
    """
    given = encoder.record
    record = encoder.record = writer.write_signal(given, watch.stopping.check)
    done = writer.committed(record.name)
    own = ranks.own(cache.num_shards)
    shards = [shard for shard in own if shard not in done]
    summary = {
        "shards_written": 0,
        "shards_skipped": len(own) - len(shards),
        "shards_elsewhere": 0,
        "labels_written": 0,
    }
    if not shards:
        return summary
    batch_tokens = _checked_plan(cache, record, given)
    if encoder.teacher is not None:
        _check_lengths(cache, record, encoder.teacher)
    tokens = sum(_stream_tokens(cache, record, number) for number in shards)
    bar = watch.signal(record.name, record.kind, len(own), len(own) - len(shards), round(tokens))
    with bar, _Claims(writer, record.name) as claims, Background("writer") as background:
        for number in _claimed(writer, record, claims, shards, watch, summary):
            shard = _Shard(writer, cache, encoder, background, watch)
            shard.run(number, batch_tokens)
            background.submit(partial(_finish, claims, number, summary, shard))
    return summary


def _claimed(
    writer: CacheWriter,
    record: SignalRecord,
    claims: _Claims,
    shards: list[int],
    watch: Watch,
    summary: dict[str, Any],
) -> Iterator[int]:
    """Shards to be made, as they are claimed; those that another process has are looked at last.

    It may have died, or only tidied up, so they are done with when they are committed.
    """
    while shards:
        held = []
        for number in shards:
            if not _await_inputs(writer, record, number, watch):
                summary["shards_elsewhere"] += 1
            elif not claims.take(number):
                held.append(number)
            elif writer.is_committed(record.name, number):  # by the one who had the claim
                claims.release(number)
                summary["shards_skipped"] += 1
            else:
                yield number
        shards = held
        if held:
            watch.advance(0)
            time.sleep(POLL_SECONDS)


def _finish(claims: _Claims, number: int, summary: dict[str, Any], shard: _Shard) -> None:
    """Count a shard and let it go; runs in the writer's thread, after its commit."""
    summary["shards_written"] += 1
    summary["labels_written"] += shard.entries[shard.encoder.main]
    claims.release(number)


class _Claims:
    """The claims of this process: those of the shard at work and of the one being written."""

    def __init__(self, writer: CacheWriter, signal: str) -> None:
        self._writer, self._signal = writer, signal
        self._held: dict[int, Claim] = {}

    def __enter__(self) -> _Claims:
        return self

    def __exit__(self, *error: object) -> None:
        """Give back what an error or a stop has left; what is not committed is removed."""
        for number in list(self._held):
            self.release(number, clean=False)

    def take(self, number: int) -> bool:
        """Claim a shard; false where another process has it."""
        claim = self._writer.claim(self._signal, number)
        if claim is not None:
            self._held[number] = claim
        return claim is not None

    def release(self, number: int, clean: bool = True) -> None:
        """Give one back."""
        self._writer.release(self._held.pop(number), self._signal, number, clean)


def _await_inputs(writer: CacheWriter, record: SignalRecord, number: int, watch: Watch) -> bool:
    """Wait while another process writes what a shard is made from; whether it is there then."""
    for name in record.inputs:
        while not writer.is_committed(name, number):
            with writer.claimed(name, number) as mine:
                if mine:
                    return False
            watch.advance(0)
            time.sleep(POLL_SECONDS)
    return True


def _stream_tokens(cache: Cache, record: SignalRecord, number: int) -> float:
    """Tokens of a signal's stream in a shard, in proportion to those of all streams."""
    streams = cache.manifest.streams
    every = sum(stream.num_tokens for stream in streams.values())
    return cache.manifest.shards[number].tokens * streams[record.stream].num_tokens / max(1, every)


def redo_shard(
    writer: CacheWriter, cache: Cache, encoder: SignalEncoder, number: int, watch: Watch
) -> None:
    """Make one shard of a signal of a cache again, into another cache.

    Args:
        writer: of the other cache.
        cache: that has the signal's record, the samples and what the signal is made from.
        encoder: of the signal.
        number: of the shard.
        watch: is told what happens.
    """
    record = writer.write_signal(encoder.record)
    tokens = round(_stream_tokens(cache, record, number))
    with watch.signal(record.name, record.kind, 1, 0, tokens), Background("writer") as background:
        shard = _Shard(writer, cache, encoder, background, watch)
        shard.run(number, int(record.recipe.get("batch_tokens") or 0))


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
    for name in {record.stream, record.source} - {None}:
        longest = cache.stream(str(name)).longest
        if teacher.max_positions is not None and longest > teacher.max_positions:
            raise ModelError(
                f"{cache.path}: stream {name!r} has samples of up to {longest} tokens, the "
                f"teacher {teacher.record.path} takes {teacher.max_positions}; dump with "
                f"dump.max_tokens {teacher.max_positions} to another output"
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
        watch: Watch,
    ) -> None:
        self.writer, self.cache, self.encoder = writer, cache, encoder
        self.background, self.watch = background, watch
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
        plan = plan_parts(per_sample.astype(np.int64), part_row_bytes(encoder.record))
        for part, (start, stop) in enumerate(plan):
            first, last = items.of_samples(start, stop)
            builder = PartBuilder(items.sample[first:last] - start, stop - start)
            batches = plan_batches(wide[first:last], high[first:last], batch_tokens)
            # A part whose samples are all of other tasks is one empty batch.
            for batch in batches or [np.empty(0, dtype=np.int64)]:
                columns = self._encode(items, batch + first, samples)
                self.background.submit(partial(self._take_in, builder, batch, columns))
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
        self.watch.advance(int(self.tokens_done) - before)

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
        commit = self.writer.commit(
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
        tokens = samples.streams[record.stream].offsets
        self.watch.committed(commit, int(tokens[-1] - tokens[0]))

    def _take_in(
        self, builder: PartBuilder, rows: np.ndarray, columns: Callable[[], Columns]
    ) -> None:
        """Bring a batch to the host; runs in the writer's thread."""
        found = columns()
        self.watch.labels(found)
        builder.add(rows, found)
