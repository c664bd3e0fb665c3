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
from kdcache.recipe import Recipe, parse_recipe
from kdcache.recipe.stages import caches_of_stages, override_all, read_recipe
from kdcache.sweep.folder import (
    LOCK,
    SweepFolder,
    only_one,
    read_evaluation,
    read_summary,
    read_sweep,
)
from kdcache.sweep.plan import SHARED, Caches, PlannedRun, plan_runs
from kdcache.sweep.status import Status
from kdcache.sweep.table import metric_names, metric_value, outcome
from kdcache.sweep.work import Worker
from kdcache.sweep.workers import Workers, attempt

Overrides = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Sweep:
    """A sweep that is planned.

    Attributes:
        source: the recipe, as the command names it.
        overrides: likewise; those of the sweep section are left out.
        cache: likewise, of stages by name; None where recipes name their caches.
        out: its folder.
        name: of the recipe.
        metric: that the table is sorted by.
        runs: each once.
        folder: `out`, checked.
    """

    source: str
    overrides: Overrides
    cache: Caches
    out: Path
    name: str
    metric: str
    runs: list[PlannedRun]
    folder: SweepFolder


def plan_sweep(
    source: str,
    cache: str | Sequence[str] | None,
    out: str | Path,
    overrides: Overrides = (),
    metric: str | None = None,
) -> Sweep:
    """Plan a sweep; all runs' recipes are checked.

    Args:
        source: a recipe file, or a built-in recipe by name.
        cache: that all runs read; None where the recipe names its caches; of a recipe with stages
            STAGE=CACHE of each.
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
    recipe = parse_recipe(tree, source)
    given = [cache] if isinstance(cache, str) else list(cache or ())
    place: Caches = caches_of_stages(recipe, given) if recipe.stages else _one(recipe, given)
    named = place if isinstance(place, Mapping) else {"": place}
    opened = {name: open_cache(path) for name, path in named.items() if path is not None}
    runs = plan_runs(tree, source, opened.get(""))
    if recipe.stages:
        from kdcache.train.runs.stages import check_stages

        for run in runs:
            check_stages(run.recipe, named)
    assert recipe.sweep is not None
    path = Path(out)
    return Sweep(
        source=source,
        overrides=[pair for pair in overrides if not _of_sweep(pair[0])],
        cache=place,
        out=path,
        name=recipe.name,
        metric=metric or recipe.sweep.metric,
        runs=runs,
        folder=SweepFolder(path, opened, place),
    )


def _one(recipe: Recipe, given: Sequence[str]) -> str | None:
    """The one cache of a recipe without stages; None where it names its caches."""
    recipe.single()
    if len(given) > 1:
        raise RecipeError(f"sweep: --cache is given {len(given)} times; {recipe.name} reads one")
    if not given and not recipe.train.caches:
        raise RecipeError("sweep: no cache; give --cache CACHE, or name caches in train.caches")
    if given and recipe.train.caches:
        raise RecipeError(
            f"sweep: --cache is {given[0]} and train.caches names {len(recipe.train.caches)}; "
            "leave one of them out"
        )
    return given[0] if given else None


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
            told = False
            while waiting or workers.busy:
                for number in workers.idle:
                    if waiting:
                        run = _next(sweep, waiting, workers.last(number), workers.busy)
                        status.begin(run)
                        workers.give(number, run)
                for run, failure in workers.ended(0.5):
                    if failure is not None:
                        folder.fail(run, failure)
                    status.end(run, failure)
                    if failure is None and not told:
                        _check_metric(sweep, run, status)
                        told = True
                status.draw()
            status.draw(final=True)
    return outcome(sweep.out, read_sweep(sweep.out))


def _check_metric(sweep: Sweep, run: PlannedRun, status: Status) -> None:
    """Say while runs are still to come that the table has nothing to be sorted by."""
    path = run.result_path(sweep.out)
    trees = read_summary(path), read_evaluation(path)
    if metric_value(sweep.metric, *trees) is None:
        status.say(
            f"run {run.name} has no number {sweep.metric!r} that the table could be sorted by; all "
            f"runs stay under another --metric: {', '.join(metric_names(*trees))}"
        )


def _next(
    sweep: Sweep, waiting: list[PlannedRun], last: PlannedRun | None, busy: Sequence[PlannedRun]
) -> PlannedRun:
    """Take the next run for a worker.

    One that need not wait for a stage that a busy one trains, if there is one; of these one that
    reads what the worker's last run did.
    """
    begun = {run.first_shared(sweep.cache, sweep.out) for run in busy}
    held = {path for path in begun if path is not None and read_summary(path) is None}
    free = [run for run in waiting if run.first_shared(sweep.cache, sweep.out) not in held]
    free = free or waiting
    same = [run for run in free if last is not None and run.codecs == last.codecs]
    found = (same or free)[0]
    waiting.remove(found)
    return found


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
        path = run.run_path(sweep.out)
        places = {"": run.cache_path(sweep.cache, sweep.out)} if not run.stages else sweep.cache
        assert isinstance(places, Mapping)
        words = ["kdcache", "train", sweep.source]
        for stage, place in places.items():
            if place is not None and stage in (run.stages or places):
                words += ["--cache", f"{stage}={place}" if stage else place]
        words += ["--out", str(path)]
        if len(run.stages) > 1:
            words += ["--share", str(sweep.out / SHARED)]
        settings = [
            (key, json.dumps(v))
            for key, v in run.given.items()
            if v is not None or (not key.startswith("dump."))
        ]
        for key, text in [*sweep.overrides, *settings]:
            words += [f"--{key}", text]
        steps = [words]
        if run.codecs:
            assert isinstance(sweep.cache, str)
            compiled = ["kdcache", "compile", sweep.cache, "--out", str(places[""])]
            for signal_name, codec in run.codecs.items():
                compiled += ["--codec", f"{signal_name}={json.dumps(codec)}"]
            steps.insert(0, compiled)
        if run.last.evaluate.corpus is not None:
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
