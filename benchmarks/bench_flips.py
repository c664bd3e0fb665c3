"""Random damage to every kind of file of a cache: what `verify` says, and what a trainer gets.

A small cache with signals of all kinds, and two more of the same shape (other text; another teacher
and other codecs). Each trial flips one bit, cuts a file, lengthens it, exchanges two files of a
kind, or puts a file of another cache in its place; kinds of files have the same chance. `verify`
must name every damaged file, and everything a trainer reads (batches, windows, dense values) must
be an error or exactly what was dumped. A child process that dies counts as a miss. Trials are those
of tests/formats/damage.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from setting import log, report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests share the trials
from tests.formats.damage import Damage, make_world, run_trials

#: Of what was missed, so many are told in full.
SHOWN = 20


def run(root: Path, count: int, seed: int, workers: int) -> dict[str, Any]:
    """All trials, counted by kind of file and by kind of damage."""
    world = make_world(root / "caches")
    trials: dict[str, Counter[str]] = {"kinds": Counter(), "damages": Counter()}
    misses: dict[str, Counter[str]] = {"kinds": Counter(), "damages": Counter()}
    shown: list[dict[str, Any]] = []
    missed, began = 0, time.perf_counter()
    for done, lines in run_trials(world, root, count, seed, workers):
        for by, what in (("kinds", done.kind), ("damages", done.name)):
            trials[by][what] += 1
            misses[by][what] += bool(lines)
        missed += bool(lines)
        if lines and len(shown) < SHOWN:
            shown.append(described(done, lines))
            log(f"missed: {shown[-1]}")
        total = trials["damages"].total()
        if total % 500 == 0:
            log(f"{total} of {count} trials, {missed} missed, {time.perf_counter() - began:.0f} s")
    return {
        "flips": trials["damages"].total(),
        "missed": missed,
        **{
            by: {
                what: {"trials": number, "missed": misses[by][what]}
                for what, number in sorted(trials[by].items())
            }
            for by in trials
        },
        "files": {kind: len(paths) for kind, paths in world.files.items()},
        "cache_bytes": sum(file.stat().st_size for file in world.root.rglob("*") if file.is_file()),
        "seed": seed,
        "examples": shown,
    }


def described(done: Damage, lines: list[str]) -> dict[str, Any]:
    """One miss, so that it can be done again."""
    return {"number": done.number, "damage": done.name, "files": list(done.files), "what": lines}


def main() -> None:
    """Print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, help="trials (default 10000, quick 500)")
    parser.add_argument("--seed", type=int, default=0, help="of all trials")
    parser.add_argument("--quick", action="store_true", help="under two minutes on 2 cores")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    count = args.count or (500 if args.quick else 10_000)
    # In memory where that can be had: a trial writes a file and reads some hundred.
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-", dir=place) as directory:
        result = {
            "benchmark": "bench_flips",
            "quick": args.quick,
            **run(Path(directory), count, args.seed, args.workers),
        }
    report(result, "bench_flips", save=args.save)


if __name__ == "__main__":
    main()
