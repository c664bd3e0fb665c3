"""The report of one run, beside others where they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import KDCacheError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.signals import LogitsRecord
from kdcache.report.charts import Curve, Reliability, curves, reliability
from kdcache.report.commits import committed
from kdcache.report.document import Document, Section
from kdcache.report.label_statistics import label_statistics, reliability_bins
from kdcache.report.pictures import MUTED, SERIES
from kdcache.report.runs import RunRecord, provenance, scores, speed

#: Target tokens that a student is run over for its calibration.
CALIBRATION_TOKENS = 20_000
#: Bins with fewer tokens say nothing.
_FEWEST = 20


def run_document(run: RunRecord, beside: Sequence[RunRecord], cache: str | None) -> Document:
    """The report of a run.

    Args:
        run: finished or not.
        beside: shown with it, as one without KD.
        cache: where its cache lies now; as the run says without it.
    """
    runs = [run, *beside]
    compared = [calibration([one for one in runs if one.summary], cache), _pace(runs)]
    how = "from a teacher's labels" if run.distils else "without a teacher"
    loss = run.summary.get("best_dev_loss")
    found = "" if loss is None else f" Its best weights have a dev loss of {loss:.4f} nats a token"
    found += f", at step {run.summary['best_step']:,}." if found else ""
    return Document(
        f"Run {run.name}",
        f"Recipe {run.recipe.name}: {run.summary.get('steps', 0):,} steps {how}.{found}",
        [
            [scores(runs)],
            *_row(learning_curves(runs)),
            *_row(compared),
            [speed(runs)],
            [provenance(run)],
        ],
        footer(run.record["versions"].get("kdcache", "")),
    )


def _row(sections: Sequence[Section | None]) -> list[list[Section]]:
    """A row of those that there are, if there are any."""
    found = [section for section in sections if section is not None]
    return [found] if found else []


def _pace(runs: Sequence[RunRecord]) -> Section | None:
    """Tokens a second over steps."""
    lines = [
        Curve(run.name, run.curve("tokens_per_second"), color)
        for run, color in zip(runs, color_of(runs), strict=True)
        if run.curve("tokens_per_second")
    ]
    if not lines:
        return None
    alt = f"Target tokens a second over steps of {_named(runs)}"
    picture = curves("pace", alt, lines, "optimiser steps", "target tokens/s", from_zero=True)
    text = "Target tokens a second; validations and checkpoints fall in between."
    return Section("Pace", text, [picture])


def footer(version: str) -> str:
    """What stands under every report."""
    return (
        f"Made by kdcache {version}. Nothing on this page is fetched from anywhere; the same as "
        "Markdown, with its pictures, lies beside it."
    )


def learning_curves(runs: Sequence[RunRecord]) -> list[Section]:
    """Dev loss and training loss over steps, by term where there is one run."""
    colors = color_of(runs)
    sections = []
    lines = [
        Curve(run.name, run.curve("dev_loss"), colors[n], dashed=not run.distils)
        for n, run in enumerate(runs)
        if run.curve("dev_loss")
    ]
    if lines:
        dashes = any(line.dashed for line in lines) and len(lines) > 1
        sections.append(
            Section(
                "Learning curves",
                "Loss on the references of the development set.",
                [
                    curves(
                        *("dev-loss", f"Dev loss over steps of {_named(runs)}", lines),
                        *("optimiser steps", "dev loss, nats"),
                        log_y=True,
                    )
                ],
                "Dashed: without a teacher." if dashes else "",
            )
        )
    if training := _training(runs, colors):
        sections.append(training)
    return sections


def _training(runs: Sequence[RunRecord], colors: Sequence[str]) -> Section | None:
    """The loss that was minimised; of one run its terms too."""
    if len(runs) > 1:
        lines = [
            Curve(run.name, run.curve("loss"), colors[n], dashed=not run.distils)
            for n, run in enumerate(runs)
            if run.curve("loss")
        ]
        note = "Objectives that differ give losses that do not compare; the dev loss does."
    else:
        [run] = runs
        last: dict[str, object] = {}
        for line in run.metrics:
            last |= line.get("terms", {})
        lines = [
            Curve(name, run.curve("terms", name), (*SERIES, MUTED)[n % 4])
            for n, name in enumerate(last)
        ]
        note = "Each term before its weight, the mean over the steps since the last line."
    if not lines:
        return None
    alt = f"Training loss over steps of {_named(runs)}"
    picture = curves("training-loss", alt, lines, "optimiser steps", "loss")
    return Section("Training", "What the objective came to on the way.", [picture], note)


def color_of(runs: Sequence[RunRecord]) -> list[str]:
    """A colour for each run."""
    palette = (*SERIES, MUTED)
    return [palette[n % len(palette)] for n, _ in enumerate(runs)]


def _named(runs: Sequence[RunRecord]) -> str:
    return ", ".join(run.name for run in runs)


def calibration(runs: Sequence[RunRecord], cache: str | None) -> Section | None:
    """Teacher against students on the cache's own text; None where there is no way to tell."""
    if not runs:
        return None
    places = [cache] if cache is not None else runs[0].record.get("caches") or []
    if len(places) != 1:
        return None
    try:
        opened = open_cache(places[0])
    except (KDCacheError, OSError):
        if cache is not None:
            raise
        return None  # it was moved, and nobody said where
    teacher = teacher_reliability(opened, runs[0].recipe.train.target)
    models = [teacher] if teacher else []
    for n, run in enumerate(runs):
        found = _student(run, opened, (SERIES[0], SERIES[1])[n % 2])
        models += [found] if found is not None else []
    if len(models) == len([teacher] if teacher else []):
        return None
    return Section(
        "Calibration, teacher against student",
        "How often a model's likeliest token was the target, by how sure it was. Below the dotted "
        "line it is surer than it is right.",
        [
            reliability(
                "calibration",
                "Reliability diagram of "
                + ", ".join(f"{m.name} (calibration error {m.error:.3f})" for m in models),
                models,
            )
        ],
        "In brackets: expected calibration error over ten bins. On the cache's own text, which "
        f"the students were trained on, about {CALIBRATION_TOKENS:,} tokens at most; teacher-"
        "forced. Of the teacher, positions whose likeliest token is in the cache.",
    )


def teacher_reliability(cache: Cache, stream: str | None = None) -> Reliability | None:
    """The teacher's own, where a signal tells; None else.

    Args:
        cache: an open cache.
        stream: that is labelled; any without it.
    """
    commits = committed(cache)
    for name, record in cache.signals.items():
        if not isinstance(record, LogitsRecord) or stream not in (None, record.stream):
            continue
        found = label_statistics(record, commits[name])
        if found is None or found.hit is None or found.sure is None:
            continue
        kept = found.sure > 0
        bins = [b for b in reliability_bins(found.sure[kept], found.hit[kept]) if b[2] >= _FEWEST]
        if bins:
            return Reliability("teacher", bins, SERIES[2])
    return None


def _student(run: RunRecord, cache: Cache, color: str) -> Reliability | None:
    """A student's, where it can be had."""
    from kdcache.train.evaluation.calibration import student_confidence

    section = run.recipe.train
    if section.student is None or not {section.source, section.target} <= set(
        cache.manifest.streams
    ):
        return None
    if not (Path(run.path) / "best").is_dir():
        return None
    step = max(1, cache.num_shards // 4)
    shards = list(range(0, cache.num_shards, step))[:4]
    found = student_confidence(run.path, section, cache, shards, CALIBRATION_TOKENS)
    if found is None:
        return None
    bins = [b for b in reliability_bins(found.sure, found.hit) if b[2] >= _FEWEST]
    return Reliability(run.name, bins, color) if bins else None
