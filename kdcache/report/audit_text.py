"""The result of an audit as people read it."""

from __future__ import annotations

from typing import Any

from kdcache.report.text import table

HEADER = (
    "signal", "kind", "difference", "own noise", "passes at", "faithful", "loss", "passes at",
    "complete",
)  # fmt: skip


def audit_text(result: dict[str, Any]) -> str:
    """A table with a row for every signal, and what its numbers mean.

    Args:
        result: of `kdcache.dump.audit.audit`.
    """
    rows, units = [], []
    for name, signal in result["signals"].items():
        faithful, cut = signal["faithfulness"], signal["truncation"]
        row = [name, signal["kind"]]
        row += [_short(faithful[key]) for key in ("difference", "own_noise", "tolerance")]
        row.append("yes" if faithful["passed"] else "NO")
        if cut is None:
            row += ["-", "-", "-"]
        else:
            row += [_short(cut["loss"]), _short(cut["tolerance"])]
            row.append("yes" if cut["passed"] else "NO")
        rows.append(row)
        units.append(f"  {name}: difference is {faithful['unit']}{_more(faithful)}")
        if cut is not None:
            units.append(f"  {name}: loss is {cut['unit']}{_more(cut)}")
    verdict = "passed" if result["passed"] else "FAILED"
    share = f"{result['fraction']:.2%}"
    head = f"{result['cache']}: {result['samples']:,} samples ({share}) audited: {verdict}"
    return "\n".join([head, "", table(HEADER, rows), "", *units])


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}"


#: What is in the table already.
_SHOWN = ("difference", "own_noise", "tolerance", "passed", "unit", "loss", "deterministic")


def _more(values: dict[str, Any]) -> str:
    """Further numbers of a kind."""
    found = [
        f"{key.replace('_', ' ')} {_short(value)}"
        for key, value in values.items()
        if key not in _SHOWN and isinstance(value, float | int)
    ]
    return f"; {', '.join(found)}" if found else ""
