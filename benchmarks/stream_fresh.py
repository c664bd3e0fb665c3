"""What `bench_stream` measures in fresh processes: cold files, memory over the size of a cache."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_caches import make_cache
from setting import log

if TYPE_CHECKING:
    from stream_ways import Ways

#: Reads some batches; says what memory it then has, and when the first batch came.
_READ = """
import json, re, sys, time
import kdcache
path, number = sys.argv[1], int(sys.argv[2])
def memory():
    status = open("/proc/self/status").read()
    names = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
    return {name: int(re.search(name + r":\\s+(\\d+)", status)[1]) << 10 for name in names}
before, began = memory(), time.perf_counter()
running = iter(kdcache.batches(path, signals=["logits"], batch_tokens=16384))
next(running)
first, tokens, most = time.perf_counter() - began, 0, 0
for count in range(number):
    tokens += next(running).num_tokens
    if count % 50 == 49:
        most = max(most, memory()["RssAnon"])
print(json.dumps({"first_batch_seconds": first, "seconds": time.perf_counter() - began - first,
    "tokens": tokens, "before": before, "after": memory(), "most_anonymous": most}))
"""


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def drop(folder: Path) -> None:
    """Take all files of a folder out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measure_cold(ways: Ways, codecs: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Rates after the page cache was dropped, but for pages that processes map.

    So each way is ended and started afresh first.
    """
    found: dict[str, Any] = {}
    budget = args.batch_tokens[-1]
    for codec in codecs:
        rates: dict[str, list[dict[str, Any]]] = {}
        for number in range(args.cold_turns):
            for name in [name for name in ways.servers if name not in ("copy", "clone")]:
                ways.restart(name)
                drop(ways.data(name, codec))
                answer = ways.stream(name, codec, budget, args.seconds, 100 + number)
                if answer is not None:
                    rates.setdefault(name, []).append(answer)
        found[codec] = {
            name: {
                key: spread([one[key] for one in each])
                for key in ("tokens_per_second", "first_batch_seconds")
            }
            for name, each in rates.items()
        }
        log(f"{codec}, cold: {found[codec]}")
    return found


def measure_growth(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of a fresh process after as many batches of caches of two sizes."""
    found: dict[str, Any] = {}
    number = args.growth_batches
    for shards in args.growth_shards:
        path = root / f"growth-{shards}"
        make_cache(path, shards, args.growth_tokens)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        command = [sys.executable, "-c", _READ, str(path), str(number)]
        once = json.loads(subprocess.check_output(command, text=True))
        found[str(shards)] = {"bytes": size, **once}
        log(f"{size / 1e9:.2f} GB: {once}")
    small, large = (found[str(shards)] for shards in args.growth_shards)
    growth = {
        key: round(large["after"][key] / small["after"][key], 4) for key in ("VmRSS", "RssAnon")
    }
    return {
        "growth": {"batches": number, "caches": found},
        "rss_growth": growth["VmRSS"],
        "anonymous_growth": growth["RssAnon"],
    }
