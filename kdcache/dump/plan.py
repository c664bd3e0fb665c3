"""The whole of `kdcache dump --plan`: a pilot on some hundred samples, and what it foretells.

The pilot is a real dump to a temporary directory, of rows spread evenly over the corpus sorted
by length, so that anything that depends on length is met in its true proportion. Sizes and times
are those of the pilot times rows over its rows; what a file costs whatever it holds is counted by
itself, and dense signals to the byte.
"""

# N positions, B samples of a batch, V vocabulary

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.dump.audit import AuditPlan, encoder_of
from kdcache.dump.batches import Batch, plan_batches
from kdcache.dump.codecs.trial import Trials
from kdcache.dump.runner import dump
from kdcache.dump.shards import shard_inputs
from kdcache.dump.signals.logits import LogitsEncoder
from kdcache.errors import RecipeError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import Codec, FullCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.formats.dense import dense_row_bytes
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.signals import AttentionRecord, HiddenRecord, LogitsRecord
from kdcache.formats.zarr_layout import CHUNK_ROWS
from kdcache.models.loading import resolve_device
from kdcache.progress import progress
from kdcache.recipe import CorpusSection, LogitsSignal, Recipe
from kdcache.text.corpus import read_corpus

#: Rows of a pilot, and most positions that codecs are tried on.
PILOT_ROWS, TRIAL_POSITIONS = 400, 4000
#: Temperatures that noise is told at, beside those that the signal stores.
TEMPERATURES = (1.0, 2.0, 5.0)
#: Denominators of threshold's c that are tried.
CURVE = (4, 8, 12, 16, 24, 32, 48, 64)
#: Noise over |p - t| at temperature 1 that a recommendation without a budget keeps to.
QUIET = 0.2


def plan(
    recipe: Recipe, budget_bytes: float | None = None, rows: int = PILOT_ROWS
) -> dict[str, Any]:
    """Dump a pilot, and say what the whole will cost and which codec fits.

    Args:
        recipe: as for `dump`.
        budget_bytes: the cache may have; None for no limit.
        rows: of the pilot.

    Returns:
        rows, pilot (samples, tokens, seconds), tokens (per stream), shards, device, bytes
        (samples, each signal, total), hours (each signal, total), codec (signal to the name of the
        recipe's own), codecs (signal to name of codec
        to what `Trial.result` says, with `bytes` of the whole signal) and recommendation (text,
        overrides, bytes, fits).

    Raises:
        KDCacheError: what `dump` raises.
    """
    recipe.single()
    if recipe.corpus is None:
        raise RecipeError("a dump needs a corpus: set corpus.fields (and corpus.format)")
    lengths, numbers, num_rows = _row_lengths(recipe.corpus)
    chosen = pilot_rows(lengths, numbers, rows)
    with tempfile.TemporaryDirectory(prefix="kdcache-plan-") as folder:
        summary = dump(recipe, Path(folder) / "pilot", only=chosen)
        cache = open_cache(Path(folder) / "pilot")
        factor = len(numbers) / len(chosen)
        tokens = {name: round(n * factor) for name, n in summary["tokens"].items()}
        shards = max(1, math.ceil(sum(tokens.values()) / recipe.dump.shard_tokens))
        sizes = {SAMPLES: _foretold(cache, SAMPLES, factor, shards)}
        sizes |= {name: _foretold(cache, name, factor, shards) for name in recipe.dump.signals}
        seconds = {name: s["seconds"] * factor for name, s in summary["signals"].items()}
        seconds[SAMPLES] = summary["seconds"]["tokenise"] * factor
        codecs = _codecs(recipe, cache, factor)
    used = [recipe.dump.teacher_of(name) for name in recipe.dump.signals]
    devices = {str(resolve_device(teacher.device)) for teacher in used if teacher is not None}
    result = {
        "rows": num_rows,
        "pilot": {
            "samples": summary["samples"],
            "tokens": summary["tokens"],
            "seconds": summary["seconds"]["total"],
        },
        "tokens": tokens,
        "shards": shards,
        "device": ", ".join(sorted(devices)) or "none",
        "bytes": {**sizes, "total": sum(sizes.values())},
        "hours": {
            name: s / 3600 for name, s in {**seconds, "total": sum(seconds.values())}.items()
        },
        "codec": {
            name: _family(signal.codec)
            for name, signal in recipe.dump.signals.items()
            if isinstance(signal, LogitsSignal)
        },
        "codecs": codecs,
    }
    result["recommendation"] = recommend(result, budget_bytes)
    return result


def _row_lengths(corpus: CorpusSection) -> tuple[np.ndarray, np.ndarray, int]:
    """Letters and number of every row that is not left out, and how many rows there are."""
    lengths, numbers, num_rows = [], [], 0
    with progress(None, "read", "row") as bar:
        for batch in read_corpus(corpus):
            texts = zip(*batch.fields.values(), strict=True)
            lengths.append(np.fromiter((sum(map(len, row)) for row in texts), dtype=np.int64))
            numbers.append(batch.rows)
            num_rows += batch.num_read
            bar.update(batch.num_read)
    return np.concatenate(lengths), np.concatenate(numbers), num_rows


def pilot_rows(lengths: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray:
    """Row numbers spread evenly over the rows sorted by length, ascending.

    Args:
        lengths: [R] letters of each row.
        numbers: [R] row numbers.
        count: how many; all rows where there are fewer.
    """
    order = np.lexsort((numbers, lengths))
    places = (
        (np.arange(min(count, len(order))) + 0.5) * len(order) / min(count, len(order))
    ).astype(np.int64)
    return np.sort(numbers[order[places]])


def _foretold(cache: Cache, name: str, factor: float, shards: int) -> int:
    """Bytes of the data files of a signal over the whole corpus."""
    commits = [cache.commit_record(name, shard) for shard in sorted(cache.committed(name))]
    found = sum(file.bytes for commit in commits for part in commit.parts for file in part.files)
    if name != SAMPLES:
        record = cache.signal(name)
        if isinstance(record, HiddenRecord | AttentionRecord):
            rows = sum(commit.tokens for commit in commits) * factor
            if isinstance(record, HiddenRecord) and record.pool != "none":
                # So many rows a sample: it is known how far the last chunk is filled up.
                rows = shards * math.ceil(rows / shards / CHUNK_ROWS) * CHUNK_ROWS
            else:
                rows += shards * CHUNK_ROWS / 2
            return round(rows * dense_row_bytes(record))
    schema = cache.samples_schema if name == SAMPLES else cache.signal_schema(name)
    fixed = _empty_file_bytes(schema)
    parts = sum(len(commit.parts) for commit in commits)
    return round((found - fixed * parts) * factor + fixed * shards)


def _empty_file_bytes(schema: pa.Schema) -> int:
    """What an Arrow file takes that holds nothing."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
    return len(sink.getvalue())


def candidates(codec: Codec) -> dict[str, Codec]:
    """Name to the codecs that are tried beside a recipe's own."""
    found: dict[str, Codec] = {f"threshold 1/{k}": ThresholdCodec(c=1 / k) for k in CURVE}
    found |= {f"topk {k}": TopKCodec(k=k) for k in (8, 12, 32)}
    found |= {"sampled 50": SampledCodec(n=50)}
    if codec not in found.values():
        found["the recipe's"] = codec
    return found


def _codecs(recipe: Recipe, cache: Cache, factor: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Every codec tried on every logits signal of the pilot."""
    results = {}
    loaded: dict[Any, Any] = {}
    for name in recipe.dump.signals:
        record = cache.signal(name)
        if not isinstance(record, LogitsRecord):
            continue
        encoder = encoder_of(cache, record, AuditPlan(), loaded)
        assert isinstance(encoder, LogitsEncoder), "made of a record of logits"
        trials = Trials(tuple(sorted({*TEMPERATURES, 1.0})))
        codecs = {
            label: (codec, record.temperatures) for label, codec in candidates(record.codec).items()
        }
        total = sum(cache.commit_record(name, n).tokens for n in range(cache.num_shards))
        with progress(min(total, TRIAL_POSITIONS), f"codecs ({name})", "position") as bar:
            for shard in range(cache.num_shards):
                before = trials.positions
                if before >= TRIAL_POSITIONS:
                    break
                _try_shard(cache, encoder, shard, trials, codecs)
                bar.update(trials.positions - before)
        positions = total * factor
        found = trials.result()
        if not isinstance(record.codec, FullCodec):
            # Nothing to measure: a byte an id, and what rounding to 8 bits costs.
            size = float(record.vocab_size + 2)
            found["full"] = {"bytes_per_token": size, "label_bytes_per_token": size - 2}
        for row in found.values():
            row["bytes"] = round(row["bytes_per_token"] * positions)
        results[name] = found
    return results


def _try_shard(
    cache: Cache,
    encoder: LogitsEncoder,
    shard: int,
    trials: Trials,
    codecs: dict[str, tuple[Codec, tuple[float, ...]]],
) -> None:
    """Codecs on the positions of one shard, evenly picked where there are too many."""
    record, teacher = encoder.record, encoder.teacher
    items = encoder.items(cache.samples(shard), shard_inputs(cache, record, shard))
    assert items.labels is not None, "items of logits have labels"
    step = max(1, math.ceil(int(items.labels.offsets[-1]) / TRIAL_POSITIONS))
    rows = np.arange(0, len(items), step)
    wide, high = encoder.plan_lengths(items)
    for batch in plan_batches(wide[rows], high[rows], 2048):
        at, index = items.labelled(rows[batch], teacher.device)
        if not len(index):
            continue
        padded = items.batch(rows[batch], teacher.pad_id, teacher.device)
        gold = at.new_tensor(items.labels.fields["gold"][index]).to(dtype=padded.ids.dtype)
        trials.add(codecs, teacher.logits(padded, at), teacher.logits(corrupted(padded), at), gold)


def corrupted(batch: Batch) -> Batch:
    """The same batch for a stand-in student: every third token that it may read is another.

    The encoder's tokens where there is an encoder, else the stream's own.
    """
    ids = batch.ids if batch.source_ids is None else batch.source_ids
    other = ids.clone()
    other[:, 1::3] = ids.roll(1, dims=0)[:, 1::3]
    if len(ids) == 1:
        other[:, 1::3] = ids.roll(1, dims=1)[:, 1::3]
    if batch.source_ids is None:
        return replace(batch, ids=other)
    return replace(batch, source_ids=other)


def recommend(result: dict[str, Any], budget_bytes: float | None) -> dict[str, Any]:
    """The threshold that a budget allows, or that is quiet enough where there is none.

    Args:
        result: of `plan`, without its recommendation.
        budget_bytes: for the whole cache.

    Returns:
        text, overrides (recipe path to value), bytes (of the whole cache with them) and fits.
    """
    total = result["bytes"]["total"]
    chosen = [name for name in result["codecs"] if result["codec"][name] == "threshold"]
    curves = {name: _curve(result["codecs"][name]) for name in chosen or result["codecs"]}
    if not curves:
        return _verdict(total, budget_bytes, result["rows"], {}, "nothing in it has a codec")
    others = total - sum(result["bytes"][name] for name in curves)
    sizes = {k: others + sum(curve[k]["bytes"] for curve in curves.values()) for k in CURVE}
    if budget_bytes is None:
        quiet = [
            k
            for k in CURVE
            if all(curve[k]["noise_over_signal"].get("1", 0) <= QUIET for curve in curves.values())
        ]
        k = min(quiet, default=CURVE[-1])
        why = f"the noise at temperature 1 is then at most {QUIET:g} of |p - t|"
        if not quiet:
            why = "the finest that was tried; the noise is still more than it should be"
    else:
        fitting = [k for k in range(CURVE[0], CURVE[-1] + 1) if _between(sizes, k) <= budget_bytes]
        k = max(fitting, default=CURVE[0])
        why = "the finest threshold that the budget allows" if fitting else "the coarsest tried"
    overrides = {f"dump.signals.{name}.codec.c": f"1/{k}" for name in chosen} or {
        f"dump.signals.{name}.codec": f"{{name: threshold, c: 1/{k}}}" for name in curves
    }
    return _verdict(_between(sizes, k), budget_bytes, result["rows"], overrides, why)


def _family(codec: Codec) -> str:
    """A codec's name; a threshold for other temperatures than 1 is not one that is tried."""
    several = isinstance(codec, ThresholdCodec) and codec.drawn_temperatures != (1.0,)
    return f"{codec.name} for several temperatures" if several else codec.name


def _curve(rows: dict[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Denominator to the row of that threshold."""
    return {k: rows[f"threshold 1/{k}"] for k in CURVE}


def _between(sizes: dict[int, float], k: int) -> int:
    """Bytes at a denominator, between those that were tried."""
    return round(float(np.interp(k, list(sizes), list(sizes.values()))))


def _verdict(
    total: int, budget_bytes: float | None, rows: int, overrides: dict[str, str], why: str
) -> dict[str, Any]:
    """A recommendation in words and numbers."""
    fits = budget_bytes is None or total <= budget_bytes
    text = why
    if not fits and budget_bytes is not None:
        share = budget_bytes / total
        text = (
            f"{why}, and it is over the budget: leave out a signal, store fewer layers or smaller "
            f"values, or dump {int(rows * share):,} of the {rows:,} rows (corpus.limit)"
        )
    return {"text": text, "overrides": overrides, "bytes": total, "fits": fits}
