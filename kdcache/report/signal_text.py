"""The signals of an inspection as text: a table of all, and a block for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdcache.report.text import listing, number, percent, size, table

#: Labels of a classifier that are shown; JSON has all.
MAX_LABELS = 12

Block = Mapping[str, Any]
Lines = dict[str, Any]


def signals_table(signals: Mapping[str, Block]) -> str:
    """All signals of an inspection, a line each.

    Args:
        signals: name to its part of `inspect_cache`.
    """
    rows = [
        (
            name,
            signal["kind"],
            signal["stream"],
            size(signal["bytes"]),
            signal["bytes_per_stream_token"],
        )
        for name, signal in signals.items()
    ]
    return table(("signal", "kind", "stream", "size", "bytes per token"), rows)


def signal_text(name: str, signal: Block, num_shards: int) -> str:
    """One signal of an inspection.

    Args:
        name: of the signal.
        signal: its part of `inspect_cache`.
        num_shards: shards of the cache.
    """
    title, lines = _OF_KIND[signal["kind"]](signal)
    head = {"signal": f"{name}: {title}{_given(signal)}{_unfinished(signal, num_shards)}"}
    if signal["teacher"] is not None:
        head["teacher"] = _teacher(signal["teacher"])
    return listing(head | lines)


def _unfinished(signal: Block, num_shards: int) -> str:
    """How many shards there are while that is not all of them."""
    done, first = signal["num_shards_committed"], signal["num_shards_from_first"]
    if done == num_shards:
        return ""
    gap = "" if first == done else f", {first:,} from the first without a gap"
    return f" (unfinished: {done:,} of {num_shards:,} shards{gap})"


def _given(signal: Block) -> str:
    """What an encoder read besides, and which maskings."""
    masks = f", masked by {signal['masks']}" if signal["masks"] else ""
    return (f" given {signal['source']}" if signal["source"] else "") + masks


def _teacher(teacher: Block) -> str:
    """Where it came from and what identifies it."""
    ensemble = ""
    if teacher["members"]:
        ensemble = f"mean {teacher['average']} of {len(teacher['members'])}, "
    revision = f", revision {teacher['revision'][:12]}" if teacher["revision"] else ""
    return (
        f"{teacher['path']} ({ensemble}{teacher['model_type']}, {teacher['dtype']}{revision}, "
        f"digest {teacher['digest'][:16]})"
    )


def _settings(values: Block, *hidden: str) -> str:
    """Settings in one line, those without a value left out."""
    shown = {k: v for k, v in values.items() if k not in hidden and v not in (None, {}, [])}
    return ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in shown.items())


def _sizes(signal: Block, more: str = "") -> str:
    """All bytes, and those of a token of the stream."""
    if signal["bytes_per_stream_token"] is None:
        return size(signal["bytes"])
    return f"{size(signal['bytes'])}: {signal['bytes_per_stream_token']:,.2f} bytes a token{more}"


def _logits(signal: Block) -> tuple[str, Lines]:
    what = {
        "targets": signal["stream"],
        "positions": f"{signal['stream']}, every token from those before it",
        "masked": f"the masked tokens of {signal['stream']}",
        "segment": f"the masked segments of {signal['stream']}",
        "segment_in_place": f"the masked segments of {signal['stream']}, in their places",
    }[signal["at"]]
    if signal["hypotheses"]:
        every = signal["hypothesis"] == "all"
        which = "all hypotheses" if every else f"hypothesis {signal['hypothesis']}"
        what = f"{which} of {signal['hypotheses']}"
    entries = ", ".join(f"{v:.2f} {k}" for k, v in signal["entries_per_token"].items())
    lines = {
        "codec": _codec(signal),
        "labels": f"{signal['num_tokens']:,}" + (f", each {entries}" if entries else ""),
        "bytes per token": f"{signal['bytes_per_token']:,.2f}, entries alone "
        f"{signal['label_bytes_per_token']:,.2f} (all {signal['vocab_size']:,} ids in float16: "
        f"{signal['full_float16_bytes_per_token']:,})",
        "size": size(signal["bytes"]),
    }
    if signal["teacher_loss_nats"] is not None:
        lines["teacher's loss"] = (
            f"{signal['teacher_loss_nats']:.3f} nats a token, perplexity "
            f"{signal['teacher_perplexity']:.2f}; entropy {signal['entropy_nats']:.3f} nats"
        )
    return f"logits of {what}", lines


def _codec(signal: Block) -> str:
    """How labels are coded, and at which temperatures they know what they left out."""
    codec = signal["codec"]
    drawn = list(codec.get("temperatures", [1.0]))
    shown = f"{codec['name']} ({_settings(codec, 'name', 'temperatures')})"
    if drawn != [1.0]:
        shown += f", drawn for temperatures {number(drawn)}"
    if codec["name"] in ("sampled", "full"):
        return shown
    return f"{shown}, tail at temperatures {number(signal['temperatures'])}"


def _hidden(signal: Block) -> tuple[str, Lines]:
    row = {
        "none": "one a token",
        "cls": "one a sample, its first token",
        "mean": "one a sample, the mean over its tokens",
    }[signal["pool"]]
    zero = " (0 is the embedding output)" if 0 in signal["layers"] else ""
    lines = {
        "layers": ranges(signal["layers"]) + zero,
        "values": f"{signal['width']:,} a layer, {signal['values']}",
        "rows": f"{signal['num_rows']:,}, {row}{_replicas(signal)}",
        "size": _dense_size(signal),
    }
    return f"hidden states of {signal['stream']}, {signal['side']}", lines


def _attention(signal: Block) -> tuple[str, Lines]:
    heads = "the mean of all heads" if signal["averaged"] else f"{signal['heads']} heads"
    lines = {
        "layers": ranges(signal["layers"]),
        "values": f"{heads} of every layer, {signal['values']}",
        "rows": f"{signal['num_rows']:,}, one a query and key{_replicas(signal)}",
        "size": _dense_size(signal),
    }
    return f"self-attention over {signal['stream']}, {signal['side']}", lines


def _replicas(signal: Block) -> str:
    """How many maskings there are of every sample."""
    replicas = signal["num_replicas"]
    return "" if replicas == 1 else f"; {replicas} maskings of every sample"


def _dense_size(signal: Block) -> str:
    """Bytes of a token, of a layer of it, and how much of them is no padding."""
    if not signal["num_rows"]:
        return size(signal["bytes"])
    used = signal["row_bytes"] / signal["bytes_per_row"]
    layer = f", {signal['bytes_per_token_and_layer']:,.2f} a layer of it"
    return _sizes(signal, layer) + f" ({percent(used)} are values, the rest fills chunks)"


def _beams(signal: Block) -> tuple[str, Lines]:
    per_sample = signal["hypotheses_per_sample"]
    lines = {
        "decoding": _settings(signal["decoding"], "num_hypotheses"),
        "hypotheses": "-" if per_sample is None else f"{per_sample:.2f} a sample, best first",
    }
    for key in ("best", "all") if signal["num_hypotheses"] > 1 else ("best",):
        if signal[key]["num_hypotheses"]:
            lines[key] = _means(signal[key], signal["stream"])
    lines["size"] = _sizes(signal, f" of {signal['stream']}")
    return f"hypotheses in {signal['stream']}", lines


def _means(found: Block, stream: str) -> str:
    """Means over some hypotheses."""
    ratio, per_token = found.get("length_ratio"), found["log_prob_per_token_nats"]
    return (
        f"{found['mean_length']:.2f} tokens"
        + ("" if ratio is None else f" ({ratio:.3f} times {stream})")
        + f", log-prob {found['mean_log_prob_nats']:.3f} nats"
        + ("" if per_token is None else f" ({per_token:.3f} a token)")
        + f", score {found['mean_score']:.3f}"
    )


def _classes(signal: Block) -> tuple[str, Lines]:
    of = _replicas(signal) or f" of {signal['num_samples']:,} samples"
    lines: Lines = {"inputs": f"{signal['num_described']:,}{of}"}
    if signal["num_measured"]:
        lines |= _scores(signal) if signal["problem"] == "regression" else _predicted(signal)
    lines["size"] = f"{size(signal['bytes'])}, {signal['values']}"
    task = f" (task {signal['task']})" if signal["task"] else ""
    problem = signal["problem"].replace("multi_label", "multi-label classification")
    return f"{problem} of {signal['stream']}{task}", lines


def _predicted(signal: Block) -> Lines:
    """Which labels, how surely, how rightly."""
    pairs = sorted(signal["predicted"].items(), key=lambda pair: -pair[1])
    shown = ", ".join(f"{label} {percent(share)}" for label, share in pairs[:MAX_LABELS])
    more = f", and {len(pairs) - MAX_LABELS} more labels" if len(pairs) > MAX_LABELS else ""
    lines = {"predicted": shown + more, "entropy": f"{signal['entropy_nats']:.3f} nats"}
    if signal["gold_accuracy"] is not None:
        lines["against gold"] = f"{percent(signal['gold_accuracy'])} are right"
    return lines


def _scores(signal: Block) -> Lines:
    """How scores are spread, and how they go with the gold ones."""
    lines = {
        label: f"mean {s['mean']:.3f}, standard deviation {s['std']:.3f}, "
        f"from {s['min']:.3f} to {s['max']:.3f}"
        for label, s in signal["scores"].items()
    }
    if signal["gold_pearson"] is not None:
        lines["against gold"] = f"Pearson correlation {signal['gold_pearson']:.3f}"
    return lines


def _masks(signal: Block) -> tuple[str, Lines]:
    lines: Lines = {
        "settings": _settings(signal["parameters"]) or "-",
        "masked": f"{signal['num_masked']:,} tokens",
    }
    if signal["share_masked"] is not None:
        lines["masked"] += f", {percent(signal['share_masked'])} of all"
    lines["masked"] += _replicas(signal)
    shares = signal["shares_of_masked"]
    if shares["mask"] is not None:
        lines["in their place"] = (
            f"the mask token {percent(shares['mask'])}, another token {percent(shares['other'])}, "
            f"the token itself {percent(shares['own'])}"
        )
    lines["size"] = _sizes(signal)
    return f"masks over {signal['stream']}, scheme {signal['scheme'].replace('_', ' ')}", lines


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in a line, those that follow one another drawn together: `0-6, 9, 12`."""
    runs: list[list[int]] = []
    for item in numbers:
        if runs and item == runs[-1][-1] + 1:
            runs[-1].append(item)
        else:
            runs.append([item])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


_OF_KIND: dict[str, Callable[[Block], tuple[str, Lines]]] = {
    "logits": _logits,
    "hidden": _hidden,
    "attention": _attention,
    "beams": _beams,
    "classes": _classes,
    "masks": _masks,
}
