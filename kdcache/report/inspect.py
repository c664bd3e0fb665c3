"""What a cache holds, how it was made and how good its labels are, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import SAMPLES
from kdcache.report.samples import decoded_samples
from kdcache.report.signals import committed_shards, data_bytes, measured, signal_summary


def inspect_cache(path: str | Path, num_samples: int = 3) -> dict[str, Any]:
    """Everything `kdcache inspect` shows, as plain values.

    Sizes are of the whole cache; what needs data files is measured over at most 16 shards of a
    signal, spread over the cache.

    Args:
        path: the cache.
        num_samples: decoded samples, spread evenly over the corpus.

    Returns:
        path, format_version, num_shards, shard_tokens, recipe, versions and

        corpus: the manifest's record, and `task_shares`: task to its share of the samples.
        streams: name to the manifest's record, `tokens_per_sample`, and of a chat
            `loss_share`: the share of its tokens that the assistant wrote.
        tokenizers: name to the manifest's record.
        bytes: of the data files of `samples` and of each signal, of `tokenizers`, and `total`.
        signals: name to what all kinds share (kind, stream, source, masks, hypotheses, teacher,
            seed, num_shards_committed, num_samples, bytes, bytes_per_stream_token, versions) and

            logits: at, hypothesis, codec, temperatures, vocab_size, num_tokens (labels),
                entries_per_token, label_bytes, label_bytes_per_token, bytes_per_token (both per
                label), full_float16_bytes_per_token; teacher_loss_nats and teacher_perplexity
                on the tokens that are predicted, entropy_nats, measured_tokens.
            hidden: side, layers, width, pool, values, num_replicas, num_rows, row_bytes (without
                padding and checksums), bytes_per_row, bytes_per_token_and_layer.
            attention: the same with heads and averaged for width and pool; a row is a pair of
                query and key.
            beams: vocab_size, num_hypotheses, decoding, num_tokens, hypotheses_per_sample, and
                for `best` and `all`: num_hypotheses, mean_length (tokens), mean_log_prob_nats,
                log_prob_per_token_nats, mean_score, and of the best length_ratio to `stream`.
            classes: task, problem, labels, values, num_replicas, num_described (samples x
                replicas), num_measured; `predicted` (label to its share) and entropy_nats, of
                regression `scores` (label to mean, std, min, max) instead; gold_accuracy or
                gold_pearson against the corpus' labels, None where there are none.
            masks: scheme, parameters, num_replicas, mask_id, num_masked, share_masked (of all
                tokens), shares_of_masked: `mask` became the mask token, `other` a random one,
                `own` stayed.

        samples: row, sample_id, task, fields, tokens (stream to readable tokens), extras (stream
            to what is kept beside each token: segment, loss), and labels by signal:

            logits: a dict per label: target, position, replica or hypothesis where there are
                several, target_probability, entropy_nats, num_exact, exact, num_drawn, drawn
                (token and weight, or its probability where that is stored), tail_mass.
            hidden: num_rows, rms_of_layers.
            attention: a dict per token: query, most_attended (token and weight, per layer).
            beams: a dict per hypothesis, best first: tokens, log_prob_nats, score.
            classes: a list per replica of (label, probability or score), the most probable
                first; empty for samples of other tasks.
            masks: a list per replica of dicts: position, token, shown.

    Raises:
        FormatError: there is no finished cache there, or it is damaged.
    """
    cache = open_cache(path)
    manifest = cache.manifest
    return {
        "path": str(path),
        "format_version": manifest.format_version,
        "corpus": manifest.corpus.model_dump(mode="json") | {"task_shares": _task_shares(cache)},
        "streams": {name: _stream(cache, name) for name in manifest.streams},
        "tokenizers": {
            name: record.model_dump(mode="json", exclude={"files"})
            for name, record in manifest.tokenizers.items()
        },
        "num_shards": cache.num_shards,
        "shard_tokens": manifest.shard_tokens,
        "bytes": _bytes(cache),
        "signals": {name: signal_summary(cache, record) for name, record in cache.signals.items()},
        "recipe": manifest.recipe,
        "versions": manifest.versions,
        "samples": decoded_samples(cache, num_samples),
    }


def _bytes(cache: Cache) -> dict[str, int]:
    """Bytes on disk: of the samples, of each signal, of tokenizers, and all in all."""
    sizes = {
        name: data_bytes(cache, name, committed_shards(cache, name))
        for name in [SAMPLES, *cache.signals]
    }
    sizes["tokenizers"] = sum(
        file.bytes for record in cache.manifest.tokenizers.values() for file in record.files
    )
    sizes["total"] = sum(file.stat().st_size for file in cache.path.rglob("*") if file.is_file())
    return sizes


def _task_shares(cache: Cache) -> dict[str, float]:
    """Task to its share of the samples that were measured; none without tasks."""
    tasks = cache.manifest.corpus.tasks
    if not tasks:
        return {}
    counts = np.zeros(len(tasks), dtype=np.int64)
    for shard in measured(committed_shards(cache, SAMPLES)):
        counts += np.bincount(cache.samples(shard).task_index(tasks), minlength=len(tasks))
    return dict(zip(tasks, (counts / max(1, counts.sum())).tolist(), strict=True))


def _stream(cache: Cache, name: str) -> dict[str, Any]:
    """A stream's record and what it comes to."""
    record = cache.stream(name)
    found: dict[str, Any] = record.model_dump(mode="json")
    found["tokens_per_sample"] = record.num_tokens / max(1, cache.num_samples)
    if record.template == "chat":
        counts = np.zeros(2, dtype=np.int64)
        for shard in measured(committed_shards(cache, SAMPLES)):
            loss = cache.samples(shard).streams[name].fields["loss"]
            counts += np.array([int(loss.sum(dtype=np.int64)), len(loss)])
        found["loss_share"] = float(counts[0] / max(1, counts[1]))
    return found
