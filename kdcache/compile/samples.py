"""Stage one of a compilation: the samples of the output, shard by shard, then its manifest.

# R samples of a shard
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from kdcache.compile.gathering import Gatherer
from kdcache.compile.hypotheses import Texts
from kdcache.compile.planning import Plan
from kdcache.compile.source import Source
from kdcache.errors import IdentityError
from kdcache.formats.cache import Cache
from kdcache.formats.identity import CorpusDigest, StreamDigest, sample_id
from kdcache.formats.manifest import (
    SAMPLES,
    CommitRecord,
    CorpusRecord,
    Lineage,
    Manifest,
    ShardRecord,
    StreamRecord,
    TokenizerRecord,
)
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import (
    STREAM_PREFIX,
    extra_fields,
    join_ids,
    samples_batch,
    samples_schema,
    split_ids,
    stream_extras,
)
from kdcache.formats.writer import CacheWriter


class SamplesOutput:
    """Writes the samples of a plan, and the manifest when all are committed."""

    def __init__(
        self, writer: CacheWriter, sources: Sequence[Source], plan: Plan, beams: Sequence[int]
    ) -> None:
        """Set up an empty output.

        Args:
            writer: of the output; the samples are claimed.
            sources: the caches.
            plan: which samples, in which shards.
            beams: caches that have the hypotheses of the plan's targets.
        """
        self._writer, self._sources, self._plan, self._beams = writer, sources, plan, beams
        first = sources[0].cache
        self._first: Cache = first
        self._records = {name: first.manifest.streams[name] for name in plan.streams}
        sizes = {name: stream.vocab_size for name, stream in self._records.items()}
        extras = {n: stream_extras(s.pair, s.template) for n, s in self._records.items()}
        corpus = first.manifest.corpus
        self._schema = samples_schema(corpus.fields, sizes, extras, bool(corpus.tasks))
        self._texts = None if plan.replaced is None else Texts(first, plan.replaced)
        self._commits: list[CommitRecord] = []
        self._corpus = CorpusDigest()
        self._digests = {
            name: StreamDigest(first.tokenizer(stream.tokenizer).digest)
            for name, stream in self._records.items()
        }
        self._num_tokens = dict.fromkeys(plan.streams, 0)
        self._longest = dict.fromkeys(plan.streams, 0)

    def run(self, lineage: Lineage, bar: tqdm[Any]) -> Manifest:
        """Write and commit every shard, then the manifest.

        Shards that are committed are made again, to be compared and for the digests.

        Args:
            lineage: of the output.
            bar: advanced by the samples.

        Raises:
            IdentityError: another compilation was begun here.
            StorageError: the store refused.
        """
        self._refuse_more()
        for shard, (start, stop) in enumerate(self._plan.shards):
            self._write(shard, start, stop)
            bar.update(stop - start)
        return self._writer.write_manifest(self._manifest(lineage))

    def _refuse_more(self) -> None:
        """An interrupted compilation of more samples may have committed more shards."""
        more = self._writer.committed(SAMPLES) - set(range(len(self._plan.shards)))
        if more:
            raise IdentityError(
                f"{self._writer.path}: samples shard {max(more)} is committed there, this "
                f"compilation has {len(self._plan.shards)} shards: give the caches and options it "
                "was begun with, or choose another output"
            )

    def _write(self, shard: int, start: int, stop: int) -> None:
        """Gather, write and commit one shard."""
        plan = self._plan
        chosen = None if plan.chosen is None else plan.chosen[start:stop]
        gatherer = Gatherer(self._sources, plan.where[:, start:stop], chosen)
        corpus = self._first.manifest.corpus
        fields = {name: gatherer.texts(name) for name in corpus.fields}
        tasks = gatherer.tasks() if corpus.tasks else None
        rows = np.arange(start, stop, dtype=np.int64)
        streams, entries = {}, {}
        for name in plan.streams:
            if name == plan.replaced:
                streams[name] = self._hypotheses(gatherer, fields)
            else:
                streams[name] = gatherer.stream(name)
            self._count(name, streams[name])
            entries[STREAM_PREFIX + name] = int(streams[name].offsets[-1])
        ids = gatherer.ids() if plan.replaced is None else self._ids(fields, tasks)
        self._corpus.update(ids, rows)
        batch = samples_batch(self._schema, ids, rows, fields, streams, tasks)
        part = self._writer.write_part(SAMPLES, shard, 0, start, stop, batch)
        record = CommitRecord(
            signal=SAMPLES,
            shard=shard,
            start=start,
            stop=stop,
            tokens=sum(entries.values()),
            entries=entries,
            parts=[part],
        )
        self._commits.append(self._writer.commit(record))

    def _hypotheses(self, gatherer: Gatherer, fields: dict[str, list[str]]) -> Ragged:
        """Tokens of the chosen hypotheses; their texts replace those of the target's field."""
        plan = self._plan
        assert plan.targets is not None
        assert plan.replaced is not None
        assert self._texts is not None
        tokens = gatherer.hypotheses(plan.targets.beams, self._beams)
        record = self._records[plan.replaced]
        fields[record.field] = self._texts.decode(tokens)
        return Ragged(tokens.offsets, split_ids(tokens.fields["id"], record.vocab_size))

    def _ids(self, fields: dict[str, list[str]], tasks: list[str] | None) -> np.ndarray:
        """[R, 16] uint8 ids of samples whose texts are not those of the caches."""
        label = self._first.manifest.corpus.label
        size = len(next(iter(fields.values())))
        golds = fields[label] if label else [""] * size
        rows = zip(zip(*fields.values(), strict=True), tasks or [""] * size, golds, strict=True)
        packed = b"".join(sample_id(texts, task, gold) for texts, task, gold in rows)
        return np.frombuffer(packed, dtype=np.uint8).reshape(-1, 16)

    def _count(self, name: str, stream: Ragged) -> None:
        """Take the tokens of a shard into what the manifest says of a stream."""
        self._num_tokens[name] += int(stream.offsets[-1])
        self._longest[name] = max(self._longest[name], int(stream.lengths.max()))
        ids = join_ids(stream.fields)
        self._digests[name].update(stream.lengths, ids, extra_fields(stream.fields))

    def _manifest(self, lineage: Lineage) -> Manifest:
        """The record that makes the output a cache."""
        first, plan = self._first.manifest, self._plan
        tasks = [task for source in self._sources for task in source.cache.manifest.corpus.tasks]
        streams: dict[str, StreamRecord] = {
            name: record.model_copy(
                update={
                    "digest": self._digests[name].hexdigest(),
                    "num_tokens": self._num_tokens[name],
                    "longest": self._longest[name],
                }
            )
            for name, record in self._records.items()
        }
        return Manifest(
            corpus=CorpusRecord(
                digest=self._corpus.hexdigest(),
                num_samples=plan.num_samples,
                num_rows=plan.num_samples,
                dropped={},
                fields=first.corpus.fields,
                tasks=list(dict.fromkeys(tasks)),
                label=first.corpus.label,
            ),
            tokenizers={
                name: self._tokenizer(name)
                for name in sorted({stream.tokenizer for stream in streams.values()})
            },
            streams=streams,
            shard_tokens=plan.shard_tokens,
            shards=[
                ShardRecord(start=commit.start, stop=commit.stop, tokens=commit.tokens)
                for commit in self._commits
            ],
            recipe=first.recipe,
            versions=first.versions,
            lineage=lineage,
        )

    def _tokenizer(self, name: str) -> TokenizerRecord:
        """A tokenizer of the first cache, its files copied."""
        record, folder = self._first.tokenizer(name), self._first.tokenizer_dir(name)
        prefix = f"tokenizers/{name}/"
        files = {}
        for file in record.files:
            inner = file.path.removeprefix(prefix)
            files[inner] = (folder / inner).read_bytes()
        return record.model_copy(update={"files": self._writer.put_tokenizer(name, files)})
