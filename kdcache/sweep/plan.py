"""The plan of a sweep: the runs that a recipe and its sweep section stand for, without torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.compile.servable import check_servable
from kdcache.errors import RecipeError
from kdcache.formats.cache import Cache
from kdcache.formats.signals import LogitsRecord
from kdcache.recipe import LogitsSignal, Recipe, SweepSection, parse_recipe, recipe_tree
from kdcache.recipe.stages import STAGES, set_all
from kdcache.recipe.sweep import NAME
from kdcache.train.runs.run import digest_of, settings_of, shared_name

RUNS, CACHES, SHARED = "runs", "caches", "shared"
#: The codec of labels that are not re-encoded, in tables.
AS_DUMPED = "as dumped"

Settings = dict[str, Any]
#: What a sweep is over: a cache, those of stages by name, or None where recipes name their caches.
Caches = str | Mapping[str, str | None] | None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        name: a digest of the resolved recipe; of its directory too.
        settings: dotted path to value, of everything that the sweep varies.
        given: those of them that this run sets itself.
        recipe: resolved, without a sweep section.
        codecs: logits signal to the codec it is re-encoded to; none: the cache as it is.
    """

    name: str
    settings: Settings
    given: Settings
    recipe: Recipe
    codecs: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Its settings in a line."""
        return in_words(self.settings, short_names(list(self.settings)))

    def run_path(self, out: Path) -> Path:
        """The run directory."""
        return out / RUNS / self.name

    @property
    def stages(self) -> list[str]:
        """Its stages in order; empty where it is one training."""
        return list(self.recipe.kept)

    @property
    def last(self) -> Recipe:
        """The recipe of its last training, which is scored."""
        return self.recipe.kept[self.stages[-1]] if self.stages else self.recipe

    def result_path(self, out: Path) -> Path:
        """The run directory of its last training."""
        return self.run_path(out).joinpath(*self.stages[-1:])

    def first_shared(self, caches: Caches, out: Path) -> Path | None:
        """The run that its first stage is, for all that begin so; None where it has but one."""
        if len(self.stages) < 2:
            return None
        assert isinstance(caches, Mapping)
        first = self.stages[0]
        return out / SHARED / shared_name(self.recipe.stages[first], caches[first])

    def cache_path(self, cache: Caches, out: Path) -> str | None:
        """The cache that it reads, without stages: the given one, or one that is made of it."""
        if self.codecs:
            return str(out / CACHES / codec_digest(self.codecs))
        assert not isinstance(cache, Mapping)
        return cache


def plan_runs(tree: Mapping[str, Any], where: str, cache: Cache | None) -> list[PlannedRun]:
    """All runs of a recipe, each once, in the order of list and grid.

    Args:
        tree: plain values of the recipe, with its sweep section.
        where: what to call it in an error.
        cache: what `--cache` names; None where the recipe names its caches.

    Raises:
        RecipeError: there is no sweep section, or a run's recipe is wrong.
    """
    section = parse_recipe(tree, where).sweep
    if section is None:
        raise RecipeError(
            f"{where}: has no sweep section; give one, or "
            "--sweep.grid.train.objective.1.temperature 1,2,4 (see docs/sweeps.md)"
        )
    base = {key: value for key, value in tree.items() if key != "sweep"}
    paths = dict.fromkeys([p for one in section.list for p in one] + list(section.grid))
    named = NAME in paths
    paths.pop(NAME, None)
    stages = list(tree.get(STAGES) or ())
    for path in paths:
        _check_path(path, where, stages)
    shown_paths = [NAME, *section.grid] if named else list(paths)
    found: dict[str, PlannedRun] = {}
    for given in points(section):
        run = _planned(base, given, shown_paths, where, cache)
        found.setdefault(run.name, run)
    return list(found.values())


def points(section: SweepSection) -> list[Settings]:
    """The settings of each run: every item of the list on every point of the grid."""
    corners = itertools.product(*section.grid.values())
    grid = [dict(zip(section.grid, corner, strict=True)) for corner in corners]
    return [{**item, **point} for item in section.list or [{}] for point in grid]


def _check_path(path: str, where: str, stages: Collection[str]) -> None:
    """Refuse to vary what a run does not read."""
    stage, own = _of_stage(path)
    if own.startswith("train.") and (stage is None or stage in stages):
        return
    if own == "skip" and stage in stages:
        return
    if _codec_of(path) is not None and not stages:
        return
    varied = "fields of train, or dump.signals.NAME.codec, which re-encodes the cache"
    if stages:
        varied = (
            "fields of train, and of one stage with stages.NAME before them, or stages.NAME.skip; "
            f"stages are {', '.join(stages)}"
        )
    raise RecipeError(f"{where}: sweep: {path!r} cannot be swept; a sweep varies {varied}")


def _of_stage(path: str) -> tuple[str | None, str]:
    """The stage that a path names, if it does, and the rest of it."""
    if not path.startswith(f"{STAGES}."):
        return None, path
    _, stage, own = [*path.split(".", 2), ""][:3]
    return stage, own


def _codec_of(path: str) -> str | None:
    """The signal whose codec a path is; None where it is another field."""
    parts = path.split(".")
    return parts[2] if len(parts) == 4 and (*parts[:2], parts[3]) == _CODEC_PATH else None


_CODEC_PATH = ("dump", "signals", "codec")


def _planned(
    base: Mapping[str, Any], given: Settings, paths: Sequence[str], where: str, cache: Cache | None
) -> PlannedRun:
    """One run, its recipe validated."""
    tree = copy.deepcopy(dict(base))
    signals = []
    name = given.get(NAME)
    given = {path: value for path, value in given.items() if path != NAME}
    for path, value in given.items():
        signal = _codec_of(path)
        if signal is not None and value is None:
            continue
        if signal is not None:
            signals.append(signal)
        set_all(tree, path, value)
    recipe = parse_recipe(tree, where=f"{where}: sweep")
    codecs = {}
    for signal in signals:
        codec = _reencoded(recipe, signal, where, cache)
        if codec is not None:
            codecs[signal] = codec
    plain = recipe_tree(recipe)
    settings = {path: name if path == NAME else _setting(plain, path, given) for path in paths}
    identity: dict[str, Any] = {"train": settings_of(recipe), "codecs": codecs}
    if recipe.stages:
        identity = {name: settings_of(stage) for name, stage in recipe.kept.items()}
    return PlannedRun(digest_of(identity), settings, given, recipe, codecs)


def _setting(plain: Mapping[str, Any], path: str, given: Settings) -> Any:
    """The value that a run has at a path, given or not; None of a stage that is left out."""
    if _codec_of(path) is not None:
        return given.get(path) or AS_DUMPED
    if STAGES not in plain:
        return _value(plain, path)
    stage, own = _of_stage(path)
    if own == "skip":
        return plain[STAGES][stage].get(own, False)
    trees = plain[STAGES].values() if stage is None else [plain[STAGES][stage]]
    found = [_value(tree, own) for tree in trees if not tree.get("skip")] or [None]
    return found[0] if all(one == found[0] for one in found) else found


def _value(node: Any, path: str) -> Any:
    """The plain value at a path; None where there is none."""
    for key in path.split("."):
        try:
            node = node[int(key)] if isinstance(node, list) else node[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return node


def _reencoded(recipe: Recipe, signal: str, where: str, cache: Cache | None) -> Any:
    """The codec that a signal is re-encoded to, as plain values; None if it has that one."""
    if cache is None:
        raise RecipeError(
            f"{where}: sweep: a codec can be swept over the one cache of --cache, not over "
            "train.caches; re-encode those with `kdcache compile`"
        )
    asked, record = recipe.dump.signals[signal], cache.signal(signal)
    if not isinstance(asked, LogitsSignal) or not isinstance(record, LogitsRecord):
        raise RecipeError(f"{where}: sweep: signal {signal!r} is {record.kind}; logits have codecs")
    if asked.codec == record.codec:
        return None
    check_servable(record, asked.codec, record.temperatures)
    return asked.codec.model_dump(mode="json")


def codec_digest(codecs: Mapping[str, Any]) -> str:
    """Name of the cache whose signals are re-encoded so."""
    return digest_of(dict(codecs))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path to the shortest end of it that tells it from the others."""
    found = {}
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            same = [p for p in paths if p == end or p.endswith(f".{end}")]
            if len(same) == 1 and not parts[-length].isdecimal():
                break
        found[path] = end
    return found


def in_words(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Settings in a line; what an item of the list is called stands by itself.

    Args:
        settings: path to value.
        names: path to what it is called, of those that are wanted.
    """
    found = [(path, name, shown(settings[path])) for path, name in names.items()]
    return ", ".join(value if path == NAME else f"{name} {value}" for path, name, value in found)


def shown(value: Any) -> str:
    """A setting in a table: a codec by its name and figures, no quotes, no tails of zeros."""
    if isinstance(value, Mapping):
        rest = [f"{k} {shown(v)}" for k, v in value.items() if k != "name" and v is not None]
        return " ".join([*([str(value["name"])] if "name" in value else []), *rest])
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(one) for one in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
