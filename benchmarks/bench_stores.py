"""What it costs to train from an object store: batches off a local cache, and off one on S3.

    python benchmarks/bench_stores.py [--quick] [--save]

The server is moto's, on loopback, in a process of its own. Three epochs of training batches are
made by `BatchStream` and thrown away: `local` from a cache on the disk, `warm` from the same cache
on S3 whose files are in the local copy already, `cold` with an empty local copy. They take turns,
the cache opened anew each time. Ratios are of the time of all batches but the first to that of
`local` in the same turn, and of the processor's time; opening the cache and the first batch are
told beside it. The page cache is warm for `local` and `warm`. What `cold` costs is the speed of the
server, a Python process; the figure that counts is `warm_over_local`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec
from scale_caches import make_cache
from setting import log, report

from kdcache.formats.cache import open_cache
from kdcache.train.batches.stream import BatchStream

BATCH_TOKENS = 16_384
EPOCHS = 3
WINDOW_SHARDS = 2
VARIANTS = ("local", "warm", "cold")


@contextmanager
def s3_server() -> Iterator[str]:
    """URL of an empty bucket on a server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()"]
    process = subprocess.Popen(
        [*command, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/cache"
    finally:
        process.terminate()
        process.wait()


def batches(location: str) -> tuple[float, float, float, int]:
    """Seconds to the first batch, those of all others, processor seconds, and target tokens."""
    start = time.perf_counter()
    cache = open_cache(location)
    stream = BatchStream(
        cache, "src", "tgt", ["logits"], BATCH_TOKENS, 1, WINDOW_SHARDS, max_epochs=EPOCHS
    )
    with closing(iter(stream)) as found:
        next(found)
        first, used = time.perf_counter(), time.process_time()
        tokens = sum(batch.num_tokens for batch in found)
    ended = time.perf_counter()
    return first - start, ended - first, time.process_time() - used, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smaller cache, fewer turns")
    parser.add_argument("--save", action="store_true", help="write results/bench_stores.json")
    arguments = parser.parse_args()
    shards, shard_tokens, turns = (4, 500_000, 5) if arguments.quick else (8, 1 << 20, 7)
    with tempfile.TemporaryDirectory() as folder, s3_server() as url:
        local, copy = Path(folder) / "cache", Path(folder) / "copy"
        os.environ |= {"KDCACHE_LOCAL_COPY": str(copy), "KDCACHE_LOCAL_COPY_BYTES": "50GB"}
        log(f"writing {shards} shards of {shard_tokens} tokens")
        make_cache(local, shards, shard_tokens)
        size = sum(path.stat().st_size for path in local.rglob("*") if path.is_file())
        fsspec.filesystem("s3").put(f"{local}/", url, recursive=True)
        places = {"local": str(local), "warm": url, "cold": url}
        firsts: dict[str, list[float]] = {name: [] for name in VARIANTS}
        rests: dict[str, list[float]] = {name: [] for name in VARIANTS}
        processors: dict[str, list[float]] = {name: [] for name in VARIANTS}
        batches(str(local))
        batches(url)
        for turn in range(turns):
            for name in VARIANTS:
                if name == "cold":
                    shutil.rmtree(copy)
                first, rest, processor, tokens = batches(places[name])
                firsts[name].append(first)
                rests[name].append(rest)
                processors[name].append(processor)
                speed = tokens / rest / 1e6
                log(f"turn {turn} {name}: first {first:.2f} s, then {speed:.2f} M tokens/s")
    found: dict[str, Any] = {"cache_bytes": size, "tokens": tokens}
    for name in ("warm", "cold"):
        ratios = [a / b for a, b in zip(rests[name], rests["local"], strict=True)]
        used = [a / b for a, b in zip(processors[name], processors["local"], strict=True)]
        found[f"{name}_over_local"] = round(statistics.median(ratios), 3)
        found[f"{name}_processor_over_local"] = round(statistics.median(used), 3)
        found[f"{name}_over_local_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    for name in VARIANTS:
        found[f"{name}_tokens_per_second"] = round(tokens / statistics.median(rests[name]))
        found[f"{name}_first_batch_seconds"] = round(statistics.median(firsts[name]), 3)
    report(found, "bench_stores", save=arguments.save)


if __name__ == "__main__":
    main()
