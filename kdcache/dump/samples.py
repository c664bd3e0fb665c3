"""Stage one of a dump: corpus to tokens to samples shards, then the manifest."""

# M samples of a chunk, R rows of a batch

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import numpy as np

from kdcache.dump.chunk import Chunk, sample_ids_of
from kdcache.dump.encode import FEW_ROWS, encoded
from kdcache.dump.same_samples import manifest_recipe
from kdcache.dump.stopping import Stopping
from kdcache.dump.tokenize import Tokenizer
from kdcache.dump.versions import library_versions
from kdcache.errors import CorpusError, IdentityError, ModelError
from kdcache.formats.identity import CorpusDigest, StreamDigest
from kdcache.formats.manifest import (
    MAX_SHARDS,
    SAMPLES,
    CommitRecord,
    CorpusRecord,
    Manifest,
    ShardRecord,
    StreamRecord,
    TokenizerRecord,
)
from kdcache.formats.plan import ShardCutter
from kdcache.formats.ragged import Ragged, concat
from kdcache.formats.schema import (
    STREAM_PREFIX,
    extra_fields,
    samples_batch,
    samples_schema,
    split_ids,
    stream_extras,
)
from kdcache.formats.writer import CacheWriter
from kdcache.progress import progress
from kdcache.recipe import CorpusSection, DumpSection, Recipe, StreamSection
from kdcache.text.corpus import RowBatch, read_corpus


class SampleWriter:
    """Writes the samples of one corpus, shard by shard, and then the manifest.

    Every record is created when the whole corpus has been read, so a corpus that turns out to
    be wrong half-way leaves nothing that counts.
    """

    def __init__(
        self,
        writer: CacheWriter,
        recipe: Recipe,
        corpus: CorpusSection,
        tokenizers: Mapping[str, Tokenizer],
        max_tokens: int | None,
    ) -> None:
        """Set up an empty corpus.

        Args:
            writer: the cache, without a manifest.
            recipe: recorded; its dump section is used.
            corpus: what is read.
            tokenizers: name to tokenizer, for every stream.
            max_tokens: longest stream of a sample; None for no limit.
        """
        self._writer, self._recipe, self._corpus = writer, recipe, corpus
        self._dump: DumpSection = recipe.dump
        self._tokenizers = tokenizers
        self._max_tokens = max_tokens
        # Sorted, because a record's keys are: it is the order of the columns.
        self._streams = dict(sorted(self._dump.streams.items()))
        sizes = {
            name: tokenizers[stream.tokenizer].vocab_size for name, stream in self._streams.items()
        }
        self._vocab_sizes = sizes
        extras = {name: stream_extras(s.pair, s.template) for name, s in self._streams.items()}
        self._schema = samples_schema(corpus.field_names, sizes, extras, bool(corpus.tasks))
        self._cutter = ShardCutter(self._dump.shard_tokens)
        self._pending: list[Chunk] = []
        self._commits: list[CommitRecord] = []
        self._num_samples = 0
        self._num_rows = 0
        self._num_tokens = dict.fromkeys(sizes, 0)
        self._longest = dict.fromkeys(sizes, 0)
        self._dropped = {"empty": 0, "no_tokens": 0, "too_long": 0}
        self._corpus_digest = CorpusDigest()
        self._stream_digests = {
            name: StreamDigest(tokenizers[stream.tokenizer].digest)
            for name, stream in self._streams.items()
        }

    def run(
        self,
        num_rows: int,
        stopping: Stopping,
        only: np.ndarray | None = None,
        processes: int = 1,
    ) -> Manifest:
        """Read, tokenise and write everything; the samples are claimed.

        Args:
            num_rows: rows of the corpus, for the progress bar.
            stopping: asked after every batch of rows.
            only: numbers of the rows to take, ascending; all without it.
            processes: that tokenise a large corpus.

        Raises:
            CorpusError: the corpus is wrong, or no sample is left of it.
            IdentityError: an interrupted dump wrote other samples here.
            StoppedError: the process was asked to stop.
        """
        read = read_corpus(self._corpus)
        taken = read if only is None else (batch.only(only) for batch in read)
        processes = processes if num_rows >= FEW_ROWS and only is None else 1
        with (
            progress(num_rows, "tokenise", "row") as bar,
            closing(encoded(taken, self._streams, self._tokenizers, processes)) as batches,
        ):
            for batch, streams in batches:
                self.take(self._fitting(batch, streams), batch.num_read, {"empty": batch.dropped})
                bar.update(batch.num_read)
                stopping.check()
        return self.finish()

    def take(self, chunk: Chunk, num_rows: int, dropped: Mapping[str, int]) -> None:
        """Take in samples, in the order of their rows; write every shard that they fill.

        Args:
            chunk: the samples, perhaps none.
            num_rows: rows that were read for them.
            dropped: reason to how many of these are none of the samples.
        """
        self._add(chunk)
        self._num_rows += num_rows
        for reason, count in dropped.items():
            self._dropped[reason] += count

    def finish(self) -> Manifest:
        """Write the last shard, commit all, and write the manifest.

        Raises:
            CorpusError: no sample was taken.
            IdentityError: an interrupted dump wrote other samples here.
        """
        if self._pending:
            self._write_shard()
        if not self._commits:
            raise CorpusError(
                f"no sample is left of {self._num_rows} rows; dropped: {self._dropped}"
            )
        self._refuse_more()
        for commit in self._commits:
            self._writer.commit(commit)
        return self._writer.write_manifest(self._manifest())

    def _refuse_more(self) -> None:
        """An interrupted dump of a longer corpus may have committed more shards."""
        more = self._writer.committed(SAMPLES) - set(range(len(self._commits)))
        if more:
            raise IdentityError(
                f"{self._writer.path}: an interrupted dump committed samples shard {max(more)}, "
                f"this corpus has {len(self._commits)} shards: use the corpus it was begun "
                "with, or choose another output"
            )

    def _fitting(self, batch: RowBatch, streams: dict[str, Ragged]) -> Chunk:
        """One batch of rows as samples, the rule for lengths applied."""
        for name, stream in streams.items():
            self._require_tokens(name, batch, stream)
        keep = np.ones(len(batch.rows), dtype=bool)
        for name, stream in streams.items():
            keep &= self._short_enough(name, batch, stream.lengths)
        self._dropped["too_long"] += int((~keep).sum())
        empty = np.any([stream.lengths == 0 for stream in streams.values()], axis=0) & keep
        self._dropped["no_tokens"] += int(empty.sum())
        keep &= ~empty
        fields = batch.fields
        if not keep.all():
            kept = np.flatnonzero(keep)
            streams = {name: stream.take(kept) for name, stream in streams.items()}
            fields = {name: [texts[i] for i in kept] for name, texts in fields.items()}
        ids = sample_ids_of(fields, batch.task, self._corpus.label)
        rows = batch.rows[keep]
        return Chunk(ids, rows, fields, streams, [batch.task] * len(rows))

    def _require_tokens(self, name: str, batch: RowBatch, stream: Ragged) -> None:
        """A task without a stream's field has its special tokens there, or would be dropped."""
        field = self._streams[name].field
        if field not in self._corpus.parts[batch.task].fields and not stream.lengths.all():
            raise CorpusError(
                f"task {batch.task!r} has no field {field!r}, so stream {name!r} would have no "
                "tokens there, and every sample needs one; give the task that field, or leave out "
                "the stream"
            )

    def _short_enough(self, name: str, batch: RowBatch, lengths: np.ndarray) -> np.ndarray:
        """[R] bool, which samples of a stream are within the limit."""
        if self._max_tokens is None:
            return np.ones(len(lengths), dtype=bool)
        fits: np.ndarray = lengths <= self._max_tokens
        if self._dump.too_long == "error" and not fits.all():
            first = int(np.flatnonzero(~fits)[0])
            raise CorpusError(
                f"{batch.place(first)}: stream {name!r} has {lengths[first]} tokens, at "
                f"most {self._max_tokens} are taken; shorten it, or set dump.too_long to drop"
            )
        return fits

    def _add(self, chunk: Chunk) -> None:
        """Take in samples; write every shard that they fill."""
        begin = 0
        for cut in self._cutter.cut(chunk.token_counts()):
            self._pending.append(chunk.part(begin, cut))
            self._write_shard()
            begin = cut
        self._pending.append(chunk.part(begin, len(chunk)))

    def _write_shard(self) -> None:
        """Write the pending samples as one shard."""
        chunks = [chunk for chunk in self._pending if len(chunk)]
        self._pending = []
        if not chunks:
            return
        ids = np.concatenate([chunk.sample_ids for chunk in chunks])
        rows = np.concatenate([chunk.rows for chunk in chunks])
        fields = {
            name: [text for chunk in chunks for text in chunk.fields[name]]
            for name in chunks[0].fields
        }
        streams, entries = {}, {}
        self._corpus_digest.update(ids, rows)
        for name, vocab_size in self._vocab_sizes.items():
            tokens = concat([chunk.streams[name].part(0, len(chunk)) for chunk in chunks])
            beside = extra_fields(tokens.fields)
            stored = {**split_ids(tokens.fields["id"], vocab_size), **beside}
            streams[name] = Ragged(tokens.offsets, stored)
            entries[STREAM_PREFIX + name] = int(tokens.offsets[-1])
            self._num_tokens[name] += int(tokens.offsets[-1])
            self._longest[name] = max(self._longest[name], int(tokens.lengths.max()))
            self._stream_digests[name].update(tokens.lengths, tokens.fields["id"], beside)
        start, shard = self._num_samples, len(self._commits)
        if shard == MAX_SHARDS:
            raise CorpusError(f"over {MAX_SHARDS} shards, no cache has so many: raise shard_tokens")
        stop = start + len(rows)
        tasks = [task for chunk in chunks for task in chunk.tasks]
        batch = samples_batch(self._schema, ids, rows, fields, streams, tasks)
        part = self._writer.write_part(SAMPLES, shard, 0, start, stop, batch)
        self._commits.append(
            CommitRecord(
                signal=SAMPLES,
                shard=shard,
                start=start,
                stop=stop,
                tokens=sum(entries.values()),
                entries=entries,
                parts=[part],
            )
        )
        self._num_samples = stop

    def _manifest(self) -> Manifest:
        """The record that makes the cache one."""
        return Manifest(
            corpus=CorpusRecord(
                digest=self._corpus_digest.hexdigest(),
                num_samples=self._num_samples,
                num_rows=self._num_rows,
                dropped=self._dropped,
                fields=self._corpus.field_names,
                tasks=list(self._corpus.tasks),
                label=self._corpus.label,
            ),
            tokenizers={
                name: TokenizerRecord(
                    digest=tokenizer.digest,
                    vocab_size=tokenizer.vocab_size,
                    **tokenizer.special_ids,
                    mask_id=tokenizer.mask_id,
                    special_ids=sorted(tokenizer.special_ids_all),
                    files=self._writer.put_tokenizer(name, tokenizer.files()),
                )
                for name, tokenizer in self._tokenizers.items()
            },
            streams={
                name: StreamRecord(
                    field=stream.field,
                    pair=stream.pair,
                    template=stream.template,
                    tokenizer=stream.tokenizer,
                    target=stream.target,
                    digest=self._stream_digests[name].hexdigest(),
                    vocab_size=self._vocab_sizes[name],
                    num_tokens=self._num_tokens[name],
                    longest=self._longest[name],
                )
                for name, stream in self._streams.items()
            },
            shard_tokens=self._dump.shard_tokens,
            shards=[
                ShardRecord(start=commit.start, stop=commit.stop, tokens=commit.tokens)
                for commit in self._commits
            ],
            recipe=manifest_recipe(self._recipe, self._max_tokens),
            versions=library_versions(),
        )


def check_copies(
    corpus: CorpusSection, streams: Mapping[str, StreamSection], tokenizers: Mapping[str, Tokenizer]
) -> None:
    """Refuse masked copies of text whose tokenizer takes the mask for something else.

    Args:
        corpus: the recipe's.
        streams: the recipe's.
        tokenizers: by name; streams of others are not looked at.

    Raises:
        ModelError: the mask is not its mask token, or the text is of messages.
    """
    if corpus.augment is None:
        return
    masked = {name for task in corpus.parts for name in corpus.masked_fields(task)}
    for name, stream in streams.items():
        tokenizer = tokenizers.get(stream.tokenizer)
        if tokenizer is None or not masked & {stream.field, stream.pair}:
            continue
        where, mask = f"corpus.augment: stream {name!r}", corpus.augment.mask
        if stream.template == "chat":
            raise ModelError(
                f"{where} is of messages, whose words cannot be masked; leave field "
                f"{stream.field!r} out of augment.fields"
            )
        own = "none" if tokenizer.mask_id is None else repr(tokenizer.tokens()[tokenizer.mask_id])
        if (
            tokenizer.mask_id is None
            or tokenizer.encode([mask], stream.target)[0].count(tokenizer.mask_id) != 1
        ):
            raise ModelError(
                f"{where}: augment.mask is {mask!r}, the mask token of its tokenizer "
                f"({tokenizer.path}) is {own}; give that one, or a tokenizer that has one"
            )


def check_templates(
    streams: Mapping[str, StreamSection], tokenizers: Mapping[str, Tokenizer]
) -> None:
    """Refuse a stream of messages whose tokenizer cannot encode them.

    Args:
        streams: the recipe's.
        tokenizers: by name, those that exist before the corpus is read.

    Raises:
        ModelError: it has no chat template, or is trained on the corpus and will have none.
    """
    for name, stream in streams.items():
        if stream.template != "chat":
            continue
        if stream.tokenizer not in tokenizers:
            raise ModelError(
                f"dump.streams.{name}: tokenizer {stream.tokenizer!r} is trained on the corpus and "
                "has no chat template; name one that has"
            )
        _ = tokenizers[stream.tokenizer].chat
