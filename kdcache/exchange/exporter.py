"""The whole of `kdcache export`: a cache in the form of others, without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from kdcache.compile.measures import fulfilled, has_measure, measure
from kdcache.compile.options import Condition
from kdcache.compile.source import Source
from kdcache.errors import RecipeError
from kdcache.exchange.export_parquet import ParquetExport
from kdcache.exchange.export_text import Choice, TextExport
from kdcache.exchange.export_top_k import check_causal, write_distillkit, write_vllm
from kdcache.exchange.label_rows import FULL_TOP_K
from kdcache.exchange.output_folder import output_folder, written_files
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.signals import BeamsRecord, LogitsRecord, SignalRecord
from kdcache.progress import progress

Format = Literal["parquet", "text", "distillkit", "vllm"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written.

    Attributes:
        format: whose form.
        signals: names of the signals; None: all that the format can hold.
        filters: conditions that a sample must fulfil, all of them, as `compile` has them.
        top_k: most exact entries of a label; None: all, of codec full `FULL_TOP_K`.
        choice: text: which hypotheses become targets.
        n_best: text: hypotheses of each source in an n-best list; None: no list.
        min_score: text: least score of a hypothesis; None: any.
        name: text: stem of the files' names.
        suffixes: text: of the source's file and of the target's.
        zipped: text: compress the files.
        bleu_tokenizer: sacrebleu's, where BLEU is asked for.
    """

    format: Format
    signals: Sequence[str] | None = None
    filters: Sequence[Condition] = ()
    top_k: int | None = None
    choice: Choice = "best"
    n_best: int | None = None
    min_score: float | None = None
    name: str = "train"
    suffixes: tuple[str, str] = ("src", "tgt")
    zipped: bool = False
    bleu_tokenizer: str = "13a"


def export_cache(path: str | Path, out: str | Path, options: ExportOptions) -> dict[str, Any]:
    """Write a cache's samples and labels in the form of others.

    Args:
        path: directory or URL of a finished cache.
        out: a new folder; it is there when it is whole.
        options: what is written.

    Returns:
        cache, format, out, samples (of the cache), filtered (left out by filters), written (rows,
        lines or pairs), signals, other_signals (that the format cannot hold), files, bytes, and for
        text mended, empty, low_score and without_hypotheses.

    Raises:
        RecipeError: the cache has no such signal, or the format cannot hold it.
        FormatError: the cache is unfinished or damaged.
        StorageError: the output is there already.
    """
    cache = open_cache(path)
    cache.require_complete(SAMPLES)
    records, others = _signals(cache, options)
    kept = _kept(cache, options)
    with (
        output_folder(out) as folder,
        progress(cache.num_samples, options.format, "sample") as bar,
    ):
        written, more = _write(cache, records, options, folder, kept, bar)
    files = written_files(out)
    return {
        "cache": str(path),
        "format": options.format,
        "out": str(out),
        "samples": cache.num_samples,
        "filtered": int((~kept).sum()),
        "written": written,
        **more,
        "signals": [record.name for record in records],
        "other_signals": others,
        "files": [file["name"] for file in files],
        "bytes": sum(int(str(file["bytes"])) for file in files),
    }


def _write(
    cache: Cache,
    records: Sequence[SignalRecord],
    options: ExportOptions,
    folder: Path,
    kept: np.ndarray,
    bar: tqdm[Any],
) -> tuple[int, dict[str, int]]:
    """Write the files; how many rows, lines or pairs, and what was counted besides."""
    if options.format == "parquet":
        logits = [record for record in records if isinstance(record, LogitsRecord)]
        beams = [record for record in records if isinstance(record, BeamsRecord)]
        return ParquetExport(cache, logits, beams, options.top_k).run(folder, kept, bar), {}
    [record] = records
    if isinstance(record, BeamsRecord):
        chosen = options.choice, options.n_best, options.min_score, options.bleu_tokenizer
        text = TextExport(cache, record, *chosen)
        written = text.run(folder, options.name, options.suffixes, options.zipped, kept, bar)
        counts = {"mended": text.mended, "empty": text.empty, "low_score": text.low}
        return written, counts | {"without_hypotheses": text.none}
    assert isinstance(record, LogitsRecord), "signals were chosen by kind"
    if options.format == "vllm":
        return write_vllm(cache, record, options.top_k, folder, kept, bar), {}
    most = record.codec.max_exact(record.vocab_size)
    usual = FULL_TOP_K if record.codec.name == "full" else most
    k = min(most, options.top_k or usual)
    return write_distillkit(cache, record, k, folder, kept, bar), {}


def _signals(cache: Cache, options: ExportOptions) -> tuple[list[SignalRecord], list[str]]:
    """Records of the signals that are written, and names of those that are not."""
    fitting = [name for name, record in cache.signals.items() if _fits(record, options.format)]
    chosen = fitting if options.signals is None else list(options.signals)
    for name in chosen:
        record = cache.signal(name)
        if name not in fitting:
            raise RecipeError(
                f"{cache.path}: signal {name!r} is of kind {record.kind}, which {options.format} "
                f"cannot hold; those that it can are {fitting}"
            )
    if options.format != "parquet" and len(chosen) != 1:
        kind = "hypotheses (kind beams)" if options.format == "text" else "soft labels"
        found = f"there are {chosen}: name one" if chosen else "it has none: dump one"
        how = " with --signals" if chosen else ""
        raise RecipeError(
            f"{cache.path}: {options.format} is made of one signal of {kind}, and {found}{how}"
        )
    for name in chosen:
        cache.require_complete(name)
        record = cache.signal(name)
        if options.format in ("distillkit", "vllm"):
            assert isinstance(record, LogitsRecord), "it was found to fit"
            check_causal(cache, record)
    others = sorted(set(cache.signals) - set(chosen))
    return [cache.signal(name) for name in chosen], others


def _fits(record: SignalRecord, wanted: Format) -> bool:
    """Whether a format can hold a signal: labels of the stream's own tokens, and hypotheses."""
    if isinstance(record, LogitsRecord):
        return wanted != "text" and not record.inputs
    return isinstance(record, BeamsRecord) and wanted in ("parquet", "text")


def _kept(cache: Cache, options: ExportOptions) -> np.ndarray:
    """[M] bool, which samples fulfil the filters."""
    source = Source(cache, 0)
    kept = np.ones(cache.num_samples, dtype=bool)
    for condition in options.filters:
        if not has_measure(source, condition):
            known = sorted([*cache.manifest.streams, *cache.signals])
            raise RecipeError(
                f"filter '{condition}': {cache.path} has no {condition.name!r}; it has {known}"
            )
        values = measure(source, condition, kept, options.bleu_tokenizer)
        kept &= fulfilled(condition, values)
    if not kept.any():
        raise RecipeError("the filters leave no sample; loosen them")
    return kept
