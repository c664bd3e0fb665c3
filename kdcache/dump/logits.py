"""Stage two of a dump: the teacher's distribution at every target position, shard by shard."""

# B batch, S source positions, T target positions, N valid positions, M samples of a part,
# P positions of a part, V vocabulary

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kdcache.dump.background import Background
from kdcache.dump.batches import pad, plan_batches
from kdcache.dump.select import EncodedPositions, encode_logits
from kdcache.dump.teacher import Teacher
from kdcache.dump.versions import library_versions
from kdcache.errors import IdentityError, ModelError
from kdcache.formats.cache import Cache
from kdcache.formats.keyed import position_hash, sample_keys
from kdcache.formats.manifest import CommitRecord, PartRecord, SignalRecord
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged, offsets_of, segment_indices
from kdcache.formats.schema import join_ids, logits_schema, max_bytes_per_token, ragged_batch
from kdcache.formats.shard import SampleShard
from kdcache.formats.writer import CacheWriter
from kdcache.progress import progress
from kdcache.recipe import DumpSection

#: Logits made at a time: what a processor's cache holds, and a GiB in float32 elsewhere.
PIECE_ENTRIES_CPU, PIECE_ENTRIES = 1 << 22, 1 << 28

#: Most entries reordered at a time, so that the index of a `full` part stays small.
REORDER_ENTRIES = 1 << 22


def signal_record(cache: Cache, dump: DumpSection, name: str, teacher: Teacher) -> SignalRecord:
    """The record of one signal of a recipe, for the streams of a cache."""
    section = dump.signals[name]
    return SignalRecord(
        name=name,
        stream=section.stream,
        source=section.source,
        stream_digest=cache.stream(section.stream).digest,
        source_digest=cache.stream(section.source).digest,
        vocab_size=teacher.vocab_size,
        codec=section.codec,
        temperatures=tuple(section.temperatures),
        seed=dump.seed,
        teacher=teacher.record,
        recipe={
            "signal": section.model_dump(mode="json"),
            "teacher": dump.teacher.model_dump(mode="json") if dump.teacher else None,
            "batch_tokens": dump.batch_tokens,
        },
        versions=library_versions(),
    )


def dump_logits(
    writer: CacheWriter, cache: Cache, dump: DumpSection, name: str, teacher: Teacher
) -> dict[str, Any]:
    """Run the teacher over every shard of a signal that is not committed, and commit it.

    Args:
        writer: the cache, its manifest written.
        cache: the same cache, for reading.
        dump: the recipe's section.
        name: a signal of the recipe.
        teacher: the loaded model.

    Returns:
        shards_written, shards_skipped and tokens (positions labelled in this run).

    Raises:
        IdentityError: the signal was begun with another teacher, codec, seed or batch plan.
        ModelError: samples are longer than the teacher takes, or its logits are not finite.
        StorageError: the disk refused.
    """
    record = writer.write_signal(signal_record(cache, dump, name, teacher))
    done = writer.committed(name)
    shards = [shard for shard in range(cache.num_shards) if shard not in done]
    summary = {"shards_written": len(shards), "shards_skipped": len(done), "tokens": 0}
    if not shards:
        return summary
    _check_plan(cache, record, dump)
    _check_lengths(cache, record, teacher)
    total = sum(int(cache.samples(shard).streams[record.stream].lengths.sum()) for shard in shards)
    with progress(total, f"teacher ({name})", "token") as bar, Background("writer") as background:
        for shard in shards:
            _Shard(writer, record, dump.batch_tokens, teacher, background, bar).run(
                shard, cache.samples(shard)
            )
    summary["tokens"] = total
    return summary


def _check_plan(cache: Cache, record: SignalRecord, dump: DumpSection) -> None:
    """Batches of another size would give other bytes than those that stand."""
    stands = record.recipe.get("batch_tokens")
    if stands != dump.batch_tokens:
        raise IdentityError(
            f"{cache.path}: signal {record.name!r} is unfinished and was begun with "
            f"dump.batch_tokens {stands}, {dump.batch_tokens} given: use {stands} to finish it"
        )


def _check_lengths(cache: Cache, record: SignalRecord, teacher: Teacher) -> None:
    """A cache may hold samples that are longer than this teacher takes."""
    if teacher.max_positions is None:
        return
    for name in (record.source, record.stream):
        for number in range(cache.num_shards):
            shard = cache.samples(number)
            lengths = shard.streams[name].lengths
            longest = int(lengths.argmax())
            if lengths[longest] > teacher.max_positions:
                raise ModelError(
                    f"{cache.path}: row {shard.row[longest]} has {lengths[longest]} tokens in "
                    f"stream {name!r}, the teacher {teacher.record.path} takes "
                    f"{teacher.max_positions}; dump with dump.max_tokens "
                    f"{teacher.max_positions} to another output"
                )


class _Shard:
    """One shard of a signal on its way from the teacher to its commit."""

    def __init__(
        self,
        writer: CacheWriter,
        record: SignalRecord,
        batch_tokens: int,
        teacher: Teacher,
        background: Background,
        bar: tqdm[Any],
    ) -> None:
        self.writer, self.record, self.batch_tokens = writer, record, batch_tokens
        self.teacher, self.background, self.bar = teacher, background, bar
        self.schema = logits_schema(record.codec, record.vocab_size, record.temperatures)
        self.parts: list[PartRecord] = []
        self.entries = dict.fromkeys(self.schema.names, 0)

    def run(self, number: int, samples: SampleShard) -> None:
        """Hand every batch of every part to the writer thread, then the commit."""
        record = self.record
        src, tgt = samples.streams[record.source], samples.streams[record.stream]
        src = Ragged(src.offsets, {"id": join_ids(src.fields)})
        tgt = Ragged(tgt.offsets, {"id": join_ids(tgt.fields)})
        most = max_bytes_per_token(record.codec, record.vocab_size, record.temperatures)
        for part, (start, stop) in enumerate(plan_parts(tgt.lengths, most)):
            builder = PartBuilder(tgt.lengths[start:stop])
            draw, round_ = self._hashes(samples, tgt.lengths, start, stop)
            base = int(tgt.offsets[start])
            plan = plan_batches(src.lengths[start:stop], tgt.lengths[start:stop], self.batch_tokens)
            for rows in plan:
                at = segment_indices(tgt.offsets[rows + start], tgt.lengths[rows + start])
                encoded = self._encode(
                    src, tgt, rows + start, at, draw[at - base], round_[at - base], samples
                )
                self.background.submit(partial(builder.add, rows, encoded))
                self.bar.update(len(at))
            self.background.submit(
                partial(self._write, number, part, samples.start, start, builder)
            )
        self.background.submit(partial(self._commit, number, samples))

    def _hashes(
        self, samples: SampleShard, lengths: np.ndarray, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[P] int64 draw and rounding hash of every position of samples [start, stop)."""
        counts = lengths[start:stop]
        position = segment_indices(np.zeros(len(counts), dtype=np.int64), counts)
        ids, rows = samples.sample_id[start:stop], samples.row[start:stop]
        seed, name = self.record.seed, self.record.name
        draw, round_ = (
            position_hash(
                np.repeat(sample_keys(seed, purpose, name, ids, rows), counts), position
            ).view(np.int64)
            for purpose in ("draw", "round")
        )
        return draw, round_

    def _encode(
        self,
        src: Ragged,
        tgt: Ragged,
        rows: np.ndarray,
        at: np.ndarray,
        draw: np.ndarray,
        round_: np.ndarray,
        samples: SampleShard,
    ) -> EncodedPositions:
        """One forward and the selection, both on the teacher's device."""
        device, record = self.teacher.device, self.record

        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        src_ids, src_mask = pad(src, rows, self.teacher.pad_id)
        labels, label_mask = pad(tgt, rows, self.teacher.pad_id)
        gold = move(tgt.fields["id"][at].astype(np.int64))  # [N]
        draw_hash, round_hash = move(draw), move(round_)
        batch = move(src_ids), move(src_mask), move(labels), move(label_mask)
        piece_entries = PIECE_ENTRIES_CPU if device.type == "cpu" else PIECE_ENTRIES
        encoded, done = [], 0
        try:
            for logits in self.teacher.logits_in_pieces(*batch, piece_entries):  # [R, V]
                here = slice(done, done + len(logits))
                encoded.append(
                    encode_logits(
                        logits,
                        gold[here],
                        draw_hash[here],
                        round_hash[here],
                        record.codec,
                        record.temperatures,
                    )
                )
                done += len(logits)
            return EncodedPositions.concat(encoded)
        except ModelError as error:
            of = samples.row[rows]
            raise ModelError(
                f"signal {record.name!r}, corpus rows {of.min()} to {of.max()}: {error}"
            ) from None

    def _write(self, number: int, part: int, first: int, start: int, builder: PartBuilder) -> None:
        """Write one part; runs in the writer thread."""
        columns = builder.finish()
        for name, column in columns.items():
            self.entries[name] += int(column.offsets[-1])
        batch = ragged_batch(self.schema, columns)
        begin = first + start
        self.parts.append(
            self.writer.write_part(
                self.record.name, number, part, begin, begin + batch.num_rows, batch
            )
        )

    def _commit(self, number: int, samples: SampleShard) -> None:
        """Commit the shard; runs in the writer thread, after all of its parts."""
        self.writer.commit(
            CommitRecord(
                signal=self.record.name,
                shard=number,
                start=samples.start,
                stop=samples.stop,
                tokens=self.entries["tokens"],
                entries=self.entries,
                parts=self.parts,
            )
        )


class PartBuilder:
    """Collects encoded batches of one part and puts them into sample order."""

    def __init__(self, token_counts: np.ndarray) -> None:
        """Start an empty part.

        Args:
            token_counts: [M] int64 positions of each sample.
        """
        self._token_counts = token_counts
        self._rows: list[np.ndarray] = []
        self._lengths: dict[str, list[np.ndarray]] = {}
        self._pieces: dict[str, dict[str, list[np.ndarray]]] = {}

    def add(self, rows: np.ndarray, encoded: EncodedPositions) -> None:
        """Take in one batch.

        Args:
            rows: [B] samples of the part, in the order of the batch.
            encoded: their positions, one sample after another.
        """
        counts = self._token_counts[rows]
        ends = offsets_of(counts)
        per_position = {"exact": encoded.num_exact, "drawn": encoded.num_drawn}
        self._rows.append(rows)
        for name, fields in encoded.to_host().items():
            lengths = counts
            if name != "tokens":
                sums = offsets_of(per_position[name].cpu().numpy())
                lengths = np.diff(sums[ends])
            self._lengths.setdefault(name, []).append(lengths)
            column = self._pieces.setdefault(name, {})
            for field, values in fields.items():
                column.setdefault(field, []).append(values)

    def finish(self) -> dict[str, Ragged]:
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
            columns[name] = Ragged(offsets_of(lengths[place]), fields)
        return columns


def _reorder(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Segments of an array one after another, copied in slices of bounded size."""
    ends = np.cumsum(lengths)
    out = np.empty(int(ends[-1]), dtype=values.dtype)
    begin = done = 0
    while begin < len(lengths):
        stop = int(np.searchsorted(ends, done + REORDER_ENTRIES, side="right"))
        stop = max(stop, begin + 1)
        index = segment_indices(starts[begin:stop], lengths[begin:stop])
        out[done : done + len(index)] = values[index]
        begin, done = stop, done + len(index)
    return out
