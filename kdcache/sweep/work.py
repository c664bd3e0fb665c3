"""What one run of a sweep needs done: a re-encoded cache, the training, the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.sweep.folder import SweepFolder, only_one
from kdcache.sweep.plan import SHARED, Caches, PlannedRun

if TYPE_CHECKING:
    from kdcache.train.runs.shared import Shared

logger = logging.getLogger(__name__)


@dataclass
class Worker:
    """Does runs one after another; caches and development sets are opened and encoded once.

    Attributes:
        cache: that the sweep is over, of stages by name; None where recipes name their caches.
        folder: of the sweep.
    """

    cache: Caches
    folder: SweepFolder
    _shared: Shared | None = None
    _encoded: set[str] = field(default_factory=set)

    def do(self, run: PlannedRun) -> None:
        """All that is left of a run.

        Raises:
            KDCacheError: what `kdcache train` and its like would have reported.
        """
        from kdcache.train.runs.loop import train
        from kdcache.train.runs.shared import Shared
        from kdcache.train.runs.stages import train_stages

        if self._shared is None:
            self._shared = Shared()
        out = self.folder.out
        self.folder.begin(run)
        if not self.folder.trained(run) and isinstance(self.cache, Mapping):
            share = out / SHARED
            train_stages(run.recipe, self.cache, run.run_path(out), share, self._shared)
        elif not self.folder.trained(run):
            place = run.cache_path(self.cache, out)
            if run.codecs and place not in self._encoded:
                assert isinstance(self.cache, str)
                assert place is not None
                _reencode(self.cache, Path(place), run)
                self._encoded.add(place)
            train(run.recipe, place, run.run_path(out), shared=self._shared)
        if run.last.evaluate.corpus is not None and not self.folder.finished(run):
            from kdcache.train.evaluation.evaluate import evaluate

            evaluate(run.result_path(out), section=run.last.evaluate)
            self.folder.evaluated(run)


def _reencode(cache: str, place: Path, run: PlannedRun) -> None:
    """Make the cache of a run's codecs, or find it; others who need it wait."""
    from kdcache.compile.compiler import compile_caches
    from kdcache.compile.options import CompileOptions

    lock = place.parent / f"{place.name}.lock"
    with only_one(lock, wait=True, busy=""):
        logger.info("%s: labels re-encoded to %s", place, dict(run.codecs))
        compile_caches([cache], place, CompileOptions(codecs=dict(run.codecs)))
