"""The manifest and the commits of a cache: what each record holds, and where it lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from kdcache.errors import FormatError
from kdcache.formats.record import Record

#: Largest vocabulary that an id of two plus one bytes can name.
MAX_VOCAB_SIZE = 1 << 24

#: Most shards of a cache, so that a reader takes no memory for what is hostile.
MAX_SHARDS = 250_000

FORMAT_VERSION = 1
MIN_READER_VERSION = 1

MANIFEST_NAME = "kdcache.json"
SAMPLES = "samples"
#: Top-level names of a cache that no signal may take.
RESERVED = frozenset({SAMPLES, "commits", "signals", "tokenizers"})

_PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def inside(path: str) -> str:
    """A relative path that cannot leave the cache.

    Raises:
        ValueError: it could.
    """
    if len(path) > 255 or not all(_PATH_PART.fullmatch(part) for part in path.split("/")):
        raise ValueError(f"path {path[:80]!r} is not one that stays inside the cache")
    return path


def _signal_name(name: str) -> str:
    if name in RESERVED:
        raise ValueError(f"{name!r} is a name of the format and cannot name a signal")
    return name


Count = Annotated[int, Field(ge=0, lt=1 << 62)]
VocabSize = Annotated[int, Field(ge=1, le=MAX_VOCAB_SIZE)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
SignalName = Annotated[Name, AfterValidator(_signal_name)]
CachePath = Annotated[str, AfterValidator(inside)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
Crc32c = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class FileRecord(Record):
    """One file: where it lies, its size and both checksums of its bytes."""

    path: CachePath
    bytes: Count
    crc32c: Crc32c
    xxh3: Xxh3


class TokenizerRecord(Record):
    """One tokenizer and the files of its transformers directory.

    `special_ids` are the ids of all special tokens, ascending: those with a role and those that
    the tokenizer only flags so.
    """

    digest: Digest
    vocab_size: VocabSize
    pad_id: Count | None
    eos_id: Count | None
    bos_id: Count | None
    unk_id: Count | None
    mask_id: Count | None = None
    special_ids: list[Count] = Field(default_factory=list)
    files: list[FileRecord]


class StreamRecord(Record):
    """One stream: the tokens of one raw field, or of a pair of them, under one tokenizer.

    `template` chat: the field holds messages, and the tokens are those of the tokenizer's chat
    template. `digest` is over the tokenizer and every token, see `identity.StreamDigest`;
    `longest` are the tokens of its longest sample.
    """

    field: Name
    pair: Name | None = None
    template: Literal["none", "chat"] = "none"
    tokenizer: Name
    target: bool
    digest: Digest
    vocab_size: VocabSize
    num_tokens: Count
    longest: Count


class _Range(Record):
    """Samples [start, stop)."""

    start: Count
    stop: Count

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.stop <= self.start:
            raise ValueError(f"holds no samples: start {self.start}, stop {self.stop}")
        return self

    @property
    def num_samples(self) -> int:
        """Samples in the range."""
        return self.stop - self.start


class ShardRecord(_Range):
    """One shard: its samples, and their tokens summed over all streams."""

    tokens: Count


def _not_too_many(shards: object) -> object:
    """Before any is looked at."""
    if isinstance(shards, list) and len(shards) > MAX_SHARDS:
        raise ValueError(f"{len(shards)} of them, a cache has at most {MAX_SHARDS}")
    return shards


class CorpusRecord(Record):
    """What was dumped.

    `digest` is over sample ids and rows, see `identity.CorpusDigest`; `num_rows` counts the
    rows read, `dropped` those left out, by reason. `tasks` names the sub-corpora in their order
    (none where there is one corpus), `label` the field that holds a sample's gold label.
    """

    digest: Digest
    num_samples: Count
    num_rows: Count
    dropped: dict[str, Count]
    fields: list[Name]
    tasks: list[Name] = Field(default_factory=list)
    label: Name | None = None


class SourceRecord(Record):
    """A cache that another was compiled from, as it stood then.

    `name` says where it lay. `corpus` is its corpus digest, `streams` are those of its streams, and
    `signals` those of the signals that were used, each over its record and commits. `lineage` is
    its own, where it was compiled itself.
    """

    name: str
    corpus: Digest
    num_samples: Count
    streams: dict[Name, Digest]
    signals: dict[SignalName, Digest]
    lineage: Lineage | None = None


class Lineage(Record):
    """How a cache was compiled: what was done, in order, and the caches it was done to."""

    operations: list[dict[str, Any]]
    sources: Annotated[list[SourceRecord], Field(min_length=1)]


class Manifest(Record):
    """kdcache.json: written once, when all samples are committed."""

    format_version: int = FORMAT_VERSION
    min_reader_version: int = MIN_READER_VERSION
    corpus: CorpusRecord
    tokenizers: dict[Name, TokenizerRecord]
    streams: dict[Name, StreamRecord]
    shard_tokens: Count
    shards: Annotated[list[ShardRecord], BeforeValidator(_not_too_many)]
    recipe: dict[str, Any]
    versions: dict[str, str]
    lineage: Lineage | None = None

    @classmethod
    def check_version(cls, tree: dict[str, Any], where: str) -> None:
        """Refuse what a newer kdcache wrote."""
        version, needed = tree.get("format_version"), tree.get("min_reader_version")
        if type(version) is not int or type(needed) is not int or needed > FORMAT_VERSION:
            raise FormatError(
                f"{where}: format version {version!r}, for readers of version {needed!r} on; this "
                f"kdcache reads version {FORMAT_VERSION}: use the kdcache that made it"
            )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _contiguous("shards", self.shards, 0, self.corpus.num_samples)
        for key, names in (("fields", self.corpus.fields), ("tasks", self.corpus.tasks)):
            if len(set(names)) != len(names):
                raise ValueError(f"corpus.{key} repeats a name: {names}")
        if self.corpus.label not in (None, *self.corpus.fields):
            raise ValueError(f"corpus.label: no field {self.corpus.label!r} in the corpus")
        for name, stream in self.streams.items():
            for field in (stream.field, stream.pair):
                if field not in (None, *self.corpus.fields):
                    raise ValueError(f"streams.{name}: no field {field!r} in the corpus")
            if stream.tokenizer not in self.tokenizers:
                raise ValueError(f"streams.{name}: no tokenizer {stream.tokenizer!r}")
        for name, tokenizer in self.tokenizers.items():
            for file in tokenizer.files:
                if not file.path.startswith(f"tokenizers/{name}/"):
                    raise ValueError(f"tokenizers.{name}: {file.path} lies elsewhere")
        return self


class PartRecord(_Range):
    """One part of a shard: its files, and its samples counted over the whole corpus.

    An Arrow part is one file; a Zarr part is a directory, all its files listed in order of path.
    """

    files: Annotated[list[FileRecord], Field(min_length=1)]


class CommitRecord(_Range):
    """commits/SIGNAL.SHARD.json: what makes one signal's shard real.

    `tokens` counts what the signal describes, one by one (see `units.label_counts`; the tokens
    of all streams for `samples`), and `entries` the records of every column. `inputs` are the
    signals it was made from (masks, hypotheses) and the digest of their commit of this shard.
    `record` is the digest of the signal's record, which says how its bytes are read; the samples
    have none.
    """

    signal: Name
    shard: Count
    tokens: Count
    entries: dict[str, Count]
    inputs: dict[Name, Digest] = Field(default_factory=dict)
    record: Digest | None = None
    parts: list[PartRecord]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _contiguous("parts", self.parts, self.start, self.stop)
        for number, part in enumerate(self.parts):
            expected = part_path(self.signal, self.shard, number, part.files)
            paths = [file.path for file in part.files]
            if len(paths) == 1 and paths[0] != expected:
                raise ValueError(f"parts.{number}: path {paths[0]}, expected {expected}")
            elsewhere = [path for path in paths if not path.startswith(f"{expected}/")]
            if len(paths) > 1 and elsewhere:
                raise ValueError(f"parts.{number}: path {elsewhere[0]}, expected one in {expected}")
            if paths != sorted(set(paths)):
                raise ValueError(f"parts.{number}: its files are not in order of path")
        return self

    @property
    def digest(self) -> str:
        """32 hex digits over the digests of all files, in order."""
        joined = "".join(file.xxh3 for part in self.parts for file in part.files)
        return xxhash.xxh3_128_hexdigest(joined.encode())


def _contiguous(what: str, ranges: Sequence[_Range], start: int, stop: int) -> None:
    at = start
    for number, item in enumerate(ranges):
        if item.start != at:
            raise ValueError(f"{what}.{number} starts at sample {item.start}, expected {at}")
        at = item.stop
    if at != stop:
        raise ValueError(f"{what} end at sample {at}, expected {stop}")


def part_path(signal: str, shard: int, part: int, files: Sequence[FileRecord]) -> str:
    """Path of a part inside the cache: an Arrow file, or the directory of a Zarr group.

    Args:
        signal: signal name, or "samples".
        shard: shard number.
        part: part number.
        files: its files; of a Zarr group all, in order of path.
    """
    ending = "arrow" if len(files) == 1 else "zarr"
    return f"{signal}/{shard:05d}.{part}-{part_digest(files)}.{ending}"


def part_digest(files: Sequence[FileRecord]) -> str:
    """16 hex digits of a part: those of its only file, or over those of all files in order."""
    if len(files) == 1:
        return files[0].xxh3
    return xxhash.xxh3_64_hexdigest("".join(file.xxh3 for file in files).encode())


def commit_path(signal: str, shard: int) -> str:
    """Path of a commit record inside the cache."""
    return f"commits/{signal}.{shard:05d}.json"


def signal_path(signal: str) -> str:
    """Path of a signal record inside the cache."""
    return f"signals/{signal}.json"
