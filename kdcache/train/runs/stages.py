"""Several trainings one after another, each from the best weights of the one before.

RUN/recipe.yaml     the resolved recipe of all stages
    STAGE/          a run of each, see `run`, or a link to one that several share
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.errors import IdentityError, ModelError, RecipeError, StorageError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.stores.commit import is_temporary, storage_errors
from kdcache.models.loading import resolve_device
from kdcache.recipe import Recipe, StudentSection, dump_recipe
from kdcache.train.families import FAMILIES
from kdcache.train.runs.loop import train
from kdcache.train.runs.parallel import joined
from kdcache.train.runs.run import IDENTITY, LOCK, RECIPE, shared_name, write_text
from kdcache.train.runs.shared import Shared

logger = logging.getLogger(__name__)

#: Kinds of students that go on as another kind: all weights but those of its head are kept.
GOES_ON_AS = {("masked_lm", "classifier"), ("masked_seq2seq", "encoder_decoder")}


def train_stages(
    recipe: Recipe,
    caches: Mapping[str, str | Path | None],
    out: str | Path,
    share: str | Path | None = None,
    shared: Shared | None = None,
) -> dict[str, Any]:
    """Train the stages of a recipe in turn; go on where an interrupted run stopped.

    A stage that is finished is not trained again. What a later stage needs of its cache is checked
    before the first begins.

    Args:
        recipe: with stages.
        caches: the cache of each, or its URL; None where the stage names its caches.
        out: the directory of all, with a run for each stage.
        share: where all stages but the last are trained, each under a name made of its recipe,
            its caches and what it begins with; `out` has links. Who comes second waits for the
            first, and finds it done. None: every run trains its own.
        shared: see `train`.

    Returns:
        run, and stages: name to what `train` returns of it.

    Raises:
        RecipeError: a stage does not fit its cache, or cannot follow the one before.
        IdentityError: stages read different tokens, or `out` holds another run.
        StorageError: `out` holds other files.
        TrainingError: see `train`.
    """
    run = Path(out)
    check_stages(recipe, caches)
    first, last = next(iter(recipe.kept.values())), list(recipe.kept)[-1]
    summaries: dict[str, Any] = {}
    with joined(resolve_device(first.train.device)) as ranks:
        with ranks.together():
            if ranks.main:
                _claim(run, recipe)
        before: str | None = None
        for number, (name, stage) in enumerate(recipe.kept.items(), start=1):
            if ranks.main:
                logger.info("stage %s, %d of %d", name, number, len(recipe.kept))
            with _in_stage(name):
                begun = stage if before is None else _from_best(stage, run / before)
                start = None if before is None else _start_of(run, before)
                if share is not None and name != last:
                    with ranks.together():
                        if ranks.main:
                            named = shared_name(stage, caches[name], start)
                            _link(run / name, Path(share) / named)
                # Ranks that wait for their main one would give up.
                wait = ranks.world == 1 and (run / name).is_symlink()
                summaries[name] = train(begun, caches[name], run / name, start, shared, wait)
            before = name
        with ranks.together():
            if ranks.main:
                write_text(run / RECIPE, dump_recipe(recipe))  # a resumed one may run elsewhere
    return {"run": str(run), "stages": summaries}


def check_stages(recipe: Recipe, caches: Mapping[str, str | Path | None]) -> None:
    """Refuse stages that could not follow each other, as far as that can be told beforehand.

    Raises:
        RecipeError: a stage lacks something in its recipe or cache, or cannot follow another.
        IdentityError: stages read different tokens.
    """
    before: tuple[str, StudentSection, Cache, Recipe] | None = None
    for name, stage in recipe.kept.items():
        with _in_stage(name):
            section = stage.train
            if section.student is None:
                raise RecipeError("train.student is not set; give train.student.config or .path")
            paths = [share.path for share in section.caches] or [str(caches[name])]
            opened = [open_cache(path) for path in paths]
            family = FAMILIES[section.student.kind]
            whole = family.completed(section, opened)
            for cache in opened:
                family.objective(whole, cache.signals)
            if before is not None:
                _check_follows(before, section.student, opened[0], stage)
        before = (name, section.student, opened[0], stage)


def _check_follows(
    before: tuple[str, StudentSection, Cache, Recipe],
    student: StudentSection,
    cache: Cache,
    stage: Recipe,
) -> None:
    """Refuse a stage that cannot go on with the student of the one before."""
    name, other, its_cache, its_stage = before
    if other.kind != student.kind and (other.kind, student.kind) not in GOES_ON_AS:
        raise RecipeError(
            f"train.student.kind is {student.kind}, which a {other.kind} of stage {name} cannot "
            "become; give both the same, or a masked_lm before a classifier, or a masked_seq2seq "
            "before an encoder_decoder"
        )
    for key in ("path", "config", "layers"):
        if getattr(student, key) != getattr(other, key):
            raise RecipeError(
                f"train.student.{key} is not that of stage {name}, with whose weights this stage "
                f"begins; set --train.student.{key} for all stages"
            )
    for side in ("source", "target"):
        ours, theirs = (
            (of, of.stream(getattr(section.train, side)).tokenizer)
            for of, section in ((cache, stage), (its_cache, its_stage))
        )
        if difference := _token_difference(ours, theirs):
            raise IdentityError(
                f"{cache.path}: tokens of train.{side} are not those of stage {name} "
                f"({its_cache.path}): {difference}; dump both with one tokenizer, such as "
                f"--dump.tokenizers.{ours[1]} '{{kind: pretrained, path: FOLDER}}'"
            )


def _token_difference(ours: tuple[Cache, str], theirs: tuple[Cache, str]) -> str | None:
    """The first id that two tokenizers, each of a cache, give to different tokens."""
    digests = [cache.tokenizer(name).digest for cache, name in (ours, theirs)]
    if len(set(digests)) == 1:
        return None
    pairs = zip(*(cache.tokens(name) for cache, name in (ours, theirs)), strict=False)
    for number, (here, there) in enumerate(pairs):
        if here != there and here and there:  # an id without a name is in no text
            return f"id {number} is {here!r} here and {there!r} there"
    return None  # a prefix or a padding; the student's own rows are checked when it is built


def _from_best(stage: Recipe, before: Path) -> Recipe:
    """A stage whose student begins as the best of another run."""
    assert stage.train.student is not None
    changes = {"path": str(before / "best"), "config": None, "layers": None}
    student = stage.train.student.model_copy(update=changes)
    return stage.model_copy(update={"train": stage.train.model_copy(update={"student": student})})


def _start_of(run: Path, before: str) -> dict[str, str]:
    """What tells a finished run from any other, even one of the same recipe."""
    record = (run / before / IDENTITY).read_bytes()
    return {"stage": before, "digest": hashlib.sha256(record).hexdigest()[:32]}


def _claim(run: Path, recipe: Recipe) -> None:
    """Make the directory of all stages, and put the recipe there if there is none."""
    if run.exists() and not run.is_dir():
        raise StorageError(f"{run}: output is a file; choose a directory")
    with storage_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        names = [entry.name for entry in run.iterdir() if not is_temporary(entry.name)]
    if other := sorted(set(names) - {RECIPE, LOCK, *recipe.kept}):
        raise StorageError(
            f"{run}: output already holds other files ({', '.join(other[:3])}); choose an empty "
            "directory"
        )
    if RECIPE not in names:  # else the stages find out whether it is the same run
        write_text(run / RECIPE, dump_recipe(recipe))


def _link(place: Path, common: Path) -> None:
    """Have a run's stage be one that others share, unless it has one of its own already.

    Raises:
        IdentityError: it is a link to another one.
    """
    if place.is_symlink():
        if place.resolve() != common.resolve():
            raise IdentityError(
                f"{place}: is of another run, {place.resolve()}; choose another output"
            )
    elif not place.exists():
        with storage_errors(place):
            common.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(common.resolve(), place.parent.resolve()))


@contextmanager
def _in_stage(name: str) -> Iterator[None]:
    """Say of what is wrong in which stage it is."""
    try:
        yield
    except (RecipeError, IdentityError, ModelError) as error:
        raise type(error)(f"stage {name}: {error}") from None
