"""`kdcache report`: what stands at a path, as one HTML page with a Markdown twin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import KDCacheError, RecipeError
from kdcache.report.document import write
from kdcache.report.pictures import require_matplotlib
from kdcache.report.runs import RECORD, open_run

_NAME = "report.html"


def write_report(
    path: str | Path,
    out: str | Path | None = None,
    beside: Sequence[str | Path] = (),
    cache: str | None = None,
) -> dict[str, Any]:
    """Write the report of a run, a sweep or a cache.

    Args:
        path: the directory, or a cache's URL.
        out: the page; `report.html` in a run or sweep, `NAME-report.html` here of a cache.
        beside: runs shown beside.
        cache: where the cache of a run or sweep lies now.

    Returns:
        kind, report, markdown, pictures (their number), bytes (of the page).

    Raises:
        KDCacheError: matplotlib is missing, or there is none of the three.
        RecipeError: `beside` or `cache` is given of a cache.
        StorageError: the disk refused.
    """
    require_matplotlib()
    place = Path(path)
    kind = _kind(str(path))
    if kind == "cache" and (beside or cache is not None):
        raise RecipeError(f"{path}: is a cache; --beside and --cache go with a run or a sweep")
    name = str(path).rstrip("/").rsplit("/", 1)[-1]
    target = Path(out or (f"{name}-{_NAME}" if kind == "cache" else place / _NAME))
    if target.suffix != ".html":
        raise RecipeError(f"--out {target}: the page is HTML; give a name that ends in .html")
    runs = [open_run(Path(one)) for one in beside]
    if kind == "run":
        from kdcache.report.run_page import run_document

        document = run_document(open_run(place, place.resolve().name), runs, cache)
    elif kind == "sweep":
        from kdcache.report.sweep_page import sweep_document

        document = sweep_document(place, runs, cache)
    else:
        from kdcache.report.cache_page import cache_document

        document = cache_document(str(path))
    return {"kind": kind, **write(document, target)}


def _kind(path: str) -> str:
    """What stands at a path.

    Raises:
        KDCacheError: nothing that there are reports of.
    """
    place = Path(path)
    if "://" in path or (place / "kdcache.json").is_file():
        return "cache"
    if (place / RECORD).is_file():
        return "run"
    if (place / "sweep.json").is_file():
        return "sweep"
    what = "neither a run, a sweep nor a cache" if place.exists() else "there is nothing"
    raise KDCacheError(
        f"{path}: {what}; give what `kdcache train`, `sweep` or `dump` wrote with --out"
    )
