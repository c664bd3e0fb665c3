"""What came of the quickstart: a table for the terminal and a page with pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.quickstart.plan import Paths, student_name
from kdcache.report import page, svg
from kdcache.report.inspect import inspect_cache
from kdcache.report.text import table

COLUMNS = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "dev_loss_nats": "dev loss",
    "parameters": "parameters",
    "sentences_per_second": "sentences/s",
}
#: Samples of the cache among which the one with the most telling labels is shown.
CANDIDATES = 200
#: Entries shown of one soft label.
SHOWN_ENTRIES = 4


def summary_text(result: Mapping[str, Any]) -> str:
    """The table, the paired test and where the report lies.

    Args:
        result: what `kdcache.quickstart.story.run` returns.
    """
    rows = [
        (name, *(round(row[key], 3) for key in COLUMNS)) for name, row in result["models"].items()
    ]
    return "\n".join(
        [
            table(["", *COLUMNS.values()], rows),
            "",
            _verdict(result),
            f"report: {result['report']} ({result['seconds']:.0f} s)",
        ]
    )


def report_page(paths: Paths, result: Mapping[str, Any]) -> str:
    """The whole page as HTML.

    Args:
        paths: of a finished quickstart.
        result: what `kdcache.quickstart.story.run` returns.
    """
    cache = inspect_cache(paths.cache, num_samples=CANDIDATES)
    teacher = result["models"]["teacher"]
    student = result["models"]["student with cache"]
    smaller = teacher["parameters"] / student["parameters"]
    pairs = cache["corpus"]["num_samples"]
    lead = (
        f"A teacher that had learned from {_num_lines(paths):,} sentence pairs of a made-up "
        f"language pair read {pairs:,} of them once and left its soft labels in a cache. Two "
        f"students, {smaller:.1f} times smaller, learned from those {pairs:,} pairs with the same "
        "settings: one from the references alone, one from the cache as well."
    )
    return page.page(
        "kdcache quickstart",
        lead,
        [
            _scores(result),
            page.side_by_side(_curves(paths, result), _bleu(result)),
            page.side_by_side(_bytes(cache), _tuning(result)),
            _sample(cache["samples"]),
            _commands(paths, result),
        ],
        f"Made by kdcache {cache['versions'].get('kdcache', '')} with the codec "
        f"{_codec(cache)}. Nothing on this page is fetched from anywhere.",
    )


def _num_lines(paths: Paths) -> int:
    """Sentence pairs that the teacher learned from."""
    return len(paths.text("train", "src").read_text(encoding="utf-8").splitlines())


def _verdict(result: Mapping[str, Any]) -> str:
    """The paired test of the two students, and what it does not cover."""
    test = result["paired_test"]["bleu"]
    if test["difference"] == 0:
        return "Both students have the same BLEU."
    return (
        f"The student with the cache differs by {test['difference']:+.1f} BLEU from the one "
        f"without (paired bootstrap, p = {test['p_value']:.3f}). One training run of each: the "
        "test covers which sentences were drawn, not which seed."
    )


def _scores(result: Mapping[str, Any]) -> str:
    formats = ("{:.1f}", "{:.1f}", "{:.3f}", "{:,}", "{:,.0f}")
    rows = [
        [name, *(form.format(row[key]) for form, key in zip(formats, COLUMNS, strict=True))]
        for name, row in result["models"].items()
    ]
    signature = result["paired_test"]["bleu"]["signature"]
    return page.section(
        "Scores on the test set",
        _verdict(result),
        page.table(["model", *COLUMNS.values()], rows),
        f"Dev loss in nats per token on the references. BLEU: sacreBLEU, {signature}.",
    )


def _curves(paths: Paths, result: Mapping[str, Any]) -> str:
    runs = {
        "without cache": student_name(result["learning_rate"]),
        "with cache": "word-level",
    }
    lines = [
        svg.Line(name, _dev_losses(paths.run(run)), color)
        for (name, run), color in zip(runs.items(), (svg.SERIES[1], svg.SERIES[0]), strict=True)
    ]
    return page.section(
        "Learning curves",
        "Loss of both students on the references of the dev set.",
        svg.line_chart(
            lines,
            "Dev loss of both students over steps",
            "steps",
            "nats per token, logarithmic",
            width=460,
            height=270,
            log_y=True,
        ),
    )


def _dev_losses(run: Path) -> list[tuple[float, float]]:
    """(step, dev loss) of a run's metrics."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    return [(line["step"], line["dev_loss"]) for line in metrics if "dev_loss" in line]


def _bleu(result: Mapping[str, Any]) -> str:
    colors = (svg.SERIES[2], svg.SERIES[1], svg.SERIES[0])
    bars = [
        svg.Bar(name, row["bleu"], f"{row['bleu']:.1f}", color)
        for (name, row), color in zip(result["models"].items(), colors, strict=True)
    ]
    test = result["paired_test"]["bleu"]
    return page.section(
        "BLEU",
        "Beam search with four beams on sentences none of the models has seen.",
        svg.bar_chart(bars, "BLEU of the three models", width=450),
        "95% intervals by bootstrap: without cache "
        f"{test['baseline']:.1f} ± {test['baseline_interval']:.1f}, with cache "
        f"{test['score']:.1f} ± {test['interval']:.1f}.",
    )


def _bytes(cache: Mapping[str, Any]) -> str:
    signal = cache["signals"]["logits"]
    sizes = {
        "full logits, float16": signal["full_float16_bytes_per_token"],
        "cache, all columns": signal["bytes_per_token"],
        "its labels alone": signal["label_bytes_per_token"],
    }
    bars = [
        svg.Bar(name, value, f"{value:,.0f}", svg.SERIES[1] if n == 0 else svg.SERIES[0])
        for n, (name, value) in enumerate(sizes.items())
    ]
    entries = sum(signal["entries_per_token"].values())
    return page.section(
        "Bytes per token",
        f"The cache keeps {entries:.1f} of {signal['vocab_size']} entries per token, drawn so that "
        "the label stays unbiased.",
        svg.bar_chart(bars, "Bytes per token of the cache and of full logits", width=450),
        "Full logits grow with the vocabulary (64,000 bytes at 32,000 ids), the cache hardly does.",
    )


def _tuning(result: Mapping[str, Any]) -> str:
    rates = result["learning_rates"]
    rows = [[lr, f"{loss:.3f}"] for lr, loss in rates.items()]
    best = list(rates).index(f"{result['learning_rate']:g}")
    return page.section(
        "A fair start",
        "The learning rate was tuned for the student without the cache; the student with it "
        "took the best of them as it is.",
        page.table(["peak learning rate", "best dev loss, no cache"], rows, strong=best),
    )


def _sample(samples: Sequence[Mapping[str, Any]]) -> str:
    sample = max(samples, key=_telling)
    positions = []
    for position in sample["labels"]["logits"]:
        target = position["target"]
        entries = [
            page.Entry(token, weight, token == target, column == "drawn")
            for column in ("exact", "drawn")
            for token, weight in position.get(column, ())
        ]
        heaviest = sorted(entries, key=lambda entry: -entry.weight)[:SHOWN_ENTRIES]
        positions.append((target, heaviest))
    fields = sample["fields"]
    return page.section(
        "A sample and its soft labels",
        f"{fields['src']}  →  {fields['tgt']}",
        page.soft_labels(positions),
        f"Row {sample['row']} of the corpus, read back from the cache: the heaviest entries at "
        "every target token. A reference shows one word; the teacher also says which others "
        "would have done.",
    )


def _telling(sample: Mapping[str, Any]) -> float:
    """How much a sample's labels say beyond its reference; a page has room for some tokens."""
    entropies = [float(position["entropy_nats"]) for position in sample["labels"]["logits"]]
    if not 8 <= len(entropies) <= 18:
        return -1.0
    # Several words in doubt tell more than one that is wide open.
    return sum(min(entropy, 0.7) for entropy in entropies) / len(entropies)


def _codec(cache: Mapping[str, Any]) -> str:
    codec = cache["signals"]["logits"]["codec"]
    return f"{codec['name']}, c = 1/{1 / codec['c']:.0f}"


def _commands(paths: Paths, result: Mapping[str, Any]) -> str:
    no_kd = student_name(result["learning_rate"])
    lines = [
        "kdcache dump recipes/teacher.yaml --out tokens",
        "kdcache train recipes/teacher.yaml --cache tokens --out runs/teacher",
        "kdcache dump recipes/word-level.yaml --out cache",
        f"kdcache train recipes/{no_kd}.yaml --cache cache --out runs/{no_kd}",
        "kdcache train recipes/word-level.yaml --cache cache --out runs/word-level",
        f"kdcache evaluate runs/{no_kd}",
        f"kdcache evaluate runs/word-level --against runs/{no_kd}",
        "kdcache inspect cache",
    ]
    return page.section(
        "The same by hand",
        "Every step above is one command. The recipes lie beside this page; finished steps are "
        "not done again, so change an output's name to run one anew.",
        page.preformatted("\n".join([f"cd {paths.out}", *lines])),
    )
