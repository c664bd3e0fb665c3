"""How long `kdcache train` takes to its first step, beside the imports that no trainer can spare.

Every measurement is a fresh process, from its start to the moment in question.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: What a process does before it ends on the spot.
PROBES = {
    "imports": "import torch, transformers",
    # transformers loads no model's code before one is asked for.
    "imports_and_model": "import torch, transformers\ntransformers.MarianMTModel",
    # Drawn labels do not hold their targets, so the canary does its work and is not believed.
    "first_step": """
import sys
from contextlib import suppress
from kdcache.cli import main
from kdcache.errors import TrainingError
from kdcache.train.families import encoder_decoder
from kdcache.train.runs import loop
look = encoder_decoder.check_batch
def check_batch(*arguments):
    with suppress(TrainingError):
        look(*arguments)
encoder_decoder.check_batch = check_batch
loop.Trainer.step = lambda *_: end()
sys.exit(main(["train", "word-level", "--cache", sys.argv[1], "--out", sys.argv[2]]) or 1)
""",
}
_END = "import os\ndef end():\n    os._exit(0)\n"


def seconds_of(probe: str, cache: Path, out: Path) -> float:
    """Wall time of one fresh process."""
    code = f"{_END}{PROBES[probe]}\nend()"
    began = time.perf_counter()
    command = [sys.executable, "-c", code, str(cache), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def measure_startup(cache: Path, work: Path, turns: int) -> dict[str, Any]:
    """Seconds of each probe in turns, and of the first step over the imports.

    Args:
        cache: that the recipe `word-level` trains from.
        work: folder for runs.
        turns: after one that warms the page cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in PROBES}
    for turn in range(turns + 1):
        for name, taken in seconds.items():
            found = seconds_of(name, cache, work / f"run-{turn}")
            if turn:
                taken.append(found)
    ours = seconds["first_step"]
    return {
        "seconds": {name: round(statistics.median(taken), 3) for name, taken in seconds.items()},
        "over_imports": spread(ours, seconds["imports"]),
        "over_imports_and_model": spread(ours, seconds["imports_and_model"]),
        "turns": turns,
    }


def spread(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Ratio of the medians, with the smallest and largest ratio of a turn."""
    ratios = [here / there for here, there in zip(ours, theirs, strict=True)]
    return {
        "median": round(statistics.median(ours) / statistics.median(theirs), 3),
        "turns": [round(bound(ratios), 3) for bound in (min, max)],
    }
