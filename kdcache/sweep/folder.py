"""The folder of a sweep: what it is of, and what became of each run.

OUT/sweep.json      the cache, what is varied, and the runs of the last command
    runs/NAME/      run directories, as `kdcache train` writes them
    shared/NAME/    stages that several runs begin with
    caches/NAME/    re-encoded caches
    state/NAME.json   one line of why a run failed; how its evaluation was made
    logs/NAME.log   what a run said
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kdcache.errors import IdentityError, StorageError
from kdcache.formats.cache import Cache
from kdcache.formats.stores.commit import is_temporary, storage_errors, write_data
from kdcache.recipe import EvaluateSection, load_recipe
from kdcache.sweep.plan import CACHES, RUNS, SHARED, Caches, PlannedRun

SWEEP, STATE, LOGS, LOCK = "sweep.json", "state", "logs", ".lock"
RUN, EVALUATION, METRICS = "run.json", "evaluation.json", "metrics.jsonl"
#: Raised when an older folder cannot be gone on with.
VERSION = 1


class SweepFolder:
    """A folder whose cache is checked.

    Args:
        out: made if it is not there.
        opened: what all runs read, of stages by name; those that recipes name are left out.
        cache: where it lies.

    Raises:
        IdentityError: a sweep over another cache stands there.
        StorageError: something else stands there, or the disk refused.
    """

    def __init__(self, out: Path, opened: Mapping[str, Cache], cache: Caches) -> None:
        self.out, self.cache = out, cache
        found_in = {name: _identity(one) for name, one in opened.items()}
        self._identity = found_in if isinstance(cache, Mapping) else found_in.get("")
        found = None
        if (out / SWEEP).is_file():
            found = read_sweep(out)
        elif out.exists() and not out.is_dir():
            raise StorageError(f"{out}: output is a file; choose a directory")
        elif out.is_dir() and (other := sorted(n for n in os.listdir(out) if not _own(n))):
            raise StorageError(
                f"{out}: output already holds other files ({', '.join(other[:3])}); choose an "
                "empty directory"
            )
        if found is not None and found["identity"] != self._identity:
            raise IdentityError(
                f"{out}: holds a sweep over another cache ({found['cache']}: {found['identity']}; "
                f"here {cache}: {self._identity}); choose another output"
            )

    def write(self, name: str, metric: str, runs: Sequence[PlannedRun]) -> None:
        """Record the runs of a command.

        Args:
            name: of the recipe.
            metric: that the table is sorted by.
            runs: planned.
        """
        with storage_errors(self.out):
            for folder in (STATE, LOGS):
                (self.out / folder).mkdir(parents=True, exist_ok=True)
        record = {
            "version": VERSION,
            "name": name,
            "metric": metric,
            "cache": self.cache,
            "identity": self._identity,
            "runs": [
                {
                    "name": run.name,
                    "settings": run.settings,
                    "codecs": dict(run.codecs),
                    "stages": run.stages,
                }
                for run in runs
            ],
        }
        _write(self.out / SWEEP, json.dumps(record, indent=1) + "\n")

    def log_path(self, run: PlannedRun) -> Path:
        """What the run said."""
        return self.out / LOGS / f"{run.name}.log"

    def fail(self, run: PlannedRun, line: str) -> None:
        """Note why a run failed."""
        self._state(run, {"failed": line})

    def evaluated(self, run: PlannedRun) -> None:
        """Note how a run was evaluated; it has not failed then."""
        self._state(run, {"evaluate": _evaluate(run)})

    def begin(self, run: PlannedRun) -> None:
        """Forget an earlier failure."""
        state = read_state(self.out, run.name)
        if state.pop("failed", None) is not None:
            self._state(run, state)

    def trained(self, run: PlannedRun) -> bool:
        """Whether the run has ended."""
        return read_summary(run.result_path(self.out)) is not None

    def finished(self, run: PlannedRun) -> bool:
        """Whether nothing is left to do: trained, and evaluated as its recipe says now."""
        if not self.trained(run):
            return False
        if run.last.evaluate.corpus is None:
            return True
        path = run.result_path(self.out)
        if not (path / EVALUATION).is_file():
            return False
        noted = read_state(self.out, run.name).get("evaluate")
        if noted is None:  # `kdcache evaluate` did it, as the run's own recipe says
            noted = load_recipe(str(path / "recipe.yaml")).evaluate.model_dump(mode="json")
        return bool(noted == _evaluate(run))

    def _state(self, run: PlannedRun, state: Mapping[str, Any]) -> None:
        _write(self.out / STATE / f"{run.name}.json", json.dumps(state) + "\n")


def _own(name: str) -> bool:
    """Whether a file of this name is what a sweep, its single commands or its report make."""
    known = (STATE, LOGS, LOCK, RUNS, CACHES, SHARED, "report.html", "report.md", "report-pictures")
    return name in known or is_temporary(name)


def _identity(cache: Cache) -> dict[str, Any]:
    """What a cache is of; its signals are checked run by run."""
    streams = {name: record.digest for name, record in cache.manifest.streams.items()}
    return {"corpus": cache.manifest.corpus.digest, "streams": streams}


def _evaluate(run: PlannedRun) -> dict[str, Any]:
    """How a run is evaluated."""
    section: EvaluateSection = run.last.evaluate
    return section.model_dump(mode="json")


def read_sweep(out: Path) -> dict[str, Any]:
    """The record of a sweep.

    Raises:
        StorageError: it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads((out / SWEEP).read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}, this kdcache reads {VERSION}")
    except (ValueError, KeyError, OSError) as error:
        raise StorageError(f"{out / SWEEP}: not the record of a sweep ({error})") from None
    return found


def read_state(out: Path, name: str) -> dict[str, Any]:
    """What is noted of a run."""
    return _read(out / STATE / f"{name}.json") or {}


def read_summary(run: Path) -> dict[str, Any] | None:
    """What a run came to; None until it is finished."""
    found: dict[str, Any] | None = (_read(run / RUN) or {}).get("summary")
    return found


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """How a run was scored; None if it was not."""
    return _read(run / EVALUATION)


def _read(path: Path) -> dict[str, Any] | None:
    """A file of JSON; None where there is none that is whole."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None
    return found


@contextmanager
def only_one(path: Path, wait: bool, busy: str) -> Iterator[None]:
    """Hold a lock file.

    Args:
        path: made if it is not there.
        wait: for whoever holds it.
        busy: what to say where it is held and nobody waits.

    Raises:
        StorageError: it is held, or the disk refused.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise StorageError(f"{path.parent}: {busy}") from None
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    """Replace a file whole."""

    def write(stream: IO[bytes]) -> Path:
        stream.write(text.encode())
        return path

    write_data(path, write)
