"""The report of a sweep: the table, maps over its settings, curves of its best runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from kdcache.errors import KDCacheError
from kdcache.formats.cache import open_cache
from kdcache.report.charts import Curve, Dots, curves, dots, heat_map, scatter
from kdcache.report.commits import committed
from kdcache.report.document import Document, Section, Table
from kdcache.report.pictures import SERIES
from kdcache.report.run_page import calibration, footer
from kdcache.report.runs import RunRecord, open_run, provenance, scores, speed
from kdcache.sweep.folder import read_sweep
from kdcache.sweep.plan import CACHES, codec_digest, in_words, short_names, shown
from kdcache.sweep.table import outcome, row_cells

#: Rows of the table that get dots of their own.
_MOST_DOTS = 24


def sweep_document(out: Path, beside: Sequence[RunRecord], cache: str | None) -> Document:
    """The report of a sweep.

    Args:
        out: its folder.
        beside: runs shown with it, as one without KD.
        cache: where its cache lies now; as the sweep says without it.

    Raises:
        KDCacheError: none of its runs is finished.
    """
    record = read_sweep(out)
    found = outcome(out, record)
    rows = [row for row in found["rows"] if row["mean"] is not None]
    if not found["rows"]:
        raise KDCacheError(
            f"{out}: none of its {len(found['runs'])} runs is finished; run `kdcache sweep` first"
        )
    sweep = _Sweep(out, found, record)
    best = sweep.best_run(found["rows"][0])
    runs = [best, *sweep.other_kind(), *beside]
    metric = found["metric"]
    lead = f"{found['done']} of {len(found['runs'])} runs of the recipe {found['name']} are done."
    if rows:
        row = rows[0]
        lead += f" Best: {sweep.label(row['settings'])}, {metric} {row['mean']:.4g}"
        if row["std"] is not None:
            lead += f" ± {row['std']:.2g} over {row['num_runs']} seeds"
        lead += "."
    place = cache or record["cache"]
    if isinstance(place, dict):  # of stages; the last one is shown
        place = list(place.values())[-1]
    maps = [one for one in (sweep.heat_map(rows), sweep.dots(rows)) if one is not None]
    calibrated = calibration([one for one in runs if one.summary][:2], place)
    beyond = [one for one in (sweep.sizes(rows), sweep.codecs(rows), calibrated) if one is not None]
    return Document(
        f"Sweep {out.resolve().name}",
        lead,
        [
            [_table(found)],
            *([maps] if maps else []),
            *sweep.curves(best, beside),
            *([beyond] if beyond else []),
            *([[scores(runs)]] if len(runs) > 1 else []),
            [speed(sweep.finished[:12])],
            *([[_failures(found)]] if found["failed"] else []),
            [provenance(best)],
        ],
        footer(best.record["versions"].get("kdcache", "")),
    )


def _table(found: Mapping[str, Any]) -> Section:
    """All rows, the best first."""
    header, cells = row_cells(found)
    way = "lower" if found["lower_is_better"] else "higher"
    counts = ", ".join(f"{found[state]} {state}" for state in ("done", "failed", "waiting"))
    seeds = ""
    if "±" in header:
        seeds = (
            " ± is the standard deviation over seeds; run and parameters are of the first of them, "
            "seconds their mean."
        )
    return Section(
        "All settings",
        f"Best first by {found['metric']}; {way} is better.",
        [Table(header, cells, strong=0)],
        f"{len(found['runs'])} runs: {counts}.{seeds}",
    )


def _failures(found: Mapping[str, Any]) -> Section:
    rows = [[run["name"], run["failure"]] for run in found["runs"] if run["state"] == "failed"]
    return Section("Runs that failed", "", [Table(["run", "why"], rows, words=True)])


class _Sweep:
    """A sweep's runs under their settings.

    Args:
        out: its folder.
        found: from `outcome`.
        record: from `read_sweep`.
    """

    def __init__(self, out: Path, found: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self.out, self.found, self.record = out, found, record
        self.runs = {run["name"]: run for run in found["runs"]}
        paths = list(found["rows"][0]["settings"])
        self.names = short_names(paths)
        # Of paths with one value alone there is nothing to show.
        self.paths = [
            path for path in paths if len({self.value(r, path) for r in found["rows"]}) > 1
        ]

    def value(self, row: Mapping[str, Any], path: str) -> str:
        """A row's value at a path, as it is shown."""
        return shown(row["settings"][path])

    def label(self, settings: Mapping[str, Any]) -> str:
        """Settings in a few words."""
        paths = self.paths or list(self.names)
        return in_words(settings, {path: self.names[path] for path in paths}) or "all seeds"

    def open(self, name: str) -> RunRecord:
        """A finished run under its settings."""
        run = self.runs[name]
        label = self.label(run["settings"])
        return open_run(Path(run["run"]), label)

    @cached_property
    def finished(self) -> list[RunRecord]:
        """The best run of each row."""
        return [self.best_run(row) for row in self.found["rows"]]

    def best_run(self, row: Mapping[str, Any]) -> RunRecord:
        """Of the seeds of a row the best."""
        sign = 1 if self.found["lower_is_better"] else -1
        known = [name for name in row["runs"] if self.runs[name]["value"] is not None]
        return self.open(
            min(known or row["runs"], key=lambda n: sign * (self.runs[n]["value"] or 0))
        )

    def other_kind(self) -> list[RunRecord]:
        """The best row without a teacher, or with one if the very best has none; if there is."""
        runs = self.finished
        return [run for run in runs if run.distils != runs[0].distils][:1]

    def values(self, row: Mapping[str, Any]) -> list[float]:
        """The metric of each run of a row."""
        found = [self.runs[name]["value"] for name in row["runs"]]
        return [value for value in found if value is not None]

    def heat_map(self, rows: Sequence[Mapping[str, Any]]) -> Section | None:
        """The metric over the two settings with the most values, the best of all others."""
        counts = {path: len({self.value(row, path) for row in rows}) for path in self.paths}
        chosen = sorted(self.paths, key=lambda path: -counts[path])[:2]
        if len(chosen) < 2:
            return None
        down, across = sorted(chosen, key=self.paths.index)
        lower = self.found["lower_is_better"]
        cells: dict[tuple[str, str], float] = {}
        for row in sorted(rows, key=lambda row: self._order(row, (down, across))):
            at = self.value(row, down), self.value(row, across)
            known = [cells[at]] if at in cells else []
            cells[at] = (min if lower else max)([*known, row["mean"]])
        metric = self.found["metric"]
        names = self.names[down], self.names[across]
        alt = f"Heat map of {metric} over {names[0]} and {names[1]}"
        others = len(self.paths) - 2
        more = f", the best of the other {others} settings" if others > 0 else ""
        return Section(
            "Where it is good",
            f"{metric} over {names[0]} and {names[1]}, the mean over seeds{more}.",
            [heat_map("heat-map", alt, cells, names, lower)],
            "The fuller the colour the better; the frame is the best.",
        )

    def _order(self, row: Mapping[str, Any], paths: Sequence[str]) -> tuple[Any, ...]:
        """Numbers by size, all else as it comes."""
        found = [row["settings"][path] for path in paths]
        return tuple(value if isinstance(value, int | float) else 0 for value in found)

    def dots(self, rows: Sequence[Mapping[str, Any]]) -> Section | None:
        """Every run, row by row."""
        shown_rows = rows[:_MOST_DOTS]
        if len(shown_rows) < 2:
            return None
        metric = self.found["metric"]
        marks = [
            Dots(self.label(row["settings"]), self.values(row), n == 0)
            for n, row in enumerate(shown_rows)
        ]
        alt = f"{metric} of every run by settings; the best is {marks[0].name}"
        spread = any(len(mark.values) > 1 for mark in marks)
        note = "Faint dots: seeds; diamond and bar: mean ± standard deviation." if spread else ""
        if len(rows) > len(shown_rows):
            note += f" The best {len(shown_rows)} of {len(rows)} rows."
        return Section(
            "Best row and spread",
            "Differences smaller than the spread over seeds say little.",
            [dots("rows", alt, marks, metric)],
            note.strip(),
        )

    def sizes(self, rows: Sequence[Mapping[str, Any]]) -> Section | None:
        """The metric over the student's parameters, where they differ."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for name in row["runs"]:
                run = self.runs[name]
                if run["value"] is not None:
                    label = f"{run['summary']['parameters']:,}"
                    point = (float(run["summary"]["parameters"]), run["value"])
                    groups.setdefault(label, []).append(point)
        if len(groups) < 2:
            return None
        metric = self.found["metric"]
        return Section(
            "Size against quality",
            f"{metric} of every run over the parameters of its student.",
            [
                scatter(
                    *("parameters", f"{metric} over parameters of the student", groups),
                    *("parameters", metric),
                    log_x=True,
                )
            ],
            "The line goes through the means.",
        )

    def codecs(self, rows: Sequence[Mapping[str, Any]]) -> Section | None:
        """The metric over the bytes of the labels, where codecs differ; all else as the best."""
        if not rows:
            return None
        paths = [path for path in self.paths if path.endswith(".codec")]
        others = {path for path in rows[0]["settings"] if path not in paths}
        codecs = {run["name"]: run["codecs"] for run in self.record["runs"]}
        groups: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if len(paths) != 1 or any(
                row["settings"][path] != rows[0]["settings"][path] for path in others
            ):
                continue
            size = self._label_bytes(codecs[row["runs"][0]])
            if size is None:
                return None
            label = self.value(row, paths[0])
            groups.setdefault(label, []).extend((size, value) for value in self.values(row))
        if len(groups) < 2:
            return None
        metric = self.found["metric"]
        alt = f"{metric} over the bytes of labels a token"
        return Section(
            "Size of the labels against fidelity",
            f"{metric} over the bytes of the labels, all other settings as in the best row.",
            [scatter("codecs", alt, groups, "bytes a label, all columns", metric)],
        )

    def _label_bytes(self, codecs: Mapping[str, Any]) -> float | None:
        """Bytes a token of the one signal that is re-encoded, in the cache that a run read."""
        every = {name for run in self.record["runs"] for name in run["codecs"]}
        if len(every) != 1 or self.record["cache"] is None:
            return None
        [signal] = every
        place = str(self.out / CACHES / codec_digest(codecs)) if codecs else self.record["cache"]
        try:
            opened = open_cache(place)
            commits = committed(opened)[signal]
        except (KDCacheError, OSError):
            return None
        return commits.num_bytes / max(1, commits.num_labels)

    def curves(self, best: RunRecord, beside: Sequence[RunRecord]) -> list[list[Section]]:
        """Dev losses of all runs, in front the best with and without a teacher."""
        front = [best, *self.other_kind(), *beside]
        paths = {run.path for run in front}
        lines = []
        for row in self.found["rows"]:
            for name in row["runs"]:
                run = self.open(name)
                if run.path not in paths and run.curve("dev_loss"):
                    lines.append(Curve("", run.curve("dev_loss"), SERIES[0], faint=True))
        for run, color in zip(front, (SERIES[0], SERIES[1], SERIES[2], SERIES[1]), strict=False):
            if run.curve("dev_loss"):
                line = Curve(run.name, run.curve("dev_loss"), color, dashed=not run.distils)
                lines.append(line)
        if not lines:
            return []
        named = [line.name for line in lines if line.name]
        alt = f"Dev loss over steps of all runs, in front {'; '.join(named)}"
        dashes = " Dashed: without a teacher." if any(line.dashed for line in lines) else ""
        found = Section(
            "Learning curves",
            "Loss on the references of the development set, all runs; the best in front.",
            [
                curves(
                    *("dev-loss", alt, lines, "optimiser steps", "dev loss, nats"),
                    log_y=True,
                    width=8.4,
                    height=3.4,
                )
            ],
            f"Faint: the other runs.{dashes}",
        )
        return [[found]]
