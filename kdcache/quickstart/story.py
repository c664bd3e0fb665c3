"""The whole story: a corpus, a teacher, its cache, students without and with it, scores."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import IO, Any

from kdcache.dump.runner import dump
from kdcache.errors import StorageError
from kdcache.formats.stores.commit import storage_errors, write_data
from kdcache.models.loading import quiet_transformers
from kdcache.quickstart import grammar
from kdcache.quickstart.outcome import report_page
from kdcache.quickstart.plan import (
    FULL,
    QUICK,
    SIDES,
    Paths,
    Size,
    student_name,
    student_recipe,
    teacher_recipe,
)
from kdcache.recipe import Recipe, dump_recipe
from kdcache.train.evaluation.baseline import RESULT, read_evaluation
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.runs.loop import train

logger = logging.getLogger(__name__)

TITLES = ("teacher", "student without cache", "student with cache")
MARK = "quickstart.json"
#: Raised whenever an old directory could not be gone on with.
VERSION = 2


def run(out: str | Path, quick: bool = False) -> dict[str, Any]:
    """Tell the whole story on a made-up language pair, or go on where it stopped.

    Args:
        out: directory for the corpus, recipes, caches, runs and `report.html`. What an earlier
            quickstart finished there is not done again.
        quick: shrink everything until the plumbing is run and nothing is learned.

    Returns:
        `models` (teacher, student without and with cache: `bleu`, `chrf`, `dev_loss_nats`,
        `parameters`, `sentences_per_second`), `paired_test` of the two students,
        `learning_rates` (those tried, each with its dev loss), `learning_rate` (the best),
        `report` and `seconds` (of this call).

    Raises:
        StorageError: `out` holds something else, or a quickstart of another size or version.
    """
    began = time.perf_counter()
    size = QUICK if quick else FULL
    # Absolute, so that the recipes run from everywhere.
    paths = Paths(Path(out).expanduser().resolve())
    quiet_transformers()
    _claim(paths, quick)
    _write_corpus(paths, size)

    _say("2/6 teacher: trained on the references of all pairs")
    recipe = _keep(paths, teacher_recipe(paths, size))
    dump(recipe, paths.tokens)
    teacher = train(recipe, paths.tokens, paths.run("teacher"))

    _say(f"3/6 cache: the teacher runs once over the students' {size.student_pairs:,} pairs")
    first = student_recipe(paths, size, size.student_lrs[0], distil=False)
    dump(first, paths.cache)

    rates = ", ".join(f"{lr:g}" for lr in size.student_lrs)
    _say(f"4/6 student without the cache: learning rate tuned on dev ({rates})")
    tried = {}
    for lr in size.student_lrs:
        recipe = _keep(paths, student_recipe(paths, size, lr, distil=False))
        tried[lr] = train(recipe, paths.cache, paths.run(student_name(lr)))
    best = min(tried, key=lambda lr: float(tried[lr]["best_dev_loss"]))

    _say(f"5/6 student with the cache: learning rate {best:g}, all else the same")
    recipe = _keep(paths, student_recipe(paths, size, best, distil=True))
    distilled = train(recipe, paths.cache, paths.run("word-level"))

    _say("6/6 scores on the test set")
    summaries = {"teacher": teacher, student_name(best): tried[best], "word-level": distilled}
    scores = [_evaluated(paths, name) for name in ("teacher", student_name(best))]
    scores.append(_evaluated(paths, "word-level", against=student_name(best)))
    models = {
        title: _row(score, summary)
        for title, score, summary in zip(TITLES, scores, summaries.values(), strict=True)
    }
    result = {
        "models": models,
        "paired_test": {name: scores[-1]["against"][name] for name in ("bleu", "chrf")},
        "learning_rates": {f"{lr:g}": found["best_dev_loss"] for lr, found in tried.items()},
        "learning_rate": best,
        "report": str(paths.report),
        "seconds": time.perf_counter() - began,
    }
    _write(paths.report, report_page(paths, result))
    return result


def _say(text: str) -> None:
    """Which part of the story this is."""
    logger.info("%s", text)


def _claim(paths: Paths, quick: bool) -> None:
    """Mark a directory as this quickstart's, or refuse one that is something else's."""
    mark = {"quickstart": VERSION, "quick": quick}
    path = paths.out / MARK
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != mark:
            raise StorageError(
                f"{paths.out}: holds a quickstart of another version or size ({found}, here "
                f"{mark}); choose another directory or delete it"
            )
        _say(f"{paths.out}: going on with the quickstart that stands there")
        return
    with storage_errors(paths.out):
        paths.out.mkdir(parents=True, exist_ok=True)
        other = sorted(entry.name for entry in paths.out.iterdir())
    if other:
        raise StorageError(
            f"{paths.out}: holds other files ({', '.join(other[:3])}); choose an empty or new "
            "directory"
        )
    _write(path, json.dumps(mark) + "\n")


def _write_corpus(paths: Paths, size: Size) -> None:
    """Write both sides of every split."""
    total = sum(size.pairs.values())
    _say(f"1/6 corpus: {total:,} sentence pairs of a made-up language pair")
    for split, pairs in grammar.corpus(size.pairs).items():
        for side, texts in zip(SIDES, zip(*pairs, strict=True), strict=True):
            _write(paths.text(split, side), "".join(text + "\n" for text in texts))


def _keep(paths: Paths, recipe: Recipe) -> Recipe:
    """Write a recipe down, so that it can be run again with the commands."""
    _write(paths.recipe(recipe.name), dump_recipe(recipe))
    return recipe


def _evaluated(paths: Paths, name: str, against: str | None = None) -> dict[str, Any]:
    """Scores of a finished run, which do not change once they are written."""
    run_path = paths.run(name)
    if (run_path / RESULT).is_file():
        found = read_evaluation(run_path)
        if against is None or "against" in found:
            return found
    return evaluate(run_path, against=paths.run(against) if against else None)


def _row(score: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of a model."""
    return {
        "bleu": score["bleu"]["score"],
        "chrf": score["chrf"]["score"],
        "dev_loss_nats": summary["best_dev_loss"],
        "parameters": score["parameters"]["total"],
        "sentences_per_second": score["sentences_per_second"],
    }


def _write(path: Path, text: str) -> None:
    """Replace a file whole; one that says the same already is left alone."""
    data = text.encode()
    if path.is_file() and path.read_bytes() == data:
        return

    def write(stream: IO[bytes]) -> Path:
        stream.write(data)
        return path

    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_data(path, write)
