"""What a cache holds, how it was made and how good its labels are, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import SAMPLES, TokenizerRecord
from kdcache.report.commits import Commits, committed
from kdcache.report.samples import decoded_samples
from kdcache.report.signals import signal_summary


def inspect_cache(path: str | Path, num_samples: int = 3) -> dict[str, Any]:
    """Everything `kdcache inspect` shows, as plain values.

    A dump may be on its way: then it is about the shards that are committed. Sizes and counts
    come from the commits; of a signal with more of them than `commits.READ_COMMITS` some are read
    and the sums are close. What needs data files is measured over at most 16 shards of a signal
    and about 64 MiB of them, spread over the cache.

    Args:
        path: the cache, or its URL.
        num_samples: decoded samples, spread evenly over the corpus.

    Returns:
        path, format_version, num_shards, shard_tokens, lineage (None of a dump), recipe, versions
        and

        corpus: the manifest's record, and `task_shares`: task to its share of the samples.
        streams: name to the manifest's record, `tokens_per_sample`, and of a chat
            `loss_share`: the share of its tokens that the assistant wrote.
        tokenizers: name to the manifest's record.
        exact: whether all commits were read for the sizes and counts.
        bytes: of the data files of `samples` and of each signal, of `tokenizers`, and `total`.
        not_begun: signals of the recipe that the dump has not come to.
        signals: name to what all kinds share (kind, stream, source, masks, hypotheses, teacher,
            seed, num_shards_committed, num_shards_from_first (without a gap), num_commits_read,
            num_samples, bytes, bytes_per_stream_token, versions) and

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
    manifest, commits = cache.manifest, committed(cache)
    samples = commits[SAMPLES]
    return {
        "path": str(path),
        "format_version": manifest.format_version,
        "corpus": manifest.corpus.model_dump(mode="json") | {"task_shares": _task_shares(samples)},
        "streams": {name: _stream(samples, name) for name in manifest.streams},
        "tokenizers": {
            name: record.model_dump(mode="json", exclude={"files"})
            for name, record in manifest.tokenizers.items()
        },
        "num_shards": cache.num_shards,
        "shard_tokens": manifest.shard_tokens,
        "exact": all(found.read == found.shards for found in commits.values()),
        "bytes": _bytes(commits, manifest.tokenizers.values()),
        "signals": {
            name: signal_summary(record, commits[name]) for name, record in cache.signals.items()
        },
        "not_begun": _not_begun(cache),
        "lineage": manifest.lineage.model_dump(mode="json") if manifest.lineage else None,
        "recipe": manifest.recipe,
        "versions": manifest.versions,
        "samples": decoded_samples(cache, commits, num_samples),
    }


def _bytes(commits: Mapping[str, Commits], tokenizers: Iterable[TokenizerRecord]) -> dict[str, int]:
    """Bytes that the records name: of the samples, of each signal, of tokenizers, and in all."""
    sizes = {name: found.num_bytes for name, found in commits.items()}
    sizes["tokenizers"] = sum(file.bytes for record in tokenizers for file in record.files)
    return sizes | {"total": sum(sizes.values())}


def _task_shares(samples: Commits) -> dict[str, float]:
    """Task to its share of the samples that were measured; none without tasks."""
    cache = samples.cache
    tasks = cache.manifest.corpus.tasks
    if not tasks:
        return {}
    counts = np.zeros(len(tasks), dtype=np.int64)
    for shard in samples.measured:
        counts += np.bincount(cache.samples(shard).task_index(tasks), minlength=len(tasks))
    return dict(zip(tasks, (counts / max(1, counts.sum())).tolist(), strict=True))


def _stream(samples: Commits, name: str) -> dict[str, Any]:
    """A stream's record and what it comes to."""
    cache = samples.cache
    record = cache.stream(name)
    found: dict[str, Any] = record.model_dump(mode="json")
    found["tokens_per_sample"] = record.num_tokens / max(1, cache.num_samples)
    if record.template == "chat":
        counts = np.zeros(2, dtype=np.int64)
        for shard in samples.measured:
            loss = cache.samples(shard).streams[name].fields["loss"]
            counts += np.array([int(loss.sum(dtype=np.int64)), len(loss)])
        found["loss_share"] = float(counts[0] / max(1, counts[1]))
    return found


def _not_begun(cache: Cache) -> list[str]:
    """Signals that the recipe names and that have no record: a dump has yet to come to them."""
    if cache.manifest.lineage is not None:
        return []  # the recipe is that of a cache it was compiled from
    section = cache.manifest.recipe.get("dump")
    named = section.get("signals") if isinstance(section, dict) else None
    return sorted(set(named) - set(cache.signals)) if isinstance(named, dict) else []
