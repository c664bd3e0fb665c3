"""A cache whose commits can be hidden and shown, and batches of it while it grows."""

import shutil
from pathlib import Path

from kdcache.formats.cache import open_cache
from kdcache.train.batches.stream import BatchStream

SIGNALS = ("threshold", "full")


class Growing:
    """A copy of a cache whose commits of two signals can be hidden and shown."""

    def __init__(self, cache: Path, folder: Path):
        self.path, self.hidden = folder / "cache", folder / "hidden"
        shutil.copytree(cache, self.path)
        self.hidden.mkdir(parents=True)
        self.num_shards = open_cache(self.path).num_shards

    def show(self, *counts: int, signals=SIGNALS):
        """Exactly the first shards of each signal, as many of all where one number is given."""
        counts = counts * len(signals) if len(counts) == 1 else counts
        for name, count in zip(signals, counts, strict=True):
            self.show_these(name, range(count))

    def show_these(self, name: str, shards):
        """Exactly these shards of a signal."""
        for shard in range(self.num_shards):
            file = f"{name}.{shard:05d}.json"
            here, there = self.path / "commits" / file, self.hidden / file
            if shard in shards and there.exists():
                there.rename(here)
            elif shard not in shards and here.exists():
                here.rename(there)


def make_stream(path, **change) -> BatchStream:
    settings = {
        "streams": ["src", "tgt"],
        "signals": list(SIGNALS),
        "batch_tokens": 100,
        "seed": 3,
        "window_shards": 2,
        "max_epochs": 4,
        "while_dumping": True,
    }
    return BatchStream(open_cache(path), **(settings | change))


def rows_of_prefix(path, count: int) -> list[int]:
    cache = open_cache(path)
    return sorted(row for shard in range(count) for row in cache.samples(shard).row.tolist())
