"""A worker that does what its run's seed says and trains nothing."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

from kdcache.errors import TrainingError
from kdcache.sweep.plan import PlannedRun
from kdcache.sweep.work import Worker

FAILS, BREAKS, DIES, HANGS = 91, 92, 93, 94


@dataclass
class StubWorker(Worker):
    def do(self, run: PlannedRun) -> None:
        path = run.run_path(self.folder.out)
        path.mkdir(parents=True, exist_ok=True)
        (path / "pid").write_text(str(os.getpid()))
        (path / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
        seed = run.recipe.train.seed
        print("said by", seed)
        if seed == FAILS:
            raise TrainingError("step 3: loss is nan")
        if seed == BREAKS:
            raise ZeroDivisionError("something else")
        if seed == DIES:
            os._exit(9)
        if seed == HANGS:
            time.sleep(600)
        summary = {"best_dev_loss": seed / 10, "seconds": 1.0, "parameters": 5}
        (path / "run.json").write_text(json.dumps({"summary": summary}))
