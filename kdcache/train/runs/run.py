"""The run directory: what a run is of, its metrics, and its right to be resumed.

RUN/recipe.yaml     the resolved recipe; of several stages that is all, beside a run for each
    run.json        cache, signals, student and versions; the summary once it is finished
    metrics.jsonl   a line every some steps
    checkpoint/     where it can go on
    best/ last/ averaged/   transformers directories
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.errors import IdentityError, ModelError, StorageError
from kdcache.formats.keyed import text_key
from kdcache.formats.stores.commit import is_temporary, storage_errors, write_data
from kdcache.recipe import Recipe, dump_recipe, load_recipe

logger = logging.getLogger(__name__)

RECIPE, IDENTITY, METRICS, LOCK = "recipe.yaml", "run.json", "metrics.jsonl", ".lock"

#: What may differ between a run and its resumption: where it runs, in how many parts, and who
#: hears of it.
FREE_KEYS = ("device", "accumulate", "activation_checkpointing", "parallel", "log")


class RunDirectory:
    """A run directory whose recipe and identity are checked.

    Args:
        path: the directory; made if it is not there.
        recipe: the resolved recipe.
        identity: what the run is of, as plain values: a resumed run's must be the same.
        versions: library names to versions, for the record.
        caches: where the caches lie, for the record: they may be moved.
        writes: whether this process is the one that writes; the others find what it wrote.

    Raises:
        IdentityError: another run stands there; the first differing key is shown.
        StorageError: its record is damaged, or the disk refused.
    """

    def __init__(
        self,
        path: Path,
        recipe: Recipe,
        identity: Mapping[str, Any],
        versions: Mapping[str, str],
        caches: Sequence[str] = (),
        writes: bool = True,
    ) -> None:
        self.path, self._writes = path, writes
        if (path / IDENTITY).is_file():
            self._check(recipe, identity)
            return
        write_text(path / RECIPE, dump_recipe(recipe))
        self._record: dict[str, Any] = {
            "identity": dict(identity),
            "versions": dict(versions),
            "caches": list(caches),
            "summary": None,
        }
        write_text(path / IDENTITY, _json(self._record))

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run came to; None until it is finished."""
        found: dict[str, Any] | None = self._record["summary"]
        return found

    def finish(self, summary: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        """Record that the run is done.

        Args:
            summary: what it came to.
            machine: what the process that finished it ran on, for the record.
        """
        self._record |= {"summary": dict(summary), "machine": dict(machine)}
        if self._writes:
            write_text(self.path / IDENTITY, _json(self._record))

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the metrics."""
        if not self._writes:
            return
        with storage_errors(self.path), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Take back the metrics after a step; they will be made again."""
        path = self.path / METRICS
        if not self._writes or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _until(line, step)]
        write_text(path, "".join(line + "\n" for line in kept))

    def last_values(self) -> dict[str, Any]:
        """The last value of everything in the metrics."""
        values: dict[str, Any] = {}
        path = self.path / METRICS
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                values |= json.loads(line)
        return values

    def _check(self, recipe: Recipe, identity: Mapping[str, Any]) -> None:
        """Refuse to go on with what another recipe or cache began."""
        try:
            self._record = json.loads((self.path / IDENTITY).read_text(encoding="utf-8"))
            found: dict[str, Any] = {
                "train": settings_of(load_recipe(str(self.path / RECIPE))),
                "cache": self._record["identity"],
            }
        except (ValueError, KeyError, OSError) as error:
            raise StorageError(
                f"{self.path / IDENTITY}: not the record of a run ({error}); choose another output"
            ) from None
        here = {
            "train": settings_of(recipe),
            "cache": json.loads(json.dumps(identity)),
        }
        for tree in (found["train"], here["train"]):
            for share in tree["caches"]:
                share.pop("path")  # what lies there is compared instead
            if "start" in here["cache"]:
                tree["student"].pop("path")  # so is what it begins with
        if difference := _first_difference(found, here):
            key, there, now = difference
            raise IdentityError(
                f"{self.path}: holds another run: {key} is {there!r} "
                f"there and {now!r} here; choose another output, or set it back to resume"
            )


def last_stage(path: Path) -> Path:
    """The run of the last stage in a directory of several; any other path as it is.

    Args:
        path: a run, or a transformers directory.

    Raises:
        ModelError: the last stage has not begun.
    """
    if (path / IDENTITY).is_file() or not (path / RECIPE).is_file():
        return path
    stages = list(load_recipe(str(path / RECIPE)).kept)
    if not stages:
        return path
    if not (path / stages[-1] / RECIPE).is_file():
        begun = [stage for stage in stages if (path / stage / RECIPE).is_file()]
        raise ModelError(
            f"{path}: its last stage, {stages[-1]}, has not begun; finish `kdcache train`, or name "
            f"another: {', '.join(str(path / stage) for stage in begun) or 'none has'}"
        )
    return path / stages[-1]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a run is by its recipe: all of the train section that may not differ on resumption."""
    found = recipe.model_dump(mode="json")["train"]
    return {key: value for key, value in found.items() if key not in FREE_KEYS}


def digest_of(tree: Any) -> str:
    """12 hex digits of plain values, whatever the order of their keys."""
    return f"{text_key(json.dumps(tree, sort_keys=True)):016x}"[:12]


def place_of(cache: str | Path) -> str:
    """A cache's URL, or its directory from the root."""
    return str(cache) if "://" in str(cache) else str(Path(cache).resolve())


def shared_name(
    stage: Recipe, cache: str | Path | None, start: Mapping[str, Any] | None = None
) -> str:
    """The name of a stage that several runs share.

    Args:
        stage: its recipe.
        cache: its cache; None where the recipe names its caches.
        start: what it begins as, beside what the recipe says.
    """
    place = None if cache is None else place_of(cache)
    return digest_of({"train": settings_of(stage), "cache": place, "start": start})


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a run directory, made if it is not there, against a second trainer.

    Args:
        path: of the run.
        wait: for who trains there, to find the run done.

    Raises:
        StorageError: somebody else trains there, something else stands there, or the disk
            refused.
    """
    _refuse_other_files(path)
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise StorageError(
                    f"{path}: another run is training here; wait for it to end, or choose another "
                    "output"
                ) from None
            logger.info("%s: another run is training here; waiting for it to end", path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_other_files(path: Path) -> None:
    """Refuse a directory that is neither a run nor empty, before anything is put there."""
    if path.exists() and not path.is_dir():
        raise StorageError(f"{path}: output is a file; choose a directory")
    if not path.is_dir() or (path / IDENTITY).is_file():
        return
    # A kill between the first files of a run leaves these; all else is somebody's.
    names = [entry.name for entry in path.iterdir() if entry.name not in (RECIPE, LOCK)]
    if other := sorted(name for name in names if not is_temporary(name)):
        raise StorageError(
            f"{path}: output already holds other files ({', '.join(other[:3])}); choose an "
            "empty directory"
        )


def _first_difference(left: Any, right: Any, at: str = "") -> tuple[str, Any, Any] | None:
    """Dotted key and both values of the first thing in which two trees differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        pairs = [(key, left.get(key), right.get(key)) for key in [*left, *right]]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = [(str(n), *both) for n, both in enumerate(zip(left, right, strict=True))]
    else:
        return None if left == right else (at, left, right)
    for key, here, there in pairs:
        found = _first_difference(here, there, f"{at}.{key}" if at else key)
        if found:
            return found
    return None


def _until(line: str, step: int) -> bool:
    """Whether a metrics line is whole and not after a step; a kill can cut the last one."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except ValueError:
        return False


def _json(tree: Any) -> str:
    """Readable JSON."""
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a file whole."""

    def write(stream: Any) -> Path:
        stream.write(text.encode())
        return path

    write_data(path, write)


def whole_lines(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Lines of metrics as values, without those that are still being written.

    Args:
        lines: of metrics.jsonl.
    """
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
