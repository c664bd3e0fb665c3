"""An inspection of a cache as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.report.text import listing, number, size, table

#: Positions of a sample and entries of a label that are shown; JSON has all.
MAX_POSITIONS = 12
MAX_ENTRIES = 4


def inspection_text(inspection: Mapping[str, Any]) -> str:
    """What `kdcache inspect` prints.

    Args:
        inspection: from `inspect_cache`.
    """
    blocks = [_head(inspection), _streams(inspection)]
    blocks += [
        _signal(name, signal, inspection["num_shards"])
        for name, signal in inspection["signals"].items()
    ]
    blocks += [_sample(sample) for sample in inspection["samples"]]
    return "\n\n".join(blocks)


def _head(inspection: Mapping[str, Any]) -> str:
    corpus = inspection["corpus"]
    dropped = ", ".join(f"{count:,} {why}" for why, count in corpus["dropped"].items() if count)
    sizes = ", ".join(
        f"{name} {size(value)}" for name, value in inspection["bytes"].items() if name != "total"
    )
    return listing(
        {
            "cache": inspection["path"],
            "format": f"version {inspection['format_version']}",
            "samples": f"{corpus['num_samples']:,} of {corpus['num_rows']:,} rows"
            + (f" ({dropped} left out)" if dropped else ""),
            "fields": corpus["fields"],
            "shards": inspection["num_shards"],
            "size": f"{size(inspection['bytes']['total'])} ({sizes})",
            "corpus": corpus["digest"],
            "made with": ", ".join(f"{k} {v}" for k, v in inspection["versions"].items()),
        }
    )


def _streams(inspection: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            stream["field"],
            stream["tokenizer"],
            stream["vocab_size"],
            stream["num_tokens"],
            stream["tokens_per_sample"],
        )
        for name, stream in inspection["streams"].items()
    ]
    return table(("stream", "field", "tokenizer", "ids", "tokens", "per sample"), rows)


def _signal(name: str, signal: Mapping[str, Any], num_shards: int) -> str:
    codec = dict(signal["codec"])
    settings = ", ".join(f"{key} {number(value)}" for key, value in codec.items() if key != "name")
    entries = ", ".join(f"{v:.2f} {k}" for k, v in signal["entries_per_token"].items())
    teacher = signal["teacher"]
    full = signal["full_float16_bytes_per_token"]
    done = signal["num_shards_committed"]
    unfinished = "" if done == num_shards else f" (unfinished: {done} of {num_shards} shards)"
    values = {
        "signal": f"{name}: {signal['kind']} of {signal['stream']}{unfinished}",
        "teacher": f"{teacher['path']} ({teacher['model_type']}, {teacher['dtype']}, "
        f"digest {teacher['digest'][:16]})",
        "codec": f"{codec['name']} ({settings})",
        "temperatures": signal["temperatures"],
        "tokens": signal["num_tokens"],
        "entries per token": entries or "-",
        "bytes per token": f"{signal['bytes_per_token']:.2f}, labels alone "
        f"{signal['label_bytes_per_token']:.2f} (all {signal['vocab_size']:,} ids in float16: "
        f"{full:,})",
    }
    if signal["teacher_loss_nats"] is not None:
        values["teacher's loss"] = (
            f"{signal['teacher_loss_nats']:.3f} nats a token, perplexity "
            f"{signal['teacher_perplexity']:.2f}; entropy {signal['entropy_nats']:.3f} nats"
        )
    return listing(values)


def _sample(sample: Mapping[str, Any]) -> str:
    lines = [f"row {sample['row']:,}"]
    width = max(len(name) for name in sample["fields"])
    lines += [f"  {name:<{width}}  {text}" for name, text in sample["fields"].items()]
    for name, positions in sample["labels"].items():
        rows = [
            (
                position["target"],
                f"{position['target_probability']:.3f}",
                f"{position['entropy_nats']:.2f}",
                _label(position),
            )
            for position in positions[:MAX_POSITIONS]
        ]
        text = table(("target", "p", "entropy", f"{name}: exact | drawn | rest"), rows)
        lines += [f"  {line}" for line in text.split("\n")]
        if len(positions) > MAX_POSITIONS:
            lines.append(f"  ... {len(positions) - MAX_POSITIONS} more positions")
    return "\n".join(lines)


def _label(position: Mapping[str, Any]) -> str:
    """Entries of one position: `the .61 a .20 | an .06 | .13`."""
    cells = []
    for column in ("exact", "drawn"):
        entries = position.get(column)
        if entries is None:
            continue
        shown = " ".join(f"{token} {weight:.3f}" for token, weight in entries[:MAX_ENTRIES])
        left = position[f"num_{column}"] - min(len(entries), MAX_ENTRIES)
        more = f" +{left}" if left else ""
        cells.append(shown + more or "-")
    if "tail_mass" in position:
        cells.append(f"{position['tail_mass']:.3f}")
    return " | ".join(cells)
