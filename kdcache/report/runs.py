"""A run directory as a report reads it, without torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdcache.errors import StorageError
from kdcache.recipe import Recipe, load_recipe
from kdcache.report.document import Code, Section, Table

RECIPE, RECORD, METRICS, EVALUATION = "recipe.yaml", "run.json", "metrics.jsonl", "evaluation.json"
#: Terms that are over references and gold labels: what a run has without a teacher.
_WITHOUT_TEACHER = ("cross_entropy", "label_cross_entropy", "label_mse")


@dataclass(frozen=True)
class RunRecord:
    """What stands in a run directory.

    Attributes:
        path: the directory.
        name: what it is called in pictures.
    """

    path: Path
    name: str

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe.

        Raises:
            RecipeError: it is damaged.
        """
        return load_recipe(str(self.path / RECIPE))

    @cached_property
    def record(self) -> dict[str, Any]:
        """Identity, versions, caches, machine and summary.

        Raises:
            StorageError: there is none that is whole.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.path}: not a run of `kdcache train` ({error})") from None
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """What it came to; nothing until it is finished."""
        return self.record.get("summary") or {}

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """How it was scored; nothing if it was not."""
        try:
            found: dict[str, Any] = json.loads((self.path / EVALUATION).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics that are whole."""
        try:
            lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # a run that goes on is writing it
        return found

    def curve(self, *keys: str) -> list[tuple[float, float]]:
        """(step, number) of all lines of metrics that have it, by its path."""
        found = []
        for line in self.metrics:
            node: Any = line
            for key in keys:
                node = node.get(key) if isinstance(node, dict) else None
            if isinstance(node, int | float):
                found.append((float(line["step"]), float(node)))
        return found

    @property
    def distils(self) -> bool:
        """Whether it learns from a teacher: by a term, or by hypotheses as targets."""
        terms = [term for term in self.recipe.train.objective if term.used]
        return any(
            term.loss not in _WITHOUT_TEACHER or getattr(term, "hypotheses", None) is not None
            for term in terms
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the lines of metrics."""
        found = [value for _, value in self.curve("tokens_per_second")]
        return statistics.median(found) if found else None


def open_run(path: Path, name: str | None = None) -> RunRecord:
    """A run directory.

    Raises:
        StorageError: it is none.
    """
    run = RunRecord(path, name or path.name)
    _ = run.record
    return run


def scores(runs: Sequence[RunRecord]) -> Section:
    """The numbers of some runs, those that any of them has."""
    columns: dict[str, list[Any]] = {
        "best dev loss": [run.summary.get("best_dev_loss") for run in runs],
        "dev accuracy": [run.summary.get("dev_accuracy") for run in runs],
        "BLEU": [_score(run, "bleu") for run in runs],
        "chrF": [_score(run, "chrf") for run in runs],
        "test loss": [run.evaluation.get("loss_nats") for run in runs],
        "test accuracy": [run.evaluation.get("accuracy") for run in runs],
        "parameters": [run.summary.get("parameters") for run in runs],
    }
    kept = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    rows = [
        [run.name, "yes" if run.distils else "no", *(values[n] for values in kept.values())]
        for n, run in enumerate(runs)
    ]
    unfinished = [run.name for run in runs if not run.summary]
    note = "Losses in nats a token (of texts and classes: a text)."
    if unfinished:
        note += f" Not finished yet: {', '.join(unfinished)}."
    return Section("Scores", "", [Table(["run", "distils", *kept], rows)], note)


def _score(run: RunRecord, metric: str) -> float | None:
    found = run.evaluation.get(metric)
    return found["score"] if isinstance(found, dict) else None


def speed(runs: Sequence[RunRecord]) -> Section:
    """Throughput and memory of some runs."""
    rows = []
    for run in runs:
        machine = run.record.get("machine") or {}
        pace = run.tokens_per_second
        latency = (run.evaluation.get("latency_seconds") or {}).get("median")
        rows.append(
            [
                run.name,
                None if pace is None else round(pace),
                run.summary.get("tokens"),
                _seconds(run.summary.get("seconds")),
                _size(machine.get("peak_memory_bytes")),
                str(machine.get("device", "-")),
                None if latency is None else f"{1000 * latency:.1f} ms",
            ]
        )
    header = ["run", "target tokens/s", "tokens", "time", "peak memory", "device", "one sentence"]
    kept = [n for n, _ in enumerate(header) if n == 0 or any(row[n] is not None for row in rows)]
    return Section(
        "Throughput and memory",
        "",
        [Table([header[n] for n in kept], [[row[n] for n in kept] for row in rows])],
        "Tokens a second: the median over the lines of metrics; validation and checkpoints fall "
        "into some of them. Memory: the most that the training process held since it began (on "
        "cuda: that tensors held); of a sweep's worker, runs before this one count too.",
    )


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.1f} s"


def _size(num_bytes: float | None) -> str | None:
    from kdcache.report.text import size

    return None if num_bytes is None else size(num_bytes)


def provenance(run: RunRecord) -> Section:
    """The resolved recipe, versions and signatures of a run."""
    signatures = [
        [metric, run.evaluation[metric]["signature"]]
        for metric in ("bleu", "chrf")
        if isinstance(run.evaluation.get(metric), dict)
    ]
    digests = [[key, value] for key, value in _flat(run.record["identity"])]
    header = ["metric", "signature of sacreBLEU"]
    return Section(
        "What it was made with",
        f"Run {run.path.name}: a run of the same recipe and cache repeats it. "
        + versions_text(run.record["versions"]),
        [
            *([Table(header, signatures, words=True)] if signatures else []),
            Table(["identity", "digest"], digests, words=True),
            Code((run.path / RECIPE).read_text("utf-8"), "yaml", "The resolved recipe"),
        ],
    )


def versions_text(versions: Mapping[str, str]) -> str:
    """Versions of libraries in a sentence."""
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _flat(tree: Any, path: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values of a tree."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return [(path, str(tree))]
    return [pair for key, value in items for pair in _flat(value, f"{path}.{key}".lstrip("."))]
