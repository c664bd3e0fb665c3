"""The decoded samples of an inspection as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdcache.report.signal_text import ranges
from kdcache.report.text import number, one_line, table

#: What is shown of a sample: letters of a field, tokens of a stream, labels of a signal,
#: hypotheses or maskings, entries of a label. JSON has all.
MAX_LETTERS = 300
MAX_TOKENS = 60
MAX_POSITIONS = 12
MAX_HYPOTHESES = 4
MAX_ENTRIES = 4

Block = Mapping[str, Any]


def sample_text(sample: Block, signals: Mapping[str, Block]) -> str:
    """One decoded sample.

    Args:
        sample: from `inspect_cache`.
        signals: its signals.
    """
    task = f" (task {sample['task']})" if sample["task"] else ""
    texts = {name: one_line(text, MAX_LETTERS) for name, text in sample["fields"].items()}
    for name, tokens in sample["tokens"].items():
        if marked := _marked(tokens, sample["extras"][name]):
            texts[f"{name} tokens" if name in texts else name] = _tokens(marked)
    width = max((len(name) for name in texts), default=0)
    lines = [f"row {sample['row']:,}{task}"]
    lines += [f"  {name:<{width}}  {text}".rstrip() for name, text in texts.items()]
    for name, labels in sample["labels"].items():
        shown = _OF_KIND[signals[name]["kind"]](signals[name], labels, sample)
        if len(shown) == 1:
            lines.append(f"  {name}: {shown[0]}")
        elif shown:
            lines += [f"  {name}:", *(f"    {line}" for line in shown)]
    return "\n".join(lines)


def _tokens(tokens: Sequence[str]) -> str:
    """Tokens in one line, the rest of many counted."""
    more = f" ... {len(tokens) - MAX_TOKENS:,} more" if len(tokens) > MAX_TOKENS else ""
    return one_line(" ".join(tokens[:MAX_TOKENS])) + more


def _marked(tokens: Sequence[str], extras: Mapping[str, Sequence[int]]) -> list[str]:
    """A pair with a bar before its second text, a chat with the assistant's words in brackets."""
    out: list[str] = []
    for n, token in enumerate(tokens):
        if "loss" in extras:
            loss = [0, *extras["loss"], 0][n : n + 3]  # of the token and its neighbours
            begins, ends = loss[1] and not loss[0], loss[1] and not loss[2]
            out.append(("[" if begins else "") + token + ("]" if ends else ""))
        elif "segment" in extras:
            segments = extras["segment"]
            out += ["|"] if n and segments[n] != segments[n - 1] else []
            out.append(token)
    return out


def _rest(count: int, most: int, what: str) -> list[str]:
    """A line that counts what is not shown."""
    return [f"... {count - most:,} more {what}"] if count > most else []


def _logits(signal: Block, labels: Sequence[Block], sample: Block) -> list[str]:
    if not labels:
        return ["no labels here"]
    kept = [column for column in ("exact", "drawn") if column in labels[0]]
    heads = [*kept, "rest"] if "tail_mass" in labels[0] else kept
    places = [key for key in ("replica", "hypothesis") if key in labels[0]]
    if signal["at"] != "targets":
        places.append("position")
    rows = [
        (
            *(label[place] for place in places),
            one_line(label["target"]),
            f"{label['target_probability']:.3f}",
            f"{label['entropy_nats']:.2f}",
            _label(label),
        )
        for label in labels[:MAX_POSITIONS]
    ]
    text = table((*places, "target", "p", "entropy", " | ".join(heads)), rows)
    return [*text.split("\n"), *_rest(len(labels), MAX_POSITIONS, "labels")]


def _label(label: Block) -> str:
    """Entries of one position: `the .61 a .20 | an .06 | .13`."""
    cells = []
    for column in ("exact", "drawn"):
        entries = label.get(column)
        if entries is None:
            continue
        shown = " ".join(f"{one_line(token)} {w:.3f}" for token, w in entries[:MAX_ENTRIES])
        left = label[f"num_{column}"] - min(len(entries), MAX_ENTRIES)
        more = f" +{left:,}" if left else ""
        cells.append(shown + more or "-")
    if "tail_mass" in label:
        cells.append(f"{label['tail_mass']:.3f}")
    return " | ".join(cells)


def _beams(signal: Block, labels: Sequence[Block], sample: Block) -> list[str]:
    if not labels:
        return ["no hypotheses"]
    rows = [
        (f"{found['log_prob_nats']:.3f}", f"{found['score']:.3f}", _tokens(found["tokens"]))
        for found in labels[:MAX_HYPOTHESES]
    ]
    text = table(("log-prob", "score", "tokens"), rows)
    return [*text.split("\n"), *_rest(len(labels), MAX_HYPOTHESES, "hypotheses")]


def _masks(signal: Block, labels: Sequence[Sequence[Block]], sample: Block) -> list[str]:
    lines = []
    for masked in labels[:MAX_HYPOTHESES]:
        tokens = list(sample["tokens"][signal["stream"]])
        for found in masked:
            tokens[found["position"]] = f"{{{found['token']} -> {found['shown']}}}"
        lines.append(_tokens(tokens))
    return lines + _rest(len(labels), MAX_HYPOTHESES, "maskings")


def _classes(
    signal: Block, labels: Sequence[Sequence[tuple[str, float]]], sample: Block
) -> list[str]:
    lines = []
    for scores in labels[:MAX_HYPOTHESES]:
        shown = ", ".join(f"{label} {score:.3f}" for label, score in scores[:MAX_ENTRIES])
        more = f" +{len(scores) - MAX_ENTRIES:,}" if len(scores) > MAX_ENTRIES else ""
        lines.append(shown + more)
    return lines + _rest(len(labels), MAX_HYPOTHESES, "maskings")


def _hidden(signal: Block, labels: Block, sample: Block) -> list[str]:
    layers = "layer" if len(signal["layers"]) == 1 else "layers"
    sizes = ", ".join(f"{rms:.3f}" for rms in labels["rms_of_layers"])
    return [
        f"{number(labels['num_rows'])} rows, root mean square of {layers} "
        f"{ranges(signal['layers'])}: {sizes or '-'}"
    ]


def _attention(signal: Block, labels: Sequence[Block], sample: Block) -> list[str]:
    layers = signal["layers"]
    # First, middle and last show how attention goes; a screen has no room for all layers.
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    rows = [
        (
            one_line(label["query"]),
            *(f"{one_line(token)} {weight:.2f}" for token, weight in _at(label, shown)),
        )
        for label in labels[:MAX_POSITIONS]
    ]
    text = table(("token", *(f"most in layer {layers[n]}" for n in shown)), rows)
    return [*text.split("\n"), *_rest(len(labels), MAX_POSITIONS, "tokens")]


def _at(label: Block, layers: Sequence[int]) -> list[tuple[str, float]]:
    """The most attended keys of some layers."""
    return [label["most_attended"][n] for n in layers]


_OF_KIND: dict[str, Callable[[Block, Any, Block], list[str]]] = {
    "logits": _logits,
    "hidden": _hidden,
    "attention": _attention,
    "beams": _beams,
    "classes": _classes,
    "masks": _masks,
}
