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
    runs = [open_run(Path(one)) for one in beside]
    local = "://" not in str(path)
    if local and (place / RECORD).is_file():
        from kdcache.report.run_page import run_document

        kind, document = "run", run_document(open_run(place, place.resolve().name), runs, cache)
        target = place / _NAME
    elif local and (place / "sweep.json").is_file():
        from kdcache.report.sweep_page import sweep_document

        kind, document = "sweep", sweep_document(place, runs, cache)
        target = place / _NAME
    elif not local or (place / "kdcache.json").is_file():
        from kdcache.report.cache_page import cache_document

        if beside or cache is not None:
            raise RecipeError(f"{path}: is a cache; --beside and --cache go with a run or a sweep")
        kind, document = "cache", cache_document(str(path))
        target = Path(f"{str(path).rstrip('/').rsplit('/', 1)[-1]}-{_NAME}")
    else:
        what = "there is nothing" if not place.exists() else "neither a run, a sweep nor a cache"
        raise KDCacheError(
            f"{path}: {what}; give what `kdcache train`, `sweep` or `dump` wrote with --out"
        )
    target = target if out is None else Path(out)
    if target.suffix != ".html":
        raise RecipeError(f"--out {target}: the page is HTML; give a name that ends in .html")
    return {"kind": kind, **write(document, target)}
