"""The whole of `kdcache sweep`: plan, do what is not done, say what came of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from kdcache.errors import RecipeError, StoppedError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.recipe import parse_recipe
from kdcache.recipe.stages import override_all, read_recipe
from kdcache.sweep.folder import LOCK, SweepFolder, only_one, read_sweep
from kdcache.sweep.plan import PlannedRun, plan_runs
from kdcache.sweep.status import Status
from kdcache.sweep.table import outcome
from kdcache.sweep.work import Worker
from kdcache.sweep.workers import Workers, attempt

Overrides = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Sweep:
    """A sweep that is planned.

    Attributes:
        source: the recipe, as the command names it.
        overrides: likewise; those of the sweep section are left out.
        cache: likewise; None where recipes name their caches.
        out: its folder.
        name: of the recipe.
        metric: that the table is sorted by.
        runs: each once.
        folder: `out`, checked.
    """

    source: str
    overrides: Overrides
    cache: str | None
    out: Path
    name: str
    metric: str
    runs: list[PlannedRun]
    folder: SweepFolder


def plan_sweep(
    source: str,
    cache: str | None,
    out: str | Path,
    overrides: Overrides = (),
    metric: str | None = None,
) -> Sweep:
    """Plan a sweep; all runs' recipes are checked.

    Args:
        source: a recipe file, or a built-in recipe by name.
        cache: that all runs read; None where the recipe names its caches.
        out: folder of the sweep.
        overrides: (dotted path, YAML text) pairs.
        metric: that the table is sorted by; as the recipe says without it.

    Raises:
        RecipeError: the recipe, or that of a run, is wrong.
        FormatError: there is no cache.
        IdentityError: `out` holds a sweep over another cache.
        StorageError: `out` holds something else.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(
            "sweep: runs here are of one process each; start `kdcache sweep` without torchrun, "
            "with --jobs, or give torchrun the commands of --list"
        )
    tree, stage = read_recipe(source)
    for dotted, text in overrides:
        override_all(tree, dotted, text, stage)
    recipe = parse_recipe(tree, source).single()
    if cache is None and not recipe.train.caches:
        raise RecipeError("sweep: no cache; give --cache CACHE, or name caches in train.caches")
    if cache is not None and recipe.train.caches:
        raise RecipeError(
            f"sweep: --cache is {cache} and train.caches names {len(recipe.train.caches)}; leave "
            "one of them out"
        )
    opened = None if cache is None else open_cache(cache)
    runs = plan_runs(tree, source, opened)
    assert recipe.sweep is not None
    path = Path(out)
    return Sweep(
        source=source,
        overrides=[pair for pair in overrides if not _of_sweep(pair[0])],
        cache=cache,
        out=path,
        name=recipe.name,
        metric=metric or recipe.sweep.metric,
        runs=runs,
        folder=SweepFolder(path, opened, cache),
    )


def _of_sweep(dotted: str) -> bool:
    return dotted.partition(".")[0] == "sweep"


def run_sweep(sweep: Sweep, jobs: int = 1) -> dict[str, Any]:
    """Do all runs that are not done.

    A run that fails is noted and the rest goes on. SIGTERM and an interrupt end the processes;
    the same call goes on from the runs' last checkpoints.

    Args:
        sweep: planned.
        jobs: runs side by side, each in a process, on a GPU of its own where there are GPUs.

    Returns:
        What `table.outcome` does.

    Raises:
        StorageError: another process does this sweep.
        StoppedError: SIGTERM came.
    """
    folder = sweep.folder
    busy = "another `kdcache sweep` is at work here; wait for it, or choose another output"
    with only_one(sweep.out / LOCK, wait=False, busy=busy):
        folder.write(sweep.name, sweep.metric, sweep.runs)
        waiting = [run for run in sweep.runs if not folder.finished(run)]
        done = [run.name for run in sweep.runs if run not in waiting]
        status = Status(sweep.out, sweep.runs, done)
        worker = Worker(sweep.cache, folder)
        with stoppable(), Workers(min(jobs, max(1, len(waiting))), worker) as workers:
            while waiting or workers.busy:
                for number in workers.idle:
                    if waiting:
                        run = _next(waiting, workers.last(number))
                        status.begin(run)
                        workers.give(number, run)
                for run, failure in workers.ended(0.5):
                    if failure is not None:
                        folder.fail(run, failure)
                    status.end(run, failure)
                status.draw()
            status.draw(final=True)
    return outcome(sweep.out, read_sweep(sweep.out))


def _next(waiting: list[PlannedRun], last: PlannedRun | None) -> PlannedRun:
    """Take the next run for a worker: one that reads what its last one did, if there is one."""
    same = [n for n, run in enumerate(waiting) if last is not None and run.codecs == last.codecs]
    return waiting.pop(same[0] if same else 0)


def run_one(sweep: Sweep, index: int) -> dict[str, Any]:
    """Do one run in this process, as a task of a scheduler's array does.

    Args:
        sweep: planned.
        index: of the run, from 0.

    Returns:
        The run, as `table.outcome` lists it.

    Raises:
        RecipeError: there is no such run.
        TrainingError: it failed.
    """
    if index >= len(sweep.runs):
        raise RecipeError(
            f"--index {index}: the sweep has {len(sweep.runs)} runs, 0 to {len(sweep.runs) - 1}"
        )
    run = sweep.runs[index]
    sweep.folder.write(sweep.name, sweep.metric, sweep.runs)
    if not sweep.folder.finished(run):
        failure = attempt(Worker(sweep.cache, sweep.folder), run)
        if failure is not None:
            raise TrainingError(f"run {index} ({run.label}): {failure}")
    found: dict[str, Any] = outcome(sweep.out, read_sweep(sweep.out))["runs"][index]
    return found


def check_failures(found: Mapping[str, Any]) -> None:
    """Refuse a sweep of which a run failed.

    Args:
        found: from `run_sweep`.

    Raises:
        TrainingError: names the runs, and says why the first of them failed.
    """
    failed = [run for run in found["runs"] if run["state"] == "failed"]
    if failed:
        names = ", ".join(run["name"] for run in failed)
        raise TrainingError(
            f"{found['out']}: {len(failed)} of {len(found['runs'])} runs failed ({names}); the "
            f"first: {failed[0]['failure']}; the same command tries them again"
        )


def commands(sweep: Sweep) -> list[str]:
    """A shell command for each run, which does all of it."""
    lines = []
    for run in sweep.runs:
        place, path = run.cache_path(sweep.cache, sweep.out), run.run_path(sweep.out)
        words = ["kdcache", "train", sweep.source]
        if place is not None:
            words += ["--cache", place]
        words += ["--out", str(path)]
        settings = [
            (key, json.dumps(v))
            for key, v in run.given.items()
            if v is not None or (not key.startswith("dump."))
        ]
        for key, text in [*sweep.overrides, *settings]:
            words += [f"--{key}", text]
        steps = [words]
        if run.codecs:
            assert sweep.cache is not None
            compiled = ["kdcache", "compile", sweep.cache, "--out", str(place)]
            for signal_name, codec in run.codecs.items():
                compiled += ["--codec", f"{signal_name}={json.dumps(codec)}"]
            steps.insert(0, compiled)
        if run.recipe.evaluate.corpus is not None:
            steps.append(["kdcache", "evaluate", str(path)])
        lines.append(" && ".join(shlex.join(step) for step in steps))
    return lines


@contextmanager
def stoppable() -> Iterator[None]:
    """Have SIGTERM raise, so that whoever began something ends it.

    Raises:
        StoppedError: it came.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends this process at once
        raise StoppedError("stopped by SIGTERM; the same command goes on from here")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
