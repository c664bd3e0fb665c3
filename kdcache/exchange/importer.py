"""The whole of `kdcache import`: another project's dump to a cache, without a teacher."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from kdcache.dump.chunk import Chunk, sample_ids_of
from kdcache.dump.samples import SampleWriter
from kdcache.dump.tokenize import Tokenizer
from kdcache.dump.versions import library_versions
from kdcache.errors import CorpusError, IdentityError, RecipeError
from kdcache.exchange.alignment import Alignment, TokenRow
from kdcache.exchange.axolotl import AxolotlReader
from kdcache.exchange.distillkit import DistillkitReader
from kdcache.exchange.gold_check import GoldCheck
from kdcache.exchange.import_labels import LabelWriter, labelled
from kdcache.exchange.nemo import NemoReader
from kdcache.exchange.peer_rows import Reader
from kdcache.exchange.vllm import VllmReader
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import TopKCodec, Values
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.signals import IMPORTED, LogitsRecord, TeacherRecord
from kdcache.formats.writer import CacheWriter
from kdcache.progress import progress
from kdcache.recipe import CorpusSection, Recipe, parse_recipe

logger = logging.getLogger(__name__)

Format = Literal["distillkit", "vllm", "axolotl", "nemo"]

#: Rows that are looked at before anything is written, and rows that become samples at a time.
_PILOT_ROWS, _CHUNK_ROWS = 64, 256
#: The only stream, and the tokenizer of it.
STREAM, TOKENIZER = "text", "teacher"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How files are read.

    Attributes:
        format: whose they are.
        tokenizer: directory or hub id of the teacher's tokenizer.
        teacher: what the teacher is called; the format's name without it.
        vocab_size: V, ids of the teacher; as many as the tokenizer has without it.
        top_k: most ids of a token that are kept; as many as the first rows have without it.
        values: how a log-prob is stored.
        trust_ids: take the files' ids as they are, whatever the tokenizer makes of the text.
        gold_check: refuse labels that fit their tokens no better than the tokens' neighbours.
        text_field: key or column of the text, where the file has one.
        messages_field: key of the messages (axolotl).
        logprobs_field: key of the log-probs (axolotl).
        compression_config: file that says how DistillKit's bytes are packed.
        max_tokens: longest row that is taken; None: any.
        shard_tokens: most tokens of a shard.
    """

    format: Format
    tokenizer: str
    teacher: str | None = None
    vocab_size: int | None = None
    top_k: int | None = None
    values: Values = "uint8"
    trust_ids: bool = False
    gold_check: bool = True
    text_field: str | None = None
    messages_field: str | None = None
    logprobs_field: str | None = None
    compression_config: str | None = None
    max_tokens: int | None = None
    shard_tokens: int = 1 << 20


def import_files(
    paths: Sequence[str | Path], out: str | Path, options: ImportOptions
) -> dict[str, Any]:
    """Make a cache of files that another project dumped.

    The files are read twice, a row at a time: for the samples, then for the labels. Shards that
    are committed are skipped, so an interrupted import goes on where it was.

    Args:
        paths: of the files, in order.
        out: directory or URL of the new cache.
        options: how they are read.

    Returns:
        cache, format, samples, rows, dropped, tokens, labels, bytes, top_k, vocab_size,
        rows_compared (tokens of which were compared with our tokenizer's), gold (positions, held,
        mean probability of the token and under shifts; known_share of the labels of this run whose
        token has a log-prob of its own), rescaled (labels scaled down to the sum 1), limits,
        shards_written and shards_skipped.

    Raises:
        CorpusError: a file or a row is not of the format.
        IdentityError: tokens are not our tokenizer's, labels are shifted, or the output was begun
            with other files.
        RecipeError: an option cannot be meant.
        ModelError: the tokenizer cannot be loaded.
        StorageError: the store refused.
    """
    check_options(options)
    tokenizer = Tokenizer.load(options.tokenizer)
    ends = tokenizer.special_ids["eos_id"]  # one that is also the pad stays: a text may end so
    pad_id = tokenizer.special_ids["pad_id"]
    reader = reader_of([str(path) for path in paths], options, None if pad_id == ends else pad_id)
    vocab_size = options.vocab_size or tokenizer.vocab_size
    known = min(vocab_size, tokenizer.vocab_size)
    alignment = Alignment(tokenizer, options.trust_ids, known)
    top_k = _pilot(reader, alignment, options, vocab_size)
    with CacheWriter(out) as writer:
        _write_samples(writer, reader, alignment, tokenizer, options)
        cache = open_cache(out)
        _check_standing(cache, tokenizer, options)
        record = _record(cache, reader, [str(path) for path in paths], options, vocab_size, top_k)
        labels = LabelWriter(writer, cache, reader, record, top_k)
        with progress(reader.total, "labels", reader.unit) as bar:
            written = labels.run(bar, options.gold_check)
    return _summary(open_cache(out), reader, alignment, labels, record, options) | written


def check_options(options: ImportOptions) -> None:
    """Refuse options of another format.

    Raises:
        RecipeError: with the option.
    """
    own = {
        "--text": (options.text_field, ("distillkit", "vllm", "nemo")),
        "--messages": (options.messages_field, ("axolotl",)),
        "--logprobs": (options.logprobs_field, ("axolotl",)),
        "--packing": (options.compression_config, ("distillkit",)),
    }
    for name, (value, formats) in own.items():
        if value is not None and options.format not in formats:
            raise RecipeError(
                f"import {options.format}: {name} is of {' and '.join(formats)}; leave it out"
            )


def reader_of(paths: Sequence[str], options: ImportOptions, pad_id: int | None) -> Reader:
    """What reads the files of a format.

    Args:
        paths: of the files.
        options: how they are read.
        pad_id: of the tokenizer; None where that is also the end of a text.

    Raises:
        CorpusError: a file is missing, or is not of the format.
        RecipeError: DistillKit's bytes have no config.
    """
    for path in paths:
        if not Path(path).is_file():
            raise CorpusError(f"{path}: found no such file; name the files that were dumped")
    if options.format == "distillkit":
        config = options.compression_config
        return DistillkitReader(paths, config, options.text_field, pad_id)
    if options.format == "vllm":
        return VllmReader(paths, options.text_field)
    if options.format == "nemo":
        return NemoReader(paths, options.text_field)
    return AxolotlReader(paths, options.messages_field, options.logprobs_field)


def _pilot(reader: Reader, alignment: Alignment, options: ImportOptions, vocab_size: int) -> int:
    """Look at the first rows before anything is written; the most ids that one of them keeps."""
    if options.top_k is not None and options.top_k < 1:
        raise RecipeError(f"import: --top-k is {options.top_k}, expected at least 1")
    check, most = GoldCheck(), 0
    for row in islice(reader.rows(lambda _: None), _PILOT_ROWS):
        found = alignment.tokens(row)
        if len(found.ids) < 2:
            continue
        k = options.top_k or vocab_size
        labels, tokens = labelled(row, found.ids, found.loss, k, vocab_size, reader.lossy)
        check.add(labels, tokens)
        most = max(most, int(labels.counts.max(initial=0)))
    if not most:
        raise CorpusError(
            "the first rows have no labels; expected one for all tokens but the first"
        )
    if options.gold_check:
        check.require("the first rows")
    alignment.compared = 0
    return most


def _recipe(options: ImportOptions, reader: Reader) -> Recipe:
    """What the manifest says of the samples."""
    template = "chat" if reader.has_loss else "none"
    return parse_recipe(
        {
            "name": f"import {options.format}",
            "dump": {
                "tokenizers": {TOKENIZER: {"kind": "pretrained", "path": options.tokenizer}},
                "streams": {STREAM: {"field": STREAM, "template": template}},
                "shard_tokens": options.shard_tokens,
            },
        }
    )


def _write_samples(
    writer: CacheWriter,
    reader: Reader,
    alignment: Alignment,
    tokenizer: Tokenizer,
    options: ImportOptions,
) -> None:
    """Write the samples, or find that they stand."""

    def written() -> bool:
        manifest = writer.reread()
        shards = set() if manifest is None else set(range(len(manifest.shards)))
        return manifest is not None and writer.committed(SAMPLES) >= shards

    claim = None if written() else writer.wait(SAMPLES, until=written)
    try:
        if claim is None or written():
            return
        # Field and file are one: what the samples were read from is said by the signal's record.
        corpus = CorpusSection(fields={STREAM: STREAM})
        recipe = _recipe(options, reader)
        tokenizers = {TOKENIZER: tokenizer}
        samples = SampleWriter(writer, recipe, corpus, tokenizers, options.max_tokens)
        with progress(reader.total, "samples", reader.unit) as bar:
            rows = (alignment.tokens(row) for row in reader.rows(bar.update))
            while some := list(islice(rows, _CHUNK_ROWS)):
                samples.take(*_chunk(some, reader.has_loss, options.max_tokens))
        samples.finish()
    finally:
        if claim is not None:
            writer.release(claim, SAMPLES)


def _chunk(
    rows: list[TokenRow], has_loss: bool, max_tokens: int | None
) -> tuple[Chunk, int, dict[str, int]]:
    """Rows as samples, how many rows they were, and how many of these were left out, and why."""
    long = [max_tokens is not None and len(row.ids) > max_tokens for row in rows]
    kept = [row for row, out in zip(rows, long, strict=True) if len(row.ids) and not out]
    fields = {STREAM: [row.text for row in kept]}
    lengths = np.array([len(row.ids) for row in kept], dtype=np.int64)
    tokens = {"id": np.concatenate([row.ids for row in kept] or [np.empty(0, np.int64)])}
    if has_loss:
        every = [np.ones(len(r.ids), bool) if r.loss is None else r.loss for r in kept]
        tokens["loss"] = np.concatenate(every or [np.empty(0, bool)]).astype(np.uint8)
    chunk = Chunk(
        sample_ids_of(fields, "", None),
        np.array([row.number for row in kept], dtype=np.int64),
        fields,
        {STREAM: Ragged(offsets_of(lengths), tokens)},
        [""] * len(kept),
    )
    return chunk, len(rows), {"too_long": sum(long), "no_tokens": len(rows) - sum(long) - len(kept)}


def _check_standing(cache: Cache, tokenizer: Tokenizer, options: ImportOptions) -> None:
    """What the output was begun with must be what is given."""
    stands = cache.manifest
    if list(stands.streams) != [STREAM] or TOKENIZER not in stands.tokenizers:
        raise IdentityError(
            f"{cache.path}: it holds a cache that was not imported; choose another output"
        )
    digest = stands.tokenizers[TOKENIZER].digest
    if digest != tokenizer.digest:
        raise IdentityError(
            f"{cache.path}: its tokenizer is {digest}, {options.tokenizer} is "
            f"{tokenizer.digest}: name the one it was begun with, or choose another output"
        )


def _record(
    cache: Cache,
    reader: Reader,
    paths: Sequence[str],
    options: ImportOptions,
    vocab_size: int,
    top_k: int,
) -> LogitsRecord:
    """The record of the signal. Its teacher is the files: their digest is its."""
    files = list(_digests(paths))
    joined = "".join(file["xxh3"] for file in files)
    # What is read of the files differently would be other labels.
    reading = f"{options.format} {options.text_field} {options.logprobs_field}"
    return LogitsRecord(
        name="logits",
        stream=STREAM,
        stream_digest=cache.stream(STREAM).digest,
        seed=1,
        teacher=TeacherRecord(
            path=options.teacher or f"imported from {options.format}",
            revision=None,
            digest=xxhash.xxh3_128_hexdigest(joined.encode()),
            config_digest=xxhash.xxh3_128_hexdigest(reading.encode()),
            model_type=options.format,
            kind=IMPORTED,
            dtype="unknown",
        ),
        recipe={
            "import": {
                "format": options.format,
                "files": files,
                "limits": list(reader.limits),
                "gold_check": options.gold_check,
                "trust_ids": options.trust_ids,
            }
        },
        versions=library_versions(),
        at="positions",
        vocab_size=vocab_size,
        codec=TopKCodec(k=top_k, values=options.values),
        temperatures=(1.0,),
    )


def _digests(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Name, size and checksum of every file."""
    sizes = [Path(path).stat().st_size for path in paths]
    with progress(sum(sizes), "checksum", "B") as bar:
        for path, size in zip(paths, sizes, strict=True):
            hasher = xxhash.xxh3_128()
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    hasher.update(block)
                    bar.update(len(block))
            yield {"name": Path(path).name, "bytes": size, "xxh3": hasher.hexdigest()}


def _summary(
    cache: Cache,
    reader: Reader,
    alignment: Alignment,
    labels: LabelWriter,
    record: LogitsRecord,
    options: ImportOptions,
) -> dict[str, Any]:
    """What an import reports."""
    shards = range(cache.num_shards)
    commits = [cache.commit_record(name, n) for name in (SAMPLES, record.name) for n in shards]
    corpus = cache.manifest.corpus
    return {
        "cache": str(cache.path),
        "format": options.format,
        "samples": cache.num_samples,
        "rows": corpus.num_rows,
        "dropped": dict(corpus.dropped),
        "tokens": cache.stream(STREAM).num_tokens,
        "labels": sum(commit.tokens for commit in commits if commit.signal == record.name),
        "bytes": sum(f.bytes for commit in commits for part in commit.parts for f in part.files),
        "top_k": record.codec.max_exact(record.vocab_size),
        "vocab_size": record.vocab_size,
        "rows_compared": alignment.compared,
        "gold": labels.check.summary() | {"known_share": labels.known / max(1, labels.check.num)},
        "rescaled": labels.rescaled,
        "limits": list(reader.limits),
    }
