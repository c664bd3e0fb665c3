"""An inspection of a cache as text for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdcache.formats.manifest import SAMPLES
from kdcache.report.sample_text import sample_text
from kdcache.report.signal_text import signal_text, signals_table
from kdcache.report.text import listing, one_line, percent, size, table


def inspection_text(inspection: Mapping[str, Any]) -> str:
    """What `kdcache inspect` prints.

    Args:
        inspection: from `inspect_cache`.
    """
    signals = inspection["signals"]
    blocks = [_head(inspection), _streams(inspection)]
    if len(signals) > 1:
        blocks.append(signals_table(signals))
    blocks += [
        signal_text(name, found, inspection["num_shards"]) for name, found in signals.items()
    ]
    blocks += [sample_text(sample, signals) for sample in inspection["samples"]]
    return "\n\n".join(blocks)


def _head(inspection: Mapping[str, Any]) -> str:
    corpus = inspection["corpus"]
    dropped = ", ".join(f"{count:,} {why}" for why, count in corpus["dropped"].items() if count)
    about = "" if inspection["exact"] else "; sizes and counts reckoned from a part of the commits"
    sizes, not_begun = dict(inspection["bytes"]), inspection["not_begun"]
    total, samples, tokenizers = (sizes.pop(key) for key in ("total", SAMPLES, "tokenizers"))
    tasks = ", ".join(f"{name} {percent(share)}" for name, share in corpus["task_shares"].items())
    parts = [
        f"samples {size(samples)}",
        f"signals {size(sum(sizes.values()))}",
        f"tokenizers {size(tokenizers)}",
    ]
    label = f" (gold label: {corpus['label']})" if corpus["label"] else ""
    return listing(
        {
            "cache": inspection["path"],
            "format": f"version {inspection['format_version']}",
            "samples": f"{corpus['num_samples']:,} of {corpus['num_rows']:,} rows"
            + (f" ({dropped} left out)" if dropped else ""),
            **({"tasks": tasks} if tasks else {}),
            "fields": ", ".join(corpus["fields"]) + label,
            "shards": inspection["num_shards"],
            "size": f"{size(total)} ({', '.join(parts)}){about}",
            **({"not begun": ", ".join(not_begun)} if not_begun else {}),
            "corpus": corpus["digest"],
            **_lineage(inspection["lineage"]),
            "made with": ", ".join(f"{k} {v}" for k, v in inspection["versions"].items()),
        }
    )


def _lineage(lineage: Mapping[str, Any] | None) -> dict[str, str]:
    """What a cache was compiled from, and how; nothing for a dump."""
    if lineage is None:
        return {}
    names = [f"{one_line(s['name'])} ({s['num_samples']:,} samples)" for s in lineage["sources"]]
    steps = []
    for step in lineage["operations"]:
        given = {key: value for key, value in step.items() if key != "operation"}
        words = "; ".join(f"{key}: {json.dumps(value)}" for key, value in given.items())
        steps.append(f"{step.get('operation')} ({words})" if given else str(step.get("operation")))
    return {"compiled from": ", ".join(names), "by": one_line(", ".join(steps))}


def _streams(inspection: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            _made_of(stream),
            stream["tokenizer"],
            stream["vocab_size"],
            stream["num_tokens"],
            stream["tokens_per_sample"],
        )
        for name, stream in inspection["streams"].items()
    ]
    return table(("stream", "made of", "tokenizer", "ids", "tokens", "per sample"), rows)


def _made_of(stream: Mapping[str, Any]) -> str:
    """The field of a stream, or its pair, or how much of a chat the assistant says."""
    if stream["pair"]:
        return f"{stream['field']} and {stream['pair']}, as a pair"
    if stream["template"] == "chat":
        return f"{stream['field']}, as a chat ({percent(stream['loss_share'])} the assistant's)"
    return str(stream["field"])
