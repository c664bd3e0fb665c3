"""Hidden states on disk: writing them, and reading them the way a trainer does, five ways.

One float16 array [rows, layers, width] of made-up states, in Zarr v3 as a cache has it: chunks of
512 rows of one layer in one shard, uncompressed, each with its crc32c. Variants:

* kdcache: chunks written by `formats/zarr_layout.py` and read from the mapped file
* zarr-python, with its own codec pipeline
* zarrs: zarr-python with the pipeline of the package `zarrs` (Rust)
* TensorStore, as it comes, and (reading) with a cache of 256 MiB

Written is to a durable end: every file is synced. kdcache's time also has the digests that a
commit needs. Read is what was just written, from the page cache: `window`, all rows of some
thousand in one range of one layer, as a trainer reads ahead; `single`, one random sample of one
layer. Every reader is opened afresh before a turn, outside the clock, so kdcache's checks each
chunk it comes to. Variants take turns in one process (A B C A B C ...); medians with the smallest
and largest; ratios are over kdcache's time of the same turn. Before the clock runs, every variant
must give the array back, and every reader must read what every writer wrote.
"""

# R rows, L layers, W width

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from setting import log, report
from zarr.codecs import Crc32cCodec

from kdcache.formats.data_files import write_group
from kdcache.formats.integrity import mapped
from kdcache.formats.mapped_array import MappedArray
from kdcache.formats.zarr_layout import CHUNK_ROWS, shard_path

#: Read(start, stop, layer) gives [stop - start, W].
Read = Callable[[int, int, int], np.ndarray]

PIPELINES = {
    "zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


PACKAGES = ("zarrs", "tensorstore")


@dataclass(frozen=True)
class Variant:
    """One way of writing and reading."""

    write: Callable[[Path, np.ndarray], None] | None
    open: Callable[[Path, np.ndarray], Read]


def variants() -> dict[str, Variant]:
    """Those whose packages are there."""
    found = {
        "kdcache": Variant(write_kdcache, open_kdcache),
        "zarr-python": Variant(write_zarr("zarr-python"), open_zarr("zarr-python")),
    }
    missing = [name for name in PACKAGES if not installed(name)]
    if missing:
        log(f"{' and '.join(missing)} not installed, left out; pip install '.[bench]'")
    if "zarrs" not in missing:
        found["zarrs"] = Variant(write_zarr("zarrs"), open_zarr("zarrs"))
    if "tensorstore" not in missing:
        found["tensorstore"] = Variant(write_tensorstore, open_tensorstore(0))
        found["tensorstore, cache"] = Variant(None, open_tensorstore(256 << 20))
    return found


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def write_kdcache(folder: Path, array: np.ndarray) -> None:
    write_group(folder, {"values": array})  # syncs its files


def open_kdcache(folder: Path, array: np.ndarray) -> Read:
    file = folder / shard_path("values", 3)
    with file.open("rb") as stream:
        return MappedArray(mapped(stream), str(file), array.shape, array.dtype).read


def write_zarr(pipeline: str) -> Callable[[Path, np.ndarray], None]:
    def write(folder: Path, array: np.ndarray) -> None:
        with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
            zarr.create_group(str(folder)).create_array(
                "values",
                shape=array.shape,
                dtype=array.dtype,
                chunks=inner(array),
                shards=outer(array),
                compressors=[Crc32cCodec()],
                filters=None,
                fill_value=0,
                config={"write_empty_chunks": True},
            )[:] = array
        sync_files(folder)

    return write


def open_zarr(pipeline: str) -> Callable[[Path, np.ndarray], Read]:
    def opener(folder: Path, array: np.ndarray) -> Read:
        with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
            values: Any = zarr.open_group(str(folder), mode="r")["values"]
        return lambda start, stop, layer: values[start:stop, layer]

    return opener


def write_tensorstore(folder: Path, array: np.ndarray) -> None:
    import tensorstore as ts

    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": inner(array), "codecs": codecs, "index_codecs": codecs}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(folder / "values")},
        "metadata": {
            "shape": array.shape,
            "data_type": "float16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer(array)}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        "store_data_equal_to_fill_value": True,
        "create": True,
    }
    ts.open(spec).result().write(array).result()
    sync_files(folder)
    # TensorStore has no groups; zarr-python is to read this too.
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')


def open_tensorstore(cache_bytes: int) -> Callable[[Path, np.ndarray], Read]:
    def opener(folder: Path, array: np.ndarray) -> Read:
        import tensorstore as ts

        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder / "values")},
            "context": {"cache_pool": {"total_bytes_limit": cache_bytes}},
            "recheck_cached_data": False,
        }
        values = ts.open(spec, open=True, read=True).result()
        return lambda start, stop, layer: values[start:stop, layer].read().result()

    return opener


def inner(array: np.ndarray) -> tuple[int, ...]:
    """Shape of a chunk."""
    return (CHUNK_ROWS, 1, array.shape[2])


def outer(array: np.ndarray) -> tuple[int, ...]:
    """Shape of the shard, which holds the whole array."""
    return (-(-len(array) // CHUNK_ROWS) * CHUNK_ROWS, *array.shape[1:])


def sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def check(ways: dict[str, Variant], root: Path, array: np.ndarray) -> None:
    """Every reader must read what every writer writes."""
    for writer, way in ways.items():
        if way.write is None:
            continue
        way.write(root / "check", array)
        for reader, other in ways.items():
            read = other.open(root / "check", array)
            for layer in range(array.shape[1]):
                if not np.array_equal(read(0, len(array), layer), array[:, layer]):
                    raise SystemExit(f"{reader} reads other values than {writer} wrote")
        shutil.rmtree(root / "check")


def clocked(act: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor seconds (of all threads)."""
    began = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def turns(
    names: list[str], number: int, prepare: Callable[[str], Callable[[], None]], what: str
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every variant in every turn; a first turn does not count."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(number + 1):
        for name in names:
            seconds = clocked(prepare(name))
            if turn:
                taken[name].append(seconds)
        log(f"{what}: turn {turn} of {number}")
    return taken


def summary(taken: dict[str, list[tuple[float, float]]], units: int) -> dict[str, Any]:
    """Milliseconds a unit, and ratios over kdcache, medians and spread."""
    result = {}
    for name, seconds in taken.items():
        milliseconds = [1000 * wall / units for wall, _ in seconds]
        pairs = list(zip(seconds, taken["kdcache"], strict=True))
        wall, cpu = ([a[i] / b[i] for a, b in pairs] for i in (0, 1))
        result[name] = {
            "milliseconds": spread(milliseconds),
            "over_kdcache": spread(wall),
            "processor_over_kdcache": spread(cpu),
        }
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def measure_write(
    ways: dict[str, Variant], root: Path, array: np.ndarray, number: int
) -> dict[str, Any]:
    """Seconds of one whole part."""
    writers = {name: way.write for name, way in ways.items() if way.write is not None}

    def prepare(name: str) -> Callable[[], None]:
        shutil.rmtree(root / "written", ignore_errors=True)
        return lambda: writers[name](root / "written", array)

    return summary(turns(list(writers), number, prepare, "write"), 1)


def measure_read(
    ways: dict[str, Variant],
    folder: Path,
    array: np.ndarray,
    spans: list[tuple[int, int]],
    number: int,
    what: str,
) -> dict[str, Any]:
    """Time of reading some spans of one layer, another layer each turn."""
    turn = dict.fromkeys(ways, 0)

    def prepare(name: str) -> Callable[[], None]:
        read, layer = ways[name].open(folder, array), turn[name] % array.shape[1]
        turn[name] += 1

        def act() -> None:
            for start, stop in spans:
                read(start, stop, layer)

        return act

    return summary(turns(list(ways), number, prepare, what), len(spans))


def run(rows: int, layers: int, width: int, window: int, singles: int, number: int) -> dict:
    """All measurements."""
    draw = np.random.default_rng(0)
    array = np.empty((rows, layers, width), dtype=np.float16)
    for layer in range(layers):
        array[:, layer] = draw.normal(size=(rows, width))
    lengths = draw.integers(5, 56, size=rows)
    ends = np.cumsum(lengths)
    ends = ends[ends <= rows]
    samples = [(int(end - n), int(end)) for end, n in zip(ends, lengths, strict=False)]
    chosen = [samples[i] for i in draw.integers(0, len(samples), singles)]
    windows = [(start, min(rows, start + window)) for start in range(0, rows, window)]
    ways = variants()
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as directory:
        root = Path(directory)
        check(ways, root, array[: CHUNK_ROWS * 5 // 2])
        written = measure_write(ways, root, array, number)
        write_kdcache(root / "read", array)
        return {
            "libraries": {name: version(name) for name in ("zarr", *PACKAGES) if installed(name)},
            "write": {"bytes": array.nbytes, "variants": written},
            "window": {
                "rows": window,
                "bytes": window * width * 2,
                "variants": measure_read(ways, root / "read", array, windows, number, "window"),
            },
            "single": {
                "mean_rows": float(np.mean([b - a for a, b in chosen])),
                "variants": measure_read(ways, root / "read", array, chosen, number, "single"),
            },
        }


def table(result: dict[str, Any]) -> str:
    """The result for people: milliseconds, and over kdcache's in wall and processor time."""
    parts = {"write": "a part", "window": "a window", "single": "a sample"}
    lines = [" " * 20 + "".join(f"{f'{name}, {unit}':>33}" for name, unit in parts.items())]
    lines.append(" " * 20 + f"{'ms':>13}{'x wall':>10}{'x cpu':>10}" * 3)
    for name in result["window"]["variants"]:
        line = f"{name:<20}"
        for part in parts:
            cell = result[part]["variants"].get(name)
            if cell is None:
                line += f"{'-':>13}{'-':>10}{'-':>10}"
                continue
            medians = [cell[key]["median"] for key in cell]
            line += f"{medians[0]:>13.4g}{medians[1]:>10.2f}{medians[2]:>10.2f}"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, fewer turns")
    parser.add_argument("--rows", type=int, help="R (default 32768, quick 8192)")
    parser.add_argument("--layers", type=int, default=6, help="L")
    parser.add_argument("--width", type=int, default=512, help="W")
    parser.add_argument("--window", type=int, default=8192, help="rows of a window")
    parser.add_argument("--singles", type=int, default=200, help="samples of a turn")
    parser.add_argument("--turns", type=int, help="turns (default 11, quick 5)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    rows = args.rows or (8192 if args.quick else 32768)
    number = args.turns or (5 if args.quick else 11)
    size = (rows, args.layers, args.width)
    result = {
        "benchmark": "bench_hidden",
        "generated_data": True,
        "quick": args.quick,
        "shape": size,
        "turns": number,
        **run(*size, args.window, args.singles, number),
    }
    print(table(result))
    report(result, "bench_hidden", save=args.save)


if __name__ == "__main__":
    main()
