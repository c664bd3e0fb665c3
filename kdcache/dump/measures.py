"""How far two readings of a signal are apart, and how far what is stored is from everything."""

# N positions, E entries, R rows, L layers, W width, V vocabulary

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.dump.signals.dense import DenseEncoder
from kdcache.dump.signals.encoder import Columns, SignalEncoder
from kdcache.dump.signals.items import Items
from kdcache.dump.signals.logits import LogitsEncoder
from kdcache.formats.codes import gold_log_probs
from kdcache.formats.dense import SCALE, VALUES, decode_values
from kdcache.formats.ragged import Ragged
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.labels.coded_labels import LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import SparseTarget

#: Kind to the largest difference of stored and new labels that passes, in the kind's unit.
TOLERANCES = {
    "logits": 0.01,
    "hidden": 0.01,
    "attention": 0.01,
    "classes": 0.01,
    "beams": 0.05,
    "masks": 0.0,
}

#: Kind to the largest loss by coding that passes, in the kind's unit.
TRUNCATIONS = {"logits": 0.5, "hidden": 0.02, "attention": 0.02}


def difference(record: SignalRecord, left: Columns, right: Columns) -> dict[str, Any]:
    """How far two readings of the same samples are apart.

    Args:
        record: of the signal.
        left: columns of the samples.
        right: others of the same samples.

    Returns:
        `difference`, its `unit`, and more by kind.
    """
    if isinstance(record, LogitsRecord):
        return _labels_difference(record, left, right)
    if isinstance(record, HiddenRecord | AttentionRecord):
        return _dense_difference(record, left, right)
    if isinstance(record, BeamsRecord):
        return _beams_difference(left, right)
    if isinstance(record, MasksRecord):
        return {"difference": _share_unequal(left, right), "unit": "share of samples that differ"}
    a, b = (columns["scores"].fields["value"].astype(np.float64) for columns in (left, right))
    return {"difference": _relative(a, b), "unit": "RMS error over RMS"}


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of a - b over that of b."""
    if a.shape != b.shape:
        return float("inf")
    size = float(np.sqrt(np.square(b).mean())) if b.size else 0.0
    return float(np.sqrt(np.square(a - b).mean())) / size if size else float(np.any(a != b))


def _labels_difference(record: LogitsRecord, left: Columns, right: Columns) -> dict[str, Any]:
    """Mean L1 distance of the decoded labels at temperature 1, and how many agree wholly."""
    (keys_a, values_a), (keys_b, values_b) = (_label_entries(record, c) for c in (left, right))
    keys = np.union1d(keys_a, keys_b)
    dense = np.zeros((2, len(keys)))
    np.add.at(dense[0], np.searchsorted(keys, keys_a), values_a)
    np.add.at(dense[1], np.searchsorted(keys, keys_b), values_b)
    num_positions = max(1, int(left["tokens"].offsets[-1]))
    unequal = np.unique((keys >> 24)[(dense[0] > 0) != (dense[1] > 0)])
    gold = [gold_log_probs(columns["tokens"].fields["gold"]) for columns in (left, right)]
    return {
        "difference": float(np.abs(dense[0] - dense[1]).sum()) / num_positions,
        "unit": "mean L1 of labels",
        "same_ids": 1 - len(unequal) / num_positions,
        "gold_nats": float(np.abs(gold[0] - gold[1]).sum()) / num_positions,
    }


def _label_entries(record: LogitsRecord, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """[E] keys (position, id) and [E] weights of the labels at temperature 1."""
    spec = LogitsSpec(record.codec, record.vocab_size, record.temperatures)
    target = decode(coded_labels(spec, columns))
    keys = (target.rows.numpy() << 24) + target.ids.numpy()
    return keys, target.values.numpy().astype(np.float64)


def decoded_rows(record: HiddenRecord | AttentionRecord, columns: Columns) -> np.ndarray:
    """[R, L, W] float32 of an encoder's columns, or of those read from a cache."""
    fields = columns["values"].fields
    if "decoded" in fields:
        return fields["decoded"]
    values, scale = fields[VALUES], fields.get(SCALE)
    layers = [
        decode_values(values[:, i], record.values, None if scale is None else scale[:, i])
        for i in range(values.shape[1])
    ]
    return np.stack(layers, axis=1)


def _dense_difference(
    record: HiddenRecord | AttentionRecord, left: Columns, right: Columns
) -> dict[str, Any]:
    """RMS error over RMS of the worst layer."""
    a, b = decoded_rows(record, left), decoded_rows(record, right)
    by_layer = {str(layer): _relative(a[:, i], b[:, i]) for i, layer in enumerate(record.layers)}
    return {
        "difference": max(by_layer.values()),
        "unit": "RMS error over RMS, worst layer",
        "by_layer": by_layer,
    }


def _beams_difference(left: Columns, right: Columns) -> dict[str, Any]:
    """Share of samples whose hypotheses differ; log-probs of the others."""
    same = _same(left["tokens"], right["tokens"]) & _same(
        left["hypotheses"], right["hypotheses"], ("num_tokens",)
    )
    kept = np.flatnonzero(same)
    log_probs = [
        columns["hypotheses"].take(kept).fields["log_prob"].astype(np.float64)
        for columns in (left, right)
    ]
    apart = float(np.abs(log_probs[0] - log_probs[1]).max(initial=0.0))
    return {
        "difference": float(1 - same.mean()) if len(same) else 0.0,
        "unit": "share of samples with other hypotheses",
        "log_prob_nats": apart,
    }


def _share_unequal(left: Columns, right: Columns) -> float:
    """Share of samples of which any column differs."""
    same = np.ones(len(next(iter(left.values()))), dtype=bool)
    for name, column in left.items():
        same &= _same(column, right[name])
    return float(1 - same.mean()) if len(same) else 0.0


def _same(a: Ragged, b: Ragged, names: tuple[str, ...] | None = None) -> np.ndarray:
    """[M] bool: samples that are equal in all fields, or in those named."""
    same = a.lengths == b.lengths
    both = np.flatnonzero(same)
    left, right = a.take(both), b.take(both)
    unequal = np.zeros(int(left.offsets[-1]), dtype=bool)
    for name in names or tuple(left.fields):
        unequal |= left.fields[name] != right.fields[name]
    ends = np.concatenate([[0], np.cumsum(unequal)])
    same[both] = ends[left.offsets[1:]] == ends[left.offsets[:-1]]
    return same


def truncation(
    encoder: SignalEncoder,
    items: Items,
    rows: np.ndarray,
    stored: Columns,
) -> dict[str, Any] | None:
    """How far what is stored is from all that the teacher says.

    Args:
        encoder: of the signal.
        items: of the shard.
        rows: items of the chosen samples, ascending.
        stored: columns of those samples.

    Returns:
        `loss`, `unit`, `count` (its weight in a mean) and more by kind; None where nothing is
        cut, or more is known from the difference.
    """
    if isinstance(encoder, LogitsEncoder):
        return _labels_truncation(encoder, items, rows, stored)
    if isinstance(encoder, DenseEncoder):
        full = np.concatenate(
            [encoder.describe(items, item).float().cpu().numpy() for item in rows[:, None]]
        )
        kept = decoded_rows(encoder.record, stored)
        losses = [_relative(kept[:, i], full[:, i]) for i in range(full.shape[1])]
        return {"loss": max(losses), "unit": "RMS error over RMS, worst layer", "count": len(full)}
    return None


def _labels_truncation(
    encoder: LogitsEncoder, items: Items, rows: np.ndarray, stored: Columns
) -> dict[str, Any]:
    """Mass that is missing, noise and lost KL of the stored labels against the distributions."""
    record, teacher = encoder.record, encoder.teacher
    spec = LogitsSpec(record.codec, record.vocab_size, record.temperatures)
    coded = coded_labels(spec, stored)
    drawn = 1.0 in record.codec.drawn_temperatures
    label = decode(
        coded, 1.0, "sampled" if drawn else "bucket" if record.codec.has_tail else "auto"
    )
    head = decode(coded, 1.0, "uniform") if record.codec.has_exact else None
    sums = dict.fromkeys(("mass", "noise", "kl"), 0.0)
    position = 0
    for item in rows[:, None]:  # one by one, so that they come in order
        at, _ = items.labelled(item, teacher.device)
        if not bool(at.any()):
            continue
        padded = items.batch(item, teacher.pad_id, teacher.device)
        for logits in teacher.logits_in_pieces(padded, at, 1 << 24):
            full = torch.log_softmax(logits.float(), dim=-1).cpu()  # [n, V]
            here = slice(position, position + len(full))
            position += len(full)
            given = _dense_rows(label, here, record.vocab_size)
            sums["mass"] += float((given.sum(dim=-1) - 1).sum())
            sums["noise"] += float((given - full.exp()).square().sum())
            if head is not None:
                sums["kl"] += lost_kl(full, _dense_rows(head, here, record.vocab_size))
    count = max(1, position)
    missing = abs(sums["mass"]) / count
    return {
        "loss": missing,
        "unit": "mass that the labels lack on average",
        "noise": float(np.sqrt(sums["noise"] / count)),
        "lost_kl_nats": sums["kl"] / count if head is not None else None,
        "count": count,
    }


def _dense_rows(label: SparseTarget, here: slice, vocab_size: int) -> Tensor:
    """[n, V] density of some positions of a label."""
    mine = (label.rows >= here.start) & (label.rows < here.stop)
    out = torch.zeros(here.stop - here.start, vocab_size)
    if label.uniform is not None:
        out += label.uniform[here, None]
    index = (label.rows[mine] - here.start, label.ids[mine].to(torch.int64))
    return out.index_put_(index, label.values[mine].to(torch.float32), accumulate=True)


def lost_kl(full: Tensor, label: Tensor) -> float:
    """Sum over positions of KL(teacher || label) in nats.

    Args:
        full: [n, V] the teacher's log-probs.
        label: [n, V] a label that leaves no id out, such as an exact head with a uniform tail.
    """
    probs = full.exp()
    terms = torch.where(probs > 0, probs * (full - label.clamp(min=1e-12).log()), torch.zeros(()))
    return float(terms.sum())
