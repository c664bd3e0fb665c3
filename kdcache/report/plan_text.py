"""The result of a plan as people read it: tables for a terminal, and a page with a picture."""

from __future__ import annotations

from typing import Any

from kdcache.report.page import page, preformatted, section
from kdcache.report.page import table as html_table
from kdcache.report.svg import Line, line_chart
from kdcache.report.text import size, table

SIGNALS = ("signal", "size", "share", "time")
CODECS = (
    "codec", "bytes/token", "whole", "entries", "noise", "bias", "lost KL", "noise/|p-t| T=1",
    "T=2", "T=5",
)  # fmt: skip


def plan_text(result: dict[str, Any]) -> str:
    """Everything a plan says, in tables.

    Args:
        result: of `kdcache.dump.plan.plan`.
    """
    lines = [_head(result), "", table(SIGNALS, _signal_rows(result))]
    for name, codecs in result["codecs"].items():
        lines += ["", f"codecs for {name!r} on this teacher:", table(CODECS, _codec_rows(codecs))]
    return "\n".join([*lines, "", _advice(result)])


def _head(result: dict[str, Any]) -> str:
    pilot = result["pilot"]
    tokens = ", ".join(f"{name} {count:,}" for name, count in result["tokens"].items())
    return (
        f"{result['rows']:,} rows, foretold from a pilot of {pilot['samples']:,}; tokens: "
        f"{tokens}; shards: {result['shards']:,}; device: {result['device']}"
    )


def _signal_rows(result: dict[str, Any]) -> list[list[str]]:
    total = max(1, result["bytes"]["total"])
    return [
        [name, size(num), f"{num / total:.1%}", _duration(result["hours"].get(name))]
        for name, num in result["bytes"].items()
    ]


def _codec_rows(codecs: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for name, row in codecs.items():
        signal = row.get("noise_over_signal", {})
        rows.append(
            [
                name,
                f"{row['bytes_per_token']:,.1f}",
                size(row["bytes"]),
                _short(row.get("entries_per_token"), 1),
                *(_short(row.get(key)) for key in ("noise", "bias_l1", "lost_kl_nats")),
                *(_short(signal.get(key), 2) for key in ("1", "2", "5")),
            ]
        )
    return rows


def _short(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _duration(hours: float | None) -> str:
    """Hours, or minutes where there are few."""
    if hours is None:
        return "-"
    if hours < 1:
        return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"
    return f"{hours:,.1f} h"


def _advice(result: dict[str, Any]) -> str:
    found = result["recommendation"]
    words = " ".join(f"--{key} '{value}'" for key, value in found["overrides"].items())
    head = f"recommended ({size(found['bytes'])} in all): {words or 'the recipe as it is'}"
    return f"{head}\n  {found['text']}"


def plan_page(result: dict[str, Any], name: str) -> str:
    """The same as one HTML page, with bytes against noise as a picture.

    Args:
        result: of `kdcache.dump.plan.plan`.
        name: of the recipe.
    """
    cards = [
        section(
            "What it will take",
            "Data files of every signal over the whole corpus, and the time to make them here.",
            html_table(SIGNALS, _signal_rows(result), strong=len(result["bytes"]) - 1),
        )
    ]
    for signal, codecs in result["codecs"].items():
        cards.append(
            section(
                f"Bytes and noise of {signal}",
                "Lower is better on both axes. Labels of threshold and sampled are unbiased, so "
                "their noise averages out; all of topk's is bias.",
                line_chart(
                    _curves(codecs),
                    f"Noise over bytes per token for {signal}",
                    "bytes per token",
                    "root mean square of |label - teacher|",
                    log_y=True,
                )
                + html_table(CODECS, _codec_rows(codecs)),
                "Lost KL is that of the exact head with a uniform tail, in nats. |p - t| is the "
                "distance of a stand-in student, the teacher with a third of its input garbled.",
            )
        )
    cards.append(section("Recommendation", "", preformatted(_advice(result))))
    return page(f"Plan of {name}", _head(result), cards, "kdcache dump --plan")


def _curves(codecs: dict[str, dict[str, Any]]) -> list[Line]:
    """Families of codecs as lines over their bytes."""
    families: dict[str, list[tuple[float, float]]] = {}
    for name, row in codecs.items():
        if row.get("noise"):
            point = row["bytes_per_token"], row["noise"]
            families.setdefault(name.split()[0], []).append(point)
    return [Line(family, sorted(points)) for family, points in families.items() if family != "the"]
