"""The table of a sweep: runs that differ in their seed alone as one row, the best first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.report.text import table
from kdcache.sweep.folder import read_evaluation, read_state, read_summary
from kdcache.sweep.plan import RUNS, Settings, short_names, shown
from kdcache.train.evaluation.metrics import lower_is_better

SEED = "train.seed"
#: Short names of metrics, and where each stands.
_SHORT = {"dev_loss": "best_dev_loss", "bleu": "bleu.score", "chrf": "chrf.score"}


def outcome(out: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a sweep.

    Args:
        out: its folder.
        record: from `folder.read_sweep`.

    Returns:
        out, name, cache, metric, lower_is_better, runs (name, run, state (done, failed, waiting),
        settings, value (of the metric), failure, summary, evaluation) in the order of the plan,
        rows (settings without the seed, num_runs, mean, std (None of one run), min, max, runs:
        their names) best first, done, failed, waiting.
    """
    runs = [_run(out, one, record["metric"]) for one in record["runs"]]
    lower = lower_is_better(record["metric"])
    states = [run["state"] for run in runs]
    return {
        "out": str(out),
        "name": record["name"],
        "cache": record["cache"],
        "metric": record["metric"],
        "lower_is_better": lower,
        **{state: states.count(state) for state in ("done", "failed", "waiting")},
        "rows": _rows(runs, lower),
        "runs": runs,
    }


def metric_value(
    metric: str, summary: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None
) -> float | None:
    """A number of a run; None where it has none of that name.

    Args:
        metric: a short name, or a dotted key of the summary or the evaluation.
        summary: of the run.
        evaluation: of the run.
    """
    for tree in (summary, evaluation):
        node: Any = tree
        for key in _SHORT.get(metric, metric).split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        if isinstance(node, int | float) and math.isfinite(node):
            return float(node)
    return None


def metric_names(*trees: Mapping[str, Any] | None) -> list[str]:
    """The dotted keys of all numbers of a summary and an evaluation, short names where they have.

    Args:
        trees: of the run.
    """
    short = {dotted: name for name, dotted in _SHORT.items()}
    found: list[str] = []
    for tree in trees:
        for key, value in (tree or {}).items():
            if isinstance(value, Mapping):
                found += [f"{key}.{name}" for name in metric_names(value)]
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found.append(key)
    return list(dict.fromkeys(short.get(name, name) for name in found))


def _run(out: Path, one: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One run of the table."""
    stages = one.get("stages", [])  # older sweeps have none
    path = (out / RUNS / one["name"]).joinpath(*stages[-1:])
    summary, evaluation = read_summary(path), read_evaluation(path)
    if summary is not None:
        before = [read_summary(path.parent / stage) for stage in stages[:-1]]
        seconds = sum(part["seconds"] for part in before if part is not None)
        summary = summary | {"seconds": summary["seconds"] + seconds}
    failure = read_state(out, one["name"]).get("failed")
    state = "failed" if failure else "waiting" if summary is None else "done"
    return {
        "name": one["name"],
        "run": str(path),
        "state": state,
        "settings": one["settings"],
        "value": metric_value(metric, summary, evaluation),
        "failure": failure,
        "summary": summary,
        "evaluation": evaluation,
    }


def _rows(runs: Sequence[Mapping[str, Any]], lower: bool) -> list[dict[str, Any]]:
    """Finished runs by their settings without the seed; those without a value last."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["state"] == "done":
            groups.setdefault(repr(sorted(_but_seed(run["settings"]).items())), []).append(run)
    rows = []
    for group in groups.values():
        values = [run["value"] for run in group if run["value"] is not None]
        rows.append(
            {
                "settings": _but_seed(group[0]["settings"]),
                "num_runs": len(group),
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "min": min(values, default=None),
                "max": max(values, default=None),
                "runs": [run["name"] for run in group],
            }
        )
    sign = 1 if lower else -1
    return sorted(rows, key=lambda row: math.inf if row["mean"] is None else sign * row["mean"])


def _but_seed(settings: Settings) -> Settings:
    return {path: value for path, value in settings.items() if path != SEED}


def outcome_text(found: Mapping[str, Any]) -> str:
    """The table as text, what it means, and what failed.

    Args:
        found: from `outcome`.
    """
    rows, metric = found["rows"], found["metric"]
    lines = []
    if rows:
        lines = [table(*row_cells(found)), ""]
        way = "lower" if found["lower_is_better"] else "higher"
        spread = any(row["std"] is not None for row in rows)
        more = "; ± is the standard deviation over seeds" if spread else ""
        lines.append(f"best first by {metric}, {way} is better{more}")
        if all(row["mean"] is None for row in rows):
            lines[-1] = f"no run has a number {metric!r}; in the order of the sweep"
    counts = ", ".join(f"{found[state]} {state}" for state in ("done", "failed", "waiting"))
    lines.append(f"{found['out']}: {len(found['runs'])} runs, {counts}")
    return "\n".join(lines)


def row_cells(found: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and cells of the table.

    Args:
        found: from `outcome`.
    """
    rows, metric = found["rows"], found["metric"]
    paths = list(rows[0]["settings"]) if rows else []
    names = short_names(paths)
    by_name = {run["name"]: run for run in found["runs"]}
    header = [
        *(names[path] for path in paths),
        metric,
        "±",
        "seeds",
        "parameters",
        "seconds",
        "run",
    ]
    cells = []
    for row in rows:
        first = by_name[row["runs"][0]]["summary"]
        seconds = [by_name[name]["summary"]["seconds"] for name in row["runs"]]
        cells.append(
            [
                *(shown(row["settings"][path]) for path in paths),
                row["mean"],
                row["std"],
                row["num_runs"],
                first["parameters"],
                round(statistics.fmean(seconds), 1),
                row["runs"][0],
            ]
        )
    if all(row["num_runs"] == 1 for row in rows):  # then there is no spread to show
        return _without(header, cells, ("±", "seeds"))
    return header, cells


def _without(
    header: list[str], cells: list[list[Any]], names: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """A table without some columns."""
    kept = [n for n, name in enumerate(header) if name not in names]
    return [header[n] for n in kept], [[row[n] for n in kept] for row in cells]
