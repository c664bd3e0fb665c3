"""One sample of a cache decoded: its texts, its tokens, and what every signal says of it.

# N labels, E entries, R rows, T tokens, L layers, C labels of a classifier
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from kdcache.formats.cache import Cache
from kdcache.formats.codec import SampledCodec
from kdcache.formats.codes import drawn_log_probs, entropy_nats, exact_log_probs, gold_log_probs
from kdcache.formats.manifest import SAMPLES
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import extra_fields, join_ids
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
from kdcache.report.commits import Commits
from kdcache.report.signals import probabilities
from kdcache.report.tokens import names_of, readable

#: Most entries listed at one position; their number is given in full.
LISTED_ENTRIES = 64

Fields = dict[str, np.ndarray]


def decoded_samples(
    cache: Cache, commits: Mapping[str, Commits], num_samples: int
) -> list[dict[str, Any]]:
    """Samples spread evenly over those that every signal with any shard describes.

    Args:
        cache: the cache.
        commits: of the samples and of every signal.
        num_samples: how many, at most.
    """
    begun = {name: found.shards for name, found in commits.items() if found.shards}
    shared = set(commits[SAMPLES].shards).intersection(*begun.values())
    plan = [(n, shard) for n, shard in enumerate(cache.manifest.shards) if n in shared]
    total = sum(shard.num_samples for _, shard in plan)
    count = min(num_samples, total)
    chosen = [total * n // count for n in range(count)]
    streams = cache.manifest.streams
    used = {stream.tokenizer for stream in streams.values()}
    tokens = {name: readable(cache.tokens(name)) for name in used}
    vocabularies = {name: tokens[stream.tokenizer] for name, stream in streams.items()}
    out = []
    at = 0
    for number, shard in plan:
        here = [index - at for index in chosen if at <= index < at + shard.num_samples]
        for index in here:
            sample = _Sample(cache, number, index, vocabularies)
            out.append(sample.decoded([name for name in cache.signals if name in begun]))
        at += shard.num_samples
    return out


@dataclass(frozen=True)
class _Sample:
    """One sample of a shard; `index` counts within it."""

    cache: Cache
    shard: int
    index: int
    vocabularies: Mapping[str, list[str]]

    def decoded(self, signals: list[str]) -> dict[str, Any]:
        """Texts, tokens, and what the signals say."""
        samples = self.cache.samples(self.shard)
        tasks = samples.tasks()
        streams = {name: self.stream(name) for name in samples.streams}
        return {
            "row": int(samples.row[self.index]),
            "sample_id": samples.sample_id[self.index].tobytes().hex(),
            "task": None if tasks is None else tasks[self.index].as_py(),
            "fields": {
                name: samples.text(name)[self.index].as_py()
                for name in self.cache.manifest.corpus.fields
            },
            "tokens": {name: self.names(name, join_ids(found)) for name, found in streams.items()},
            "extras": {
                name: {key: values.tolist() for key, values in extra_fields(found).items()}
                for name, found in streams.items()
            },
            "labels": {
                name: _OF_KIND[record.kind](self, record)
                for name, record in self.cache.signals.items()
                if name in signals
            },
        }

    def stream(self, name: str) -> Fields:
        """Stored fields of the tokens of a stream."""
        return _records(self.cache.samples(self.shard).streams[name], self.index)

    def ids(self, name: str) -> np.ndarray:
        """[T] int32 ids of a stream."""
        return join_ids(self.stream(name))

    def names(self, stream: str, ids: np.ndarray) -> list[str]:
        """Readable tokens of [E] ids of a stream."""
        return names_of(self.vocabularies[stream], ids)

    def columns(self, signal: str) -> dict[str, Fields]:
        """What an Arrow signal holds of the sample, by column."""
        shard = self.cache.signal_shard(signal, self.shard)
        sample = shard.start + self.index
        start, columns = next((a, found) for a, b, found in shard.parts if a <= sample < b)
        return {name: _records(column, sample - start) for name, column in columns.items()}

    def layer(self, signal: str, number: int) -> np.ndarray:
        """[R, W] float32 values of one layer of a dense signal."""
        shard = self.cache.dense_shard(signal, self.shard)
        sample = shard.start + self.index
        return shard.decode(sample, sample + 1, number)


def _records(column: Ragged, index: int) -> Fields:
    """Fields of one sample's records."""
    begin, end = int(column.offsets[index]), int(column.offsets[index + 1])
    return {name: array[begin:end] for name, array in column.fields.items()}


def _split(values: list[Any], counts: np.ndarray) -> list[list[Any]]:
    """A list cut into pieces of these lengths."""
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [values[end - int(n) : end] for end, n in zip(ends, counts, strict=True)]


def _logits(sample: _Sample, record: SignalRecord) -> list[dict[str, Any]]:
    """A dict per label; entries most probable first."""
    record = cast(LogitsRecord, record)
    columns = sample.columns(record.name)
    tokens, vocabulary = columns["tokens"], sample.vocabularies[record.stream]
    gold = np.exp(gold_log_probs(tokens["gold"]))
    entropy = entropy_nats(tokens["entropy"], record.vocab_size)
    labels = [
        place | {"target_probability": float(gold[n]), "entropy_nats": float(entropy[n])}
        for n, place in enumerate(_places(sample, record))
    ]
    for column in ("exact", "drawn"):
        if column not in columns:
            continue
        counts = tokens.get(f"num_{column}", np.full(len(labels), record.vocab_size))
        entries = _entries(record, column, columns[column], counts, vocabulary)
        for label, listed, count in zip(labels, entries, counts, strict=True):
            label[f"num_{column}"] = int(count)
            label[column] = listed
    if record.codec.has_tail:
        knots = tokens[f"tail_{record.temperatures.index(1.0)}"].astype(float)
        for label, knot in zip(labels, knots, strict=True):
            label["tail_mass"] = math.exp(knot)
    return labels


def _places(sample: _Sample, record: LogitsRecord) -> list[dict[str, Any]]:
    """What each label of a sample predicts, and where it stands."""
    if record.hypotheses is not None:
        hypotheses = _hypotheses(sample, record.hypotheses)
        chosen = range(len(hypotheses)) if record.hypothesis == "all" else [record.hypothesis]
        return [
            {"target": token, "position": position, "hypothesis": number}
            for number in chosen
            if number < len(hypotheses)
            for position, token in enumerate(hypotheses[number])
        ]
    own = sample.names(record.stream, sample.ids(record.stream))
    if record.masks is not None:
        columns = sample.columns(record.masks)
        replicas = np.arange(len(columns["replicas"]["num_masked"]))
        replicas = np.repeat(replicas, columns["replicas"]["num_masked"])
        positions = columns["masked"]["position"].tolist()
        return [
            {"target": own[position], "position": position, "replica": replica}
            for position, replica in zip(positions, replicas.tolist(), strict=True)
        ]
    places = [{"target": token, "position": n} for n, token in enumerate(own)]
    if record.at == "targets":
        return places
    loss = sample.stream(record.stream).get("loss", np.ones(len(own), dtype=np.uint8))
    return [place for n, place in enumerate(places) if n > 0 and loss[n]]


def _entries(
    record: LogitsRecord,
    column: str,
    fields: Fields,
    counts: np.ndarray,
    vocabulary: list[str],
) -> list[list[tuple[str, float]]]:
    """Per position the (token, probability or weight) entries of one column."""
    codec = record.codec
    if column == "exact":
        weights = np.exp(exact_log_probs(codec, fields["code"]))
    elif isinstance(codec, SampledCodec):
        weights = fields["code"] * codec.drawn_weight
    elif codec.has_drawn_log_probs:  # what it weighs depends on the temperature
        weights = np.exp(drawn_log_probs(codec, fields["code"]))
    else:
        weights = np.full(len(fields["id"]), codec.drawn_weight)
    every_id = np.arange(record.vocab_size)
    ids = join_ids(fields) if "id" in fields else np.tile(every_id, len(counts))
    ends = np.cumsum(counts, dtype=np.int64)
    out = []
    for begin, end in zip(ends - counts, ends, strict=True):
        order = begin + np.argsort(-weights[begin:end], kind="stable")[:LISTED_ENTRIES]
        names = names_of(vocabulary, ids[order])
        out.append(list(zip(names, weights[order].astype(float).tolist(), strict=True)))
    return out


def _hypotheses(sample: _Sample, signal: str) -> list[list[str]]:
    """Readable tokens of every hypothesis of a beams signal."""
    columns = sample.columns(signal)
    stream = sample.cache.signal(signal).stream
    names = sample.names(stream, join_ids(columns["tokens"]))
    return _split(names, columns["hypotheses"]["num_tokens"])


def _beams(sample: _Sample, record: SignalRecord) -> list[dict[str, Any]]:
    """A dict per hypothesis, best first."""
    record = cast(BeamsRecord, record)
    fields = sample.columns(record.name)["hypotheses"]
    return [
        {"tokens": tokens, "log_prob_nats": float(log_prob), "score": float(score)}
        for tokens, log_prob, score in zip(
            _hypotheses(sample, record.name), fields["log_prob"], fields["score"], strict=True
        )
    ]


def _masks(sample: _Sample, record: SignalRecord) -> list[list[dict[str, Any]]]:
    """A list per replica: the masked tokens, and what stands there."""
    record = cast(MasksRecord, record)
    columns = sample.columns(record.name)
    own = sample.names(record.stream, sample.ids(record.stream))
    shown = sample.names(record.stream, join_ids(columns["masked"]))
    masked = [
        {"position": position, "token": own[position], "shown": token}
        for position, token in zip(columns["masked"]["position"].tolist(), shown, strict=True)
    ]
    return _split(masked, columns["replicas"]["num_masked"])


def _classes(sample: _Sample, record: SignalRecord) -> list[list[tuple[str, float]]]:
    """A list per replica of (label, probability or score), the most probable label first."""
    record = cast(ClassesRecord, record)
    values = sample.columns(record.name)["scores"]["value"]
    scores = values.reshape(-1, len(record.labels)).astype(np.float64)  # [A, C]
    if record.problem == "regression":
        return [list(zip(record.labels, row, strict=True)) for row in scores.tolist()]
    return [
        sorted(zip(record.labels, row, strict=True), key=lambda pair: -pair[1])
        for row in probabilities(record, scores).tolist()
    ]


def _hidden(sample: _Sample, record: SignalRecord) -> dict[str, Any]:
    """How many rows, and how large they are in every layer."""
    record = cast(HiddenRecord, record)
    layers = [sample.layer(record.name, n) for n in range(len(record.layers))]
    squares = [float((layer.astype(np.float64) ** 2).mean()) for layer in layers if layer.size]
    return {
        "num_rows": len(layers[0]),
        "rms_of_layers": [math.sqrt(square) for square in squares],
    }


def _attention(sample: _Sample, record: SignalRecord) -> list[dict[str, Any]]:
    """A dict per query token: the key it attends to most in every layer, heads averaged."""
    record = cast(AttentionRecord, record)
    tokens = sample.names(record.stream, sample.ids(record.stream))
    length = len(tokens)
    replicas = num_replicas(sample.cache, record)
    most = []
    for number in range(len(record.layers)):
        weights = sample.layer(record.name, number).mean(axis=1)  # [R, W] -> [R]
        first = weights.reshape(replicas, length, length)[0]  # [T, T]
        most.append([(tokens[k], float(first[q, k])) for q, k in enumerate(first.argmax(axis=1))])
    return [
        {"query": token, "most_attended": [layer[n] for layer in most]}
        for n, token in enumerate(tokens)
    ]


_OF_KIND: dict[str, Callable[[_Sample, SignalRecord], Any]] = {
    "logits": _logits,
    "hidden": _hidden,
    "attention": _attention,
    "beams": _beams,
    "classes": _classes,
    "masks": _masks,
}
