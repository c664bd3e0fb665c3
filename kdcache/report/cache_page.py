"""The report of a cache: what it weighs, what its labels say, how they were made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.signals import LogitsRecord
from kdcache.recipe.tree import write_yaml
from kdcache.report.charts import Curve, Reliability, curves, histogram, reliability
from kdcache.report.commits import committed
from kdcache.report.document import Code, Document, Labels, Section, Table
from kdcache.report.inspect import inspect_cache
from kdcache.report.label_statistics import LabelStatistics, label_statistics, reliability_bins
from kdcache.report.page import Entry
from kdcache.report.pictures import SERIES
from kdcache.report.run_page import footer
from kdcache.report.runs import versions_text
from kdcache.report.text import percent, size

#: Samples among which the one with the most telling labels is shown.
_CANDIDATES = 50
_SHOWN_ENTRIES = 4
#: Bins with fewer labels say nothing.
_FEWEST = 20


def cache_document(path: str) -> Document:
    """The report of a cache.

    Args:
        path: its directory or URL.
    """
    cache, found = open_cache(path), inspect_cache(path, num_samples=_CANDIDATES)
    rows: list[list[Section]] = [[_signals(found)]]
    commits = committed(cache)
    for name, record in cache.signals.items():
        if isinstance(record, LogitsRecord):
            statistics = label_statistics(record, commits[name])
            if statistics is not None:
                rows += _labels(name, record, statistics, found["signals"][name])
    rows += [[section] for section in (_sample(found),) if section is not None]
    rows.append([_provenance(cache, found)])
    corpus = found["corpus"]
    name = str(path).rstrip("/").rsplit("/", 1)[-1]
    return Document(
        f"Cache {name}",
        f"{corpus['num_samples']:,} samples and what a teacher says of them, "
        f"{size(found['bytes']['total'])} in {_shards(found['num_shards'])}.",
        rows,
        footer(found["versions"].get("kdcache", "")),
    )


def _shards(number: int) -> str:
    return "one shard" if number == 1 else f"{number:,} shards"


def _signals(found: Mapping[str, Any]) -> Section:
    """Streams and signals in numbers."""
    streams = [
        [name, stream["num_tokens"], stream["tokens_per_sample"], stream["tokenizer"]]
        for name, stream in found["streams"].items()
    ]
    signals = [
        [
            name,
            signal["kind"],
            signal["stream"],
            _codec(signal),
            size(signal["bytes"]),
            signal["bytes_per_stream_token"],
            signal.get("teacher_loss_nats"),
        ]
        for name, signal in found["signals"].items()
    ]
    header = ["signal", "kind", "stream", "codec", "size", "bytes/token", "teacher loss"]
    return Section(
        "What it holds",
        "",
        [
            Table(header, signals),
            Table(["stream", "tokens", "tokens/sample", "tokenizer"], streams),
        ],
        "Bytes of a signal over the tokens of its stream, all columns. Teacher loss in nats a "
        "token, on the targets.",
    )


def _codec(signal: Mapping[str, Any]) -> str:
    """A codec in a word."""
    codec = signal.get("codec")
    if not codec:
        return str(signal.get("values") or "-")
    if codec["name"] == "threshold":
        return f"threshold, c = 1/{1 / codec['c']:g}"
    figures = ", ".join(
        f"{key} = {codec[key]:g}" for key in ("k", "n", "p", "k_max") if key in codec
    )
    return f"{codec['name']}, {figures}".rstrip(", ")


def _labels(
    name: str, record: LogitsRecord, statistics: LabelStatistics, signal: Mapping[str, Any]
) -> list[list[Section]]:
    """Distributions of the labels of one signal."""
    number = len(statistics.entropy)
    note = f"Signal {name}, {number:,} labels."
    entropy = histogram(
        f"{name}-entropy",
        f"Distribution of the teacher's entropy, mean {statistics.entropy.mean():.2f} nats",
        statistics.entropy,
        "entropy, nats",
    )
    first = [Section("How unsure the teacher is", "Entropy of its distribution.", [entropy], note)]
    if statistics.head is not None:
        mass = histogram(
            f"{name}-head",
            "Distribution of the mass that entries kept exactly have, mean "
            f"{statistics.head.mean():.3f}",
            statistics.head,
            "mass of the exact entries",
            top=1.0,
        )
        share = percent(float((statistics.head >= 0.9).mean()))
        first.append(
            Section(
                "How much of it is kept exactly",
                "Mass of the head; the rest is drawn, or a tail of which the sum is known.",
                [mass],
                f"{note} In {share} of them the head has 0.9 or more.",
            )
        )
    rows = [first]
    second = []
    if statistics.kept is not None:
        second.append(_sizes(name, record, statistics, signal))
    if statistics.hit is not None and statistics.sure is not None:
        kept = statistics.sure > 0
        found = reliability_bins(statistics.sure[kept], statistics.hit[kept])
        bins = [one for one in found if one[2] >= _FEWEST]
        if bins:
            model = Reliability("teacher", bins, SERIES[2])
            alt = f"Reliability diagram of the teacher, calibration error {model.error:.3f}"
            second.append(
                Section(
                    "Calibration of the teacher",
                    "How often its likeliest token was the target, by how sure it was. Below the "
                    "dotted line it is surer than it is right.",
                    [reliability(f"{name}-calibration", alt, [model])],
                    f"{note} In brackets: expected calibration error over ten bins. Positions "
                    f"whose likeliest token is in the cache: {percent(float(kept.mean()))}.",
                )
            )
    return [*rows, second] if second else rows


def _sizes(
    name: str, record: LogitsRecord, statistics: LabelStatistics, signal: Mapping[str, Any]
) -> Section:
    """Mass that the k likeliest ids have, over their bytes, and where this cache stands."""
    assert statistics.kept is not None
    bytes_of_id = 3 if record.vocab_size <= 1 << 24 else 4
    curve = [(1 + bytes_of_id * (k + 1), float(mass)) for k, mass in enumerate(statistics.kept)]
    # Entries beyond those that are stored add nothing that is known.
    grown = [n for n in range(1, len(curve)) if curve[n][1] > curve[n - 1][1] + 1e-4]
    curve = curve[: max([1, *[n + 1 for n in grown]])]
    here = signal["label_bytes_per_token"]
    head = 0.0 if statistics.head is None else float(statistics.head.mean())
    entries = float(statistics.entries.mean())
    picture = curves(
        f"{name}-size",
        f"Mean mass of the likeliest ids over the bytes of a label; this cache has {here:.1f} "
        f"bytes and keeps {head:.3f} exactly",
        [
            Curve("the k likeliest ids", curve),
            Curve("this cache, exact entries", [(here, head)], SERIES[1]),
        ],
        "label bytes a token",
        "mass kept exactly",
    )
    codec = _codec(signal)
    return Section(
        "Size against fidelity",
        f"{codec}: {entries:.1f} entries and {here:.1f} bytes a label, against "
        f"{signal['full_float16_bytes_per_token']:,} of full logits in float16.",
        [picture],
        "A top-k keeps what the curve says and loses the rest; labels that are drawn spend bytes "
        "on the rest too, and are right in the mean. The curve ends with the stored entries.",
    )


def _sample(found: Mapping[str, Any]) -> Section | None:
    """The most telling of some samples, with its soft labels."""
    best: tuple[float, Mapping[str, Any], Sequence[Mapping[str, Any]]] | None = None
    for sample in found["samples"]:
        for labels in sample["labels"].values():
            if not labels or not isinstance(labels[0], Mapping) or "entropy_nats" not in labels[0]:
                continue
            telling = sum(min(one["entropy_nats"], 0.7) for one in labels) / len(labels)
            telling -= abs(len(labels) - 14) / 40  # a page has room for some tokens
            if best is None or telling > best[0]:
                best = telling, sample, labels
    if best is None:
        return None
    _, sample, labels = best
    positions = []
    for position in labels[:40]:
        target = position["target"]
        entries = [
            Entry(token, weight, token == target, column == "drawn")
            for column in ("exact", "drawn")
            for token, weight in position.get(column, ())
        ]
        heaviest = sorted(entries, key=lambda entry: -entry.weight)[:_SHOWN_ENTRIES]
        positions.append((target, heaviest))
    fields = "  →  ".join(str(text)[:400] for text in sample["fields"].values())
    return Section(
        "A sample and its soft labels",
        fields,
        [Labels(positions)],
        f"Row {sample['row']} of the corpus, read back from the cache: the heaviest entries at "
        "every target token.",
    )


def _provenance(cache: Cache, found: Mapping[str, Any]) -> Section:
    """How it was made: digests, versions, lineage, the recipe."""
    manifest = cache.manifest
    digests = [
        ["corpus", manifest.corpus.digest],
        *([f"stream {name}", record.digest] for name, record in manifest.streams.items()),
        *([f"tokenizer {name}", record.digest] for name, record in manifest.tokenizers.items()),
        *([f"signal {name}", record.digest] for name, record in cache.signals.items()),
    ]
    teachers = [
        [f"teacher of {name}", str(signal["teacher"].get("digest", "-"))]
        for name, signal in found["signals"].items()
        if signal.get("teacher")
    ]
    blocks: list[Any] = [
        Table(["what", "digest"], [*digests, *teachers], words=True),
        Code(write_yaml(found["recipe"]), "yaml", "The resolved recipe"),
    ]
    if found["lineage"]:
        blocks.append(Code(write_yaml(found["lineage"]), "yaml", "Compiled from"))
    return Section("What it was made with", versions_text(found["versions"]), blocks)
