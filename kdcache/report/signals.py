"""What the signals of a cache are and weigh, kind by kind, in numbers.

# M samples of a shard, N labels, E entries, C labels of a classifier, A replicas
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from kdcache.formats.cache import Cache
from kdcache.formats.codes import entropy_nats, gold_log_probs
from kdcache.formats.dense import dense_row_bytes
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids, record_bytes
from kdcache.formats.signals import (
    AttentionRecord,
    BeamsRecord,
    ClassesRecord,
    HiddenRecord,
    LogitsRecord,
    MasksRecord,
    SignalRecord,
)
from kdcache.formats.units import num_replicas
from kdcache.report.commits import Commits, stream_tokens
from kdcache.report.gold import Gold, gold_labels

Summary = dict[str, Any]


@dataclass(frozen=True)
class SignalView:
    """A signal and its commits."""

    cache: Cache
    record: SignalRecord
    commits: Commits

    @cached_property
    def num_stream_tokens(self) -> int:
        """Tokens of its stream in its shards."""
        return self.commits.num_tokens(self.record.stream)

    def parts(self) -> Iterator[tuple[int, slice, dict[str, Ragged]]]:
        """Shard, samples counted within it, and columns of every part that is measured."""
        for number in self.commits.measured:
            shard = self.cache.signal_shard(self.record.name, number)
            for start, stop, columns in shard.parts:
                yield number, slice(start - shard.start, stop - shard.start), columns


def signal_summary(record: SignalRecord, commits: Commits) -> Summary:
    """One signal: how it was made, what it weighs, and what it says on the whole.

    Args:
        record: of the signal.
        commits: of the signal.

    Returns:
        What `inspect.inspect_cache` lists for its kind. Numbers that there is nothing to measure
        for are None.
    """
    view = SignalView(commits.cache, record, commits)
    return {
        "kind": record.kind,
        "stream": record.stream,
        "source": record.source,
        "masks": record.masks,
        "hypotheses": record.hypotheses,
        "teacher": record.teacher.model_dump(mode="json") if record.teacher else None,
        "seed": record.seed,
        "num_shards_committed": len(commits.shards),
        "num_shards_from_first": commits.num_from_first,
        "num_commits_read": len(commits.read),
        "num_samples": commits.num_samples,
        "bytes": commits.num_bytes,
        "bytes_per_stream_token": _ratio(commits.num_bytes, view.num_stream_tokens),
        **_OF_KIND[record.kind](view),
        "versions": record.versions,
    }


def _ratio(amount: float, count: float) -> float | None:
    """A mean; None over nothing."""
    return amount / count if count else None


def _logits(view: SignalView) -> Summary:
    """Soft labels: codec, entries and bytes of each, the teacher's loss and entropy."""
    record = cast(LogitsRecord, view.record)
    num, counts = view.commits.num_labels, view.commits.entries
    entries: dict[str, int] = {
        column: counts[column] for column in ("exact", "drawn") if column in counts
    }
    num_bytes = view.commits.num_bytes
    label_bytes = _label_bytes(view, num, entries)
    loss = entropy = 0.0
    num_measured = 0
    for _, _, columns in view.parts():
        fields = columns["tokens"].fields  # [N] each
        loss -= float(gold_log_probs(fields["gold"]).sum(dtype=np.float64))
        entropy += float(entropy_nats(fields["entropy"], record.vocab_size).sum(dtype=np.float64))
        num_measured += len(fields["gold"])
    return {
        "at": record.at,
        "hypothesis": record.hypothesis if record.hypotheses else None,
        "codec": record.codec.model_dump(mode="json"),
        "temperatures": list(record.temperatures),
        "vocab_size": record.vocab_size,
        "num_tokens": num,
        "entries_per_token": {name: count / max(1, num) for name, count in entries.items()},
        "label_bytes": label_bytes,
        "bytes_per_token": num_bytes / max(1, num),
        "label_bytes_per_token": label_bytes / max(1, num),
        "full_float16_bytes_per_token": 2 * record.vocab_size,
        "teacher_loss_nats": _ratio(loss, num_measured),
        "teacher_perplexity": math.exp(loss / num_measured) if num_measured else None,
        "entropy_nats": _ratio(entropy, num_measured),
        "measured_tokens": num_measured,
    }


def _label_bytes(view: SignalView, num_labels: int, entries: Mapping[str, int]) -> int:
    """Bytes of entries and of their counts, without gold, entropy, tail and offsets."""
    schema = view.cache.signal_schema(view.record.name)
    counts = sum(
        item.type.bit_width // 8
        for item in schema.field("tokens").type.value_type
        if item.name in ("num_exact", "num_drawn")
    )
    return counts * num_labels + sum(
        count * record_bytes(schema.field(column)) for column, count in entries.items()
    )


def _dense(view: SignalView) -> Summary:
    """Hidden states and attentions: layers, widths and bytes; no data file is read."""
    record = cast(HiddenRecord | AttentionRecord, view.record)
    num_bytes, num_rows = view.commits.num_bytes, view.commits.num_labels
    per_token = _ratio(num_bytes, view.num_stream_tokens)
    found: Summary = {
        "side": record.side,
        "layers": list(record.layers),
        "values": record.values,
        "num_replicas": num_replicas(view.cache, record),
        "num_rows": num_rows,
        "row_bytes": dense_row_bytes(record),
        "bytes_per_row": _ratio(num_bytes, num_rows),
        "bytes_per_token_and_layer": None if per_token is None else per_token / len(record.layers),
    }
    if isinstance(record, HiddenRecord):
        return found | {"width": record.width, "pool": record.pool}
    return found | {"heads": record.heads, "averaged": record.averaged}


def _beams(view: SignalView) -> Summary:
    """Hypotheses: how many, how long against the reference, how probable."""
    record = cast(BeamsRecord, view.record)
    best, every = _Hypotheses(), _Hypotheses()
    for _, _, columns in view.parts():
        column = columns["hypotheses"]
        first = column.offsets[:-1][column.lengths > 0]
        best.add(column, first)
        every.add(column, np.arange(int(column.offsets[-1])))
    commits = view.commits
    reference = stream_tokens(view.cache, record.stream, commits.measured)
    return {
        "vocab_size": record.vocab_size,
        "num_hypotheses": record.num_hypotheses,
        "decoding": record.decoding,
        "num_tokens": commits.num_labels,
        "hypotheses_per_sample": _ratio(commits.entries.get("hypotheses", 0), commits.num_samples),
        "best": best.summary(reference),
        "all": every.summary(None),
    }


@dataclass
class _Hypotheses:
    """Sums over some hypotheses."""

    count: int = 0
    tokens: int = 0
    log_prob: float = 0.0
    score: float = 0.0

    def add(self, column: Ragged, chosen: np.ndarray) -> None:
        """Take in the hypotheses of these numbers."""
        fields = column.fields
        self.count += len(chosen)
        self.tokens += int(fields["num_tokens"][chosen].sum(dtype=np.int64))
        self.log_prob += float(fields["log_prob"][chosen].sum(dtype=np.float64))
        self.score += float(fields["score"][chosen].sum(dtype=np.float64))

    def summary(self, reference_tokens: int | None) -> Summary:
        """Their means."""
        found: Summary = {
            "num_hypotheses": self.count,
            "mean_length": _ratio(self.tokens, self.count),
            "log_prob_per_token_nats": _ratio(self.log_prob, self.tokens),
            "mean_log_prob_nats": _ratio(self.log_prob, self.count),
            "mean_score": _ratio(self.score, self.count),
        }
        if reference_tokens is not None:
            found["length_ratio"] = _ratio(self.tokens, reference_tokens)
        return found


def _classes(view: SignalView) -> Summary:
    """Labels of a classifier: what it says and how sure it is; scores of a regressor."""
    record = cast(ClassesRecord, view.record)
    num_labels = len(record.labels)
    scores, gold = [np.zeros((0, num_labels))], Gold(record)
    for shard, samples, columns in view.parts():
        column = columns["scores"]
        found = column.fields["value"].reshape(-1, num_labels).astype(np.float64)
        scores.append(found)
        gold.add(gold_labels(view.cache, shard, samples), column.lengths // num_labels, found)
    return {
        "task": record.task,
        "problem": record.problem,
        "labels": record.labels,
        "values": record.values,
        "num_replicas": num_replicas(view.cache, record),
        "num_described": view.commits.num_labels // num_labels,
        **_said(record, np.concatenate(scores)),
        **gold.summary(),
    }


def _said(record: ClassesRecord, scores: np.ndarray) -> Summary:
    """Means over the [A, C] float64 scores that were measured."""
    found: Summary = {"num_measured": len(scores)}
    if record.problem == "regression":
        measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "mean": lambda x: x.mean(axis=0),
            "std": lambda x: x.std(axis=0),
            "min": lambda x: x.min(axis=0),
            "max": lambda x: x.max(axis=0),
        }
        found["scores"] = {
            label: {
                key: float(measure(scores)[number]) if len(scores) else None
                for key, measure in measures.items()
            }
            for number, label in enumerate(record.labels)
        }
        return found
    probs = probabilities(record, scores)
    if record.problem == "classification":
        chosen = np.eye(len(record.labels))[probs.argmax(axis=1)]
        entropy = -_plogp(probs).sum(axis=1)
    else:  # every label is a question of its own
        chosen = (probs > 0.5).astype(float)
        entropy = -(_plogp(probs) + _plogp(1 - probs)).mean(axis=1)
    shares = chosen.mean(axis=0).tolist() if len(probs) else [None] * len(record.labels)
    found["predicted"] = dict(zip(record.labels, shares, strict=True))
    found["entropy_nats"] = _ratio(float(entropy.sum()), len(probs))
    return found


def probabilities(record: ClassesRecord, scores: np.ndarray) -> np.ndarray:
    """[A, C] probabilities of a classifier's logits: of one label, or of each by itself."""
    scores = scores.astype(np.float64)
    if record.problem == "multi_label":
        probs: np.ndarray = 0.5 * (1 + np.tanh(0.5 * scores))  # the sigmoid, without overflow
        return probs
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True)) if len(scores) else scores
    normed: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return normed


def _plogp(probs: np.ndarray) -> np.ndarray:
    """Products p ln p, 0 at p = 0."""
    logs = np.log(np.where(probs > 0, probs, 1))
    product: np.ndarray = probs * logs
    return product


def _masks(view: SignalView) -> Summary:
    """Maskings: how much is masked, and what stands there instead."""
    record = cast(MasksRecord, view.record)
    in_all = view.commits.entries.get("masked", 0)
    num_masked = num_mask = num_kept = 0
    for shard, samples, columns in view.parts():
        ids = join_ids(columns["masked"].fields)
        own = _own_ids(view, shard, samples, columns["masked"])
        num_masked += len(ids)
        num_mask += int((ids == record.mask_id).sum())
        num_kept += int(((ids == own) & (ids != record.mask_id)).sum())
    return {
        "scheme": record.scheme,
        "parameters": record.parameters,
        "num_replicas": record.replicas,
        "mask_id": record.mask_id,
        "num_masked": in_all,
        "share_masked": _ratio(in_all, view.num_stream_tokens * record.replicas),
        "shares_of_masked": {
            "mask": _ratio(num_mask, num_masked),
            "other": _ratio(num_masked - num_mask - num_kept, num_masked),
            "own": _ratio(num_kept, num_masked),
        },
    }


def _own_ids(view: SignalView, shard: int, samples: slice, masked: Ragged) -> np.ndarray:
    """[E] ids that the masked tokens of some samples have in the stream."""
    stream = view.cache.samples(shard).streams[view.record.stream]
    starts = np.repeat(stream.offsets[samples].astype(np.int64), masked.lengths)
    at = starts + masked.fields["position"]
    return join_ids(
        {name: stream.fields[name][at] for name in ("id", "id_high") if name in stream.fields}
    )


_OF_KIND: dict[str, Callable[[SignalView], Summary]] = {
    "logits": _logits,
    "hidden": _dense,
    "attention": _dense,
    "beams": _beams,
    "classes": _classes,
    "masks": _masks,
}
