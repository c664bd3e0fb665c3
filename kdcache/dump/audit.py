"""The whole of `kdcache audit`: the teacher again, on a random part of a cache.

Two questions, answered apart. Faithfulness: are the stored labels those of the teacher? They are
compared with labels made anew, beside the difference between two new runs whose batches have
other shapes: the teacher's own float noise. Truncation: how far is what is stored from all that
the teacher said?
"""

# M samples of a shard, F items, B rows of a batch

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.dump.batches import plan_batches
from kdcache.dump.measures import TOLERANCES, TRUNCATIONS, difference, truncation
from kdcache.dump.part import PartBuilder
from kdcache.dump.shards import shard_inputs
from kdcache.dump.signals.encoder import Columns, Request, SignalEncoder
from kdcache.dump.signals.items import Items
from kdcache.dump.signals.kinds import ENCODERS
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.loading import load_teacher
from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.keyed import permutation, text_key
from kdcache.formats.ragged import Ragged, concat
from kdcache.formats.signals import AttentionRecord, HiddenRecord, SignalRecord
from kdcache.progress import progress
from kdcache.recipe import DumpSection

#: Samples come from at most this many shards, spread evenly over the cache.
MOST_SHARDS = 16
#: Fewer samples than this say little.
FEWEST_SAMPLES = 32


#: The teacher in memory, by its section and whether it was loaded for attention.
Loaded = dict[str, Teacher]


@dataclass(frozen=True)
class AuditPlan:
    """What is looked at.

    Attributes:
        fraction: share of the samples.
        seed: of their choice.
        signals: names; all that are complete without them.
        teacher: where the teacher lies now, if it has moved; an ensemble's members in order.
        device: where it runs, in place of the recipe's.
        tolerance: largest difference that passes, in place of the kinds' own.
        truncation: largest loss that passes, in place of the kinds' own.
    """

    fraction: float = 0.005
    seed: int = 0
    signals: tuple[str, ...] = ()
    teacher: str | list[str] | None = None
    device: str | None = None
    tolerance: float | None = None
    truncation: float | None = None


def audit(path: str | Path, plan: AuditPlan) -> dict[str, Any]:
    """Run the teacher again on some samples and compare.

    Returns:
        cache, samples, fraction, passed, and signals: name to kind, samples, faithfulness
        (difference, unit, own_noise, repeated, deterministic, tolerance, passed, and more by
        kind) and truncation (loss, unit, tolerance, passed, and more by kind; None where nothing
        is cut).

    Raises:
        FormatError: there is no finished cache, or it is damaged.
        IdentityError: the teacher is not the one that the cache was made with.
        ModelError: the teacher cannot be loaded or used.
        RecipeError: a signal is not there, or is unfinished.
    """
    cache = open_cache(path)
    if cache.manifest.lineage is not None:  # its rows are numbered anew, and draws go by rows
        sources = ", ".join(source.name for source in cache.manifest.lineage.sources)
        raise RecipeError(f"{path}: a compiled cache has no teacher of its own; audit {sources}")
    names = _signals(cache, plan)
    if imported := [name for name in names if cache.signal(name).imported]:
        raise RecipeError(
            f"{path}: signal {imported[0]!r} was imported, and its teacher is not at hand; audit "
            "others with --signal, or check it by `kdcache verify`"
        )
    orders, each = _orders(cache, plan)
    total = sum(min(each, len(order)) for order in orders.values())
    results = {}
    loaded: Loaded = {}
    with progress(total * len(names), "audit", "sample") as bar:
        for name in names:
            encoder = encoder_of(cache, cache.signal(name), plan, loaded)
            results[name] = _audit_signal(cache, encoder, orders, each, plan)
            bar.update(total)
    return {
        "cache": str(path),
        "samples": total,
        "fraction": total / cache.num_samples,
        "passed": all(result["passed"] for result in results.values()),
        "signals": results,
    }


def encoder_of(
    cache: Cache, record: SignalRecord, plan: AuditPlan, loaded: Loaded
) -> SignalEncoder:
    """What makes a signal of a cache anew.

    Args:
        cache: that has it.
        record: of the signal.
        plan: says where the teacher is.
        loaded: the teacher of an earlier call, used again or replaced.

    Raises:
        IdentityError: the teacher is not the one that spoke.
    """
    section = _section(cache, record, plan)
    teacher = None
    if section.teacher is not None and record.teacher is not None:
        attention = record.kind == "attention"
        key = f"{section.teacher.model_dump_json()} {attention}"
        if key not in loaded:
            loaded.clear()  # before the next one takes memory
            loaded[key] = load_teacher(section.teacher, needs_attention=attention)
        teacher = loaded[key]
        _check_identity(cache, record, teacher)
    encoder = ENCODERS[record.kind](cache, Request(section, record.name, teacher))
    encoder.record = record
    return encoder


def _orders(cache: Cache, plan: AuditPlan) -> tuple[dict[int, np.ndarray], int]:
    """Shards to their samples in the order they are looked at, and how many of each shard."""
    count = max(FEWEST_SAMPLES, math.ceil(plan.fraction * cache.num_samples))
    step = max(1, math.ceil(cache.num_shards / MOST_SHARDS))
    shards = range(0, cache.num_shards, step)
    each = math.ceil(min(count, cache.num_samples) / len(shards))
    orders = {
        shard: permutation(
            cache.manifest.shards[shard].num_samples, text_key("audit", plan.seed, shard)
        )
        for shard in shards
    }
    return orders, each


def _signals(cache: Cache, plan: AuditPlan) -> list[str]:
    """Names of the signals to look at."""
    names = list(plan.signals) or [name for name in cache.signals if cache.complete(name)]
    for name in names:
        if name not in cache.signals:
            raise RecipeError(f"{cache.path}: no signal {name!r}; it has {sorted(cache.signals)}")
        if not cache.complete(name):
            raise RecipeError(
                f"{cache.path}: signal {name!r} is unfinished; run the same `kdcache dump` again"
            )
    if not names:
        raise RecipeError(f"{cache.path}: it has no finished signal to audit; dump one first")
    return names


def _section(cache: Cache, record: SignalRecord, plan: AuditPlan) -> DumpSection:
    """The recipe section that a signal was dumped with, from what the cache says of it."""
    teacher = record.recipe.get("teacher")
    if teacher is not None:
        teacher = dict(teacher)
        if plan.teacher is not None:
            teacher["path"] = plan.teacher
        if plan.device is not None:
            teacher["device"] = plan.device
    signal = {**record.recipe["signal"]}
    signal.pop("teacher", None)
    kept = ("tokenizers", "streams")
    return DumpSection.model_validate(
        {
            **{key: cache.manifest.recipe["dump"][key] for key in kept},
            "teacher": teacher,
            "signals": {record.name: signal},
            "seed": record.seed,
            "batch_tokens": record.recipe["batch_tokens"],
        }
    )


def _check_identity(cache: Cache, record: SignalRecord, teacher: Teacher) -> None:
    """The teacher must be the one that spoke."""
    expected = record.teacher
    assert expected is not None, "asked for signals of a teacher alone"
    found = teacher.record
    if (found.digest, found.config_digest) != (expected.digest, expected.config_digest):
        raise IdentityError(
            f"{cache.path}: signal {record.name!r} was made by {expected.path} (weights "
            f"{expected.digest}, config {expected.config_digest}); {found.path} has weights "
            f"{found.digest}, config {found.config_digest}: name the right one with --teacher"
        )


def _audit_signal(
    cache: Cache,
    encoder: SignalEncoder,
    orders: dict[int, np.ndarray],
    each: int,
    plan: AuditPlan,
) -> dict[str, Any]:
    """One signal: stored against new, new against new, and stored against everything.

    Args:
        cache: the cache.
        encoder: of the signal.
        orders: shard to its samples in the order they are looked at.
        each: samples of every shard, of those that the signal says something of.
        plan: tolerances.
    """
    record = encoder.record
    readings: list[tuple[Columns, Columns, Columns, Columns]] = []
    losses = []
    num_samples = 0
    for shard, order in orders.items():
        items = encoder.items(cache.samples(shard), shard_inputs(cache, record, shard))
        samples = np.sort(order[np.isin(order, items.sample)][:each])
        if not len(samples):
            continue
        num_samples += len(samples)
        rows = np.flatnonzero(np.isin(items.sample, samples))
        stored = stored_columns(cache, record, shard, samples)
        wide, high = encoder.plan_lengths(items)
        together = plan_batches(wide[rows], high[rows], int(record.recipe["batch_tokens"]))
        alone = list(np.arange(len(rows))[:, None])
        new, again, other = (
            _run(encoder, items, rows, samples, plan) for plan in (together, together, alone)
        )
        readings.append((stored, new, again, other))
        losses.append(truncation(encoder, items, rows, stored))
    if not readings:
        raise RecipeError(
            f"{cache.path}: signal {record.name!r} says nothing of the samples of the shards that "
            "were looked at; audit the other signals with --signal NAME"
        )
    columns = [_joined(pieces) for pieces in zip(*readings, strict=True)]
    faithfulness = _faithfulness(record, columns, plan)
    cut = _truncated([loss for loss in losses if loss is not None], record, plan)
    return {
        "kind": record.kind,
        "samples": num_samples,
        "faithfulness": faithfulness,
        "truncation": cut,
        "passed": faithfulness["passed"] and (cut is None or cut["passed"]),
    }


def _faithfulness(
    record: SignalRecord, columns: Sequence[Columns], plan: AuditPlan
) -> dict[str, Any]:
    """Stored against new, and what the teacher differs from itself.

    Args:
        record: of the signal.
        columns: of the same samples as stored, made anew, once more, and in other batches.
        plan: tolerances.
    """
    stored, new, again, other = columns
    found = difference(record, stored, new)
    value = found.pop("difference")
    noise = difference(record, new, other)["difference"]
    repeated = difference(record, new, again)["difference"]
    tolerance = TOLERANCES[record.kind] if plan.tolerance is None else plan.tolerance
    # Nothing can be asked of labels that the teacher itself does not keep to.
    limit = max(tolerance, 4 * noise)
    return {
        "difference": value,
        **found,
        "own_noise": noise,
        "repeated": repeated,
        "deterministic": repeated == 0,
        "tolerance": limit,
        "passed": bool(value <= limit and repeated <= tolerance),
    }


def _truncated(
    losses: list[dict[str, Any]], record: SignalRecord, plan: AuditPlan
) -> dict[str, Any] | None:
    """Means over shards, each weighed by what it counted."""
    if not losses:
        return None
    weights = [loss.pop("count") for loss in losses]
    unit = losses[0]["unit"]
    mean = {
        key: float(np.average([loss[key] for loss in losses], weights=weights))
        for key in losses[0]
        if key != "unit" and losses[0][key] is not None
    }
    limit = TRUNCATIONS[record.kind] if plan.truncation is None else plan.truncation
    return {**mean, "unit": unit, "tolerance": limit, "passed": bool(mean["loss"] <= limit)}


def _run(
    encoder: SignalEncoder,
    items: Items,
    rows: np.ndarray,
    samples: np.ndarray,
    plans: list[np.ndarray],
) -> Columns:
    """Columns of the chosen samples, made anew.

    Args:
        encoder: of the signal.
        items: of the shard.
        rows: items of the chosen samples, ascending.
        samples: the chosen samples of the shard.
        plans: batches, as indices into `rows`.
    """
    builder = PartBuilder(np.searchsorted(samples, items.sample[rows]), len(samples))
    for batch in plans:
        builder.add(batch, encoder.encode(items, rows[batch])())
    return builder.finish()


def stored_columns(cache: Cache, record: SignalRecord, shard: int, samples: np.ndarray) -> Columns:
    """What a cache holds of some samples of a shard, in the columns of its encoder.

    Args:
        cache: the cache.
        record: of the signal.
        shard: shard number.
        samples: samples of the shard, ascending.
    """
    if not isinstance(record, HiddenRecord | AttentionRecord):
        parts = [columns for _, _, columns in cache.signal_shard(record.name, shard).parts]
        return {name: concat([part[name] for part in parts]).take(samples) for name in parts[0]}
    dense = cache.dense_shard(record.name, shard)
    layers = range(len(record.layers))
    values = np.concatenate(
        [
            np.stack(
                [dense.decode(dense.start + m, dense.start + m + 1, layer) for layer in layers],
                axis=1,
            )
            for m in samples
        ]
    )  # [rows, L, W]
    lengths = np.diff(dense.offsets)[samples]
    return {"values": Ragged(np.concatenate([[0], np.cumsum(lengths)]), {"decoded": values})}


def _joined(pieces: Sequence[Columns]) -> Columns:
    """Columns of several shards one after another."""
    return {name: concat([piece[name] for piece in pieces]) for name in pieces[0]}


def verdicts(result: dict[str, Any]) -> Iterator[str]:
    """One line for everything that does not pass."""
    for name, signal in result["signals"].items():
        faithful, cut = signal["faithfulness"], signal["truncation"]
        if not faithful["deterministic"] and faithful["repeated"] > 0:
            yield (
                f"{name}: the teacher's outputs are not deterministic: two runs of the same "
                f"batches differ by {faithful['repeated']:.3g} ({faithful['unit']})"
            )
        if not faithful["passed"]:
            yield (
                f"{name}: stored labels differ from the teacher's by {faithful['difference']:.3g} "
                f"({faithful['unit']}), at most {faithful['tolerance']:.3g} passes; its own noise "
                f"is {faithful['own_noise']:.3g}"
            )
        if cut is not None and not cut["passed"]:
            yield (
                f"{name}: coding loses {cut['loss']:.3g} ({cut['unit']}), at most "
                f"{cut['tolerance']:.3g} passes; dump with a finer codec or values"
            )
