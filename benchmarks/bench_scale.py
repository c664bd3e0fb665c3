"""What a cache's size costs: opening, memory, inspecting, verifying at the speed of the disk.

Caches of 1, 10 and 100 shards are made without a teacher, and one with hidden states. Open time
and memory are those of fresh processes: `reader` opens the cache and maps a window of one shard
with `kdcache.formats` alone, `trainer` makes the first batch as a training run does. `verify` and a
plain sequential read of the same files take turns; the page cache is dropped before each (a cache
of the host's below a virtual disk is not ours to drop). Last, the records of a cache of 100,000
shards, whose data files have sizes but no contents, for what is done before any data are read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_caches import make_cache, make_hollow_cache
from setting import log, report

from kdcache.formats.checks.verify import verify_cache
from kdcache.processes import num_cores

CHUNK_BYTES = 1 << 20

#: What a fresh process does; it prints seconds and its largest resident memory before and after.
_OPEN = """
import re, sys, time
{imports}
def memory():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before, began = memory(), time.perf_counter()
{body}
print(time.perf_counter() - began, before, memory())
"""
_WAYS = {
    "reader": _OPEN.format(
        imports="from kdcache.formats.cache import open_cache\n"
        "from kdcache.formats.window import WindowReader\nimport numpy as np",
        body="cache = open_cache(sys.argv[1])\n"
        "window = WindowReader(cache, [0], ['src', 'tgt'], ['logits'])\n"
        "window.take_signal('logits', np.arange(256)), window.take_stream('tgt', np.arange(256))",
    ),
    "trainer": _OPEN.format(
        imports="from kdcache.formats.cache import open_cache\n"
        "from kdcache.train.batches.stream import BatchStream",
        body="cache = open_cache(sys.argv[1])\n"
        "next(iter(BatchStream(cache, ['src', 'tgt'], ['logits'], 4096, 0, 1)))",
    ),
}
_HOLLOW = {
    "open": ("open_cache", "open_cache(sys.argv[1])"),
    "list_commits": (
        "open_cache, list_commits, open_store",
        "list_commits(open_store(sys.argv[1]))",
    ),
    "inspect_records": (
        "open_cache, committed",
        "for found in committed(open_cache(sys.argv[1])).values():\n"
        "    found.num_bytes, found.entries",
    ),
    "dump_start": (
        "CacheWriter",
        "with CacheWriter(sys.argv[1]) as writer:\n"
        "    writer.committed('logits')\n"
        "    with writer.claimed('logits', 17) as mine:\n"
        "        assert mine and writer.is_committed('logits', 17)",
    ),
    "trainer_start": (
        "open_cache, BatchStream, epoch_windows",
        "cache = open_cache(sys.argv[1])\n"
        "stream = BatchStream(cache, ['src', 'tgt'], ['logits'], 4096, 0, 8)\n"
        "epoch_windows(stream.state.digest, cache.num_shards, 8, 0, 0)",
    ),
    "verify_quick": (
        "verify_cache",
        "report = verify_cache(sys.argv[1], quick=True)\nassert not report.faults",
    ),
}
_MODULES = {
    "open_cache": "kdcache.formats.cache",
    "open_store": "kdcache.formats.stores.store",
    "list_commits": "kdcache.formats.listing",
    "committed": "kdcache.report.commits",
    "BatchStream": "kdcache.train.batches.stream",
    "epoch_windows": "kdcache.train.batches.order",
    "CacheWriter": "kdcache.formats.writer",
    "verify_cache": "kdcache.formats.checks.verify",
}


def hollow_code(names: str, body: str) -> str:
    """What a fresh process does to the cache of many shards."""
    imports = [f"from {_MODULES[name]} import {name}" for name in names.split(", ")]
    return _OPEN.format(imports="\n".join(imports), body=body)


def fresh(code: str, path: Path) -> dict[str, float]:
    """Seconds and bytes of resident memory of one fresh process."""
    command = [sys.executable, "-c", code, str(path)]
    seconds, before, after = subprocess.check_output(command, text=True).split()
    return {
        "seconds": float(seconds),
        "rss_bytes": int(after),
        "rss_added_bytes": int(after) - int(before),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure_open(caches: dict[str, Path], turns: int) -> dict[str, Any]:
    """Open time and memory of every cache, turn by turn."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {name: [] for name in caches} for way in _WAYS
    }
    for turn in range(turns + 1):
        for way, code in _WAYS.items():
            for name, path in caches.items():
                once = fresh(code, path)
                if turn:  # the first brings files into the page cache
                    found[way][name].append(once)
    return {
        way: {
            name: {key: spread([once[key] for once in each]) for key in each[0]}
            for name, each in by_name.items()
        }
        for way, by_name in found.items()
    }


def growth(found: dict[str, Any], key: str, caches: list[str]) -> float:
    """Largest ratio of a cache's figure to that of the smallest cache, over both ways."""
    return max(
        found[way][name][key]["median"] / found[way][caches[0]][key]["median"]
        for way in found
        for name in caches
    )


def files_of(path: Path) -> list[Path]:
    """All files of a cache, those of a shard one after another as they lie in their folder."""
    return sorted(file for file in path.rglob("*") if file.is_file())


def drop(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_all(files: list[Path]) -> None:
    """The plain sequential read that `verify` is measured against."""
    buffer = bytearray(CHUNK_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while stream.readinto(buffer):
                pass


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def check(path: Path) -> None:
    """As `kdcache verify` does it."""
    faults = verify_cache(path, processes=num_cores()).faults
    assert not faults, faults


def measure_verify(path: Path, turns: int) -> dict[str, Any]:
    """Verify and plain read of one cache in turns, the page cache dropped before each."""
    files = files_of(path)
    total = sum(file.stat().st_size for file in files)
    reads, verifies = [], []
    for _ in range(turns):
        drop(files)
        reads.append(timed(lambda: read_all(files)))
        drop(files)
        verifies.append(timed(lambda: check(path)))
    warm = timed(lambda: check(path))
    ratios = [read / verify for read, verify in zip(reads, verifies, strict=True)]
    return {
        "bytes": total,
        "read_bytes_per_second": spread([total / seconds for seconds in reads]),
        "verify_bytes_per_second": spread([total / seconds for seconds in verifies]),
        "verify_warm_bytes_per_second": total / warm,
        "verify_over_read": statistics.median(reads) / statistics.median(verifies),
        "verify_over_read_turns": ratios,
    }


def measure_inspect(caches: dict[str, Path], turns: int) -> dict[str, Any]:
    """Wall time of `kdcache inspect`, and over that of its --help, which only starts."""
    command = [sys.executable, "-m", "kdcache", "inspect"]
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    starts = []
    for _ in range(turns):
        starts.append(timed(lambda: subprocess.check_output([*command, "--help"])))
        for name, path in caches.items():
            seconds[name].append(timed(lambda p=path: subprocess.check_output([*command, p])))
    start = statistics.median(starts)
    return {
        name: {"seconds": spread(each), "over_help": statistics.median(each) / start}
        for name, each in seconds.items()
    }


def measure_hollow(path: Path, shards: int, turns: int) -> dict[str, Any]:
    """What is done with the records of a cache of very many shards."""
    began = time.perf_counter()
    make_hollow_cache(path, shards, shard_tokens=10_000_000, part_bytes=280 << 20)
    log(f"made the records of {shards:,} shards in {time.perf_counter() - began:.0f} s")
    found: dict[str, Any] = {
        "shards": shards,
        "manifest_bytes": (path / "kdcache.json").stat().st_size,
    }
    for what, (names, body) in _HOLLOW.items():
        each = [fresh(hollow_code(names, body), path) for _ in range(turns)]
        found[what] = {key: statistics.median([once[key] for once in each]) for key in each[0]}
        log(f"{shards:,} shards, {what}: {found[what]['seconds']:.2f} s")
    return found


def run(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All measures."""
    sizes = {f"{n} shards": n for n in args.shards}
    caches = {name: root / f"scale-{n}" for name, n in sizes.items()}
    for name, path in caches.items():
        make_cache(path, sizes[name], args.shard_tokens)
        log(f"made {name}")
    hidden = root / "scale-hidden"
    make_cache(hidden, args.hidden_shards, args.hidden_tokens, width=args.width)
    opened = measure_open(caches, args.turns)
    names = list(caches)
    verified = {}
    for name, path in {**caches, "hidden states": hidden}.items():
        verified[name] = measure_verify(path, args.turns)
        log(f"verify over read, {name}: {verified[name]['verify_over_read']:.2f}")
    return {
        "shard_tokens": args.shard_tokens,
        "open_growth": growth(opened, "seconds", names),
        "rss_growth": growth(opened, "rss_bytes", names),
        "verify_over_read": verified[names[-1]]["verify_over_read"],
        "open": opened,
        "verify": verified,
        "inspect": measure_inspect({**caches, "hidden states": hidden}, args.turns),
        "hollow": measure_hollow(root / "scale-hollow", args.hollow_shards, 3),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{'':<15}{'GB':>7}{'reader ms':>11}{'MB':>6}{'trainer ms':>12}{'MB':>6}{'read GB/s':>11}"
        f"{'verify':>8}{'over':>6}{'inspect s':>11}"
    ]
    for name, cell in result["verify"].items():
        line = f"{name:<15}{cell['bytes'] / 1e9:>7.2f}"
        for way, width in (("reader", 11), ("trainer", 12)):
            found = result["open"][way].get(name)
            line += (
                f"{1e3 * found['seconds']['median']:>{width}.1f}"
                f"{found['rss_bytes']['median'] / 1e6:>6.0f}"
                if found
                else " " * (width + 6)
            )
        line += f"{cell['read_bytes_per_second']['median'] / 1e9:>11.2f}"
        line += f"{cell['verify_bytes_per_second']['median'] / 1e9:>8.2f}"
        line += f"{cell['verify_over_read']:>6.2f}"
        line += f"{result['inspect'][name]['seconds']['median']:>11.2f}"
        lines.append(line)
    hollow = result["hollow"]
    lines.append(f"records of {hollow['shards']:,} shards: seconds (memory added, MB)")
    for what in _HOLLOW:
        found = hollow[what]
        lines.append(f"  {what:<18}{found['seconds']:>8.2f} ({found['rss_added_bytes'] / 1e6:.0f})")
    return "\n".join(lines)


def main() -> None:
    """Print one JSON object on the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="some hundred MB, fewer turns")
    parser.add_argument("--out", metavar="DIR", help="folder for the caches; a temporary one else")
    parser.add_argument("--shards", type=_numbers, help="of each cache (default 1,10,100)")
    parser.add_argument("--shard-tokens", type=int, help="of a shard (default 3,000,000)")
    parser.add_argument("--hollow-shards", type=int, help="default 100,000, quick 2,000")
    parser.add_argument("--turns", type=int, help="default 7, quick 3")
    parser.add_argument("--width", type=int, default=512, help="of hidden states")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    args.shards = args.shards or [1, 10, 100]
    args.shard_tokens = args.shard_tokens or (100_000 if args.quick else 3_000_000)
    args.hollow_shards = args.hollow_shards or (2_000 if args.quick else 100_000)
    args.turns = args.turns or (3 if args.quick else 7)
    args.hidden_shards = 2 if args.quick else 4
    args.hidden_tokens = 50_000 if args.quick else 200_000
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-", dir=args.out) as directory:
        result = {
            "benchmark": "bench_scale",
            "generated_data": True,
            "quick": args.quick,
            "turns": args.turns,
            "load": os.getloadavg()[0],
            **run(Path(directory), args),
        }
    print(table(result))
    report(result, "bench_scale", save=args.save)


def _numbers(text: str) -> list[int]:
    return sorted(int(number) for number in text.split(","))


if __name__ == "__main__":
    main()
