"""What compressing a cache for transfer saves, signal by signal, and what it costs.

A teacher dumps text with several signals; the cache is compressed at several levels of Zstandard
and expanded again, and the bytes compared. Per level and signal: bytes over compressed bytes
(`ratio`). `compress_over_verify` and `expand_over_verify`: their time over that of `verify`,
which reads all bytes once and checks them; medians of three turns, same run.

With KDCACHE_DATA the teacher is models/tatoeba-deen on data/tatoeba_deen/dev.{de,en}; without
it both are generated.
"""

from __future__ import annotations

import argparse
import filecmp
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setting import Setting, find_setting, log, report

from kdcache.dump.runner import dump
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.record import read_record
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.transfer import compress_cache, expand_cache
from kdcache.formats.stores.transfer_store import CompressedFiles
from kdcache.recipe import Recipe, parse_recipe

LEVELS = (1, 3, 9, 19)
#: The level that is timed, kdcache's own.
TIMED = 3
TURNS = 3

CODECS: dict[str, dict[str, Any]] = {
    "threshold_16": {"name": "threshold", "c": 1 / 16},
    "threshold_32": {"name": "threshold", "c": 1 / 32},
    "sampled_50": {"name": "sampled", "n": 50},
    "topk_32": {"name": "topk", "k": 32},
    "full": {"name": "full"},
}


def make_recipe(setting: Setting, pairs: int) -> Recipe:
    """Soft labels of several codecs, hypotheses and hidden states of the development set."""
    signals: dict[str, Any] = {name: {"codec": codec} for name, codec in CODECS.items()}
    signals["beams"] = {"kind": "beams"}
    for values in ("float16", "int8"):
        hidden = {"kind": "hidden", "stream": "src", "layers": "all", "values": values}
        signals[f"hidden_{values}"] = hidden
    src, tgt = (str(path) for path in setting.dev)
    return parse_recipe(
        {
            "name": "bench-transfer",
            "corpus": {"fields": {"src": src, "tgt": tgt}, "limit": pairs},
            "dump": {
                "teacher": {"path": str(setting.teacher), "device": "cpu"},
                "signals": signals,
            },
        }
    )


def sizes(packed: Path) -> dict[str, tuple[int, int]]:
    """Signal (or "samples", "tokenizers") to its bytes and compressed bytes."""
    found: dict[str, tuple[int, int]] = {}
    for path in sorted((packed / "commits").glob("*.zst.json")):
        record = read_record(CompressedFiles, LocalStore(packed), f"commits/{path.name}")
        for file in record.files:
            whole, small = found.get(signal := file.path.split("/")[0], (0, 0))
            found[signal] = whole + file.expands_to, small + file.bytes
    return found


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def differing(cache: Path, other: Path) -> list[str]:
    """Files that two caches do not share byte for byte."""
    paths = [
        {f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()}
        for root in (cache, other)
    ]
    shown = [{path for path in found if not path.startswith(".")} for found in paths]
    _, *differ = filecmp.cmpfiles(cache, other, shown[0] & shown[1], shallow=False)
    return sorted(shown[0] ^ shown[1]) + sorted(path for some in differ for path in some)


def measure(cache: Path, work: Path) -> dict[str, Any]:
    """Every level, and the times of one."""
    levels = {}
    for level in LEVELS:
        packed = work / f"level-{level}"
        told = compress_cache(cache, packed, level)
        levels[f"{level}"] = {
            "ratio": told["ratio"],
            "signals": {name: whole / small for name, (whole, small) in sizes(packed).items()},
        }
        log(f"level {level}: {told['ratio']:.3f}")
    expand_cache(work / f"level-{TIMED}", work / "again")
    unequal = differing(cache, work / "again")
    verify, compress, expand = [], [], []
    for turn in range(TURNS):
        packed, again = work / f"packed-{turn}", work / f"again-{turn}"
        verify.append(seconds(lambda: verify_cache(cache)))
        compress.append(seconds(lambda out=packed: compress_cache(cache, out, TIMED)))
        expand.append(seconds(lambda source=packed, out=again: expand_cache(source, out)))
    return {
        "ratio": levels[f"{TIMED}"]["ratio"],
        "unequal": len(unequal),
        "bytes": {name: whole for name, (whole, _) in sizes(work / f"level-{TIMED}").items()},
        "levels": levels,
        "timed_level": TIMED,
        "compress_over_verify": statistics.median(compress) / statistics.median(verify),
        "expand_over_verify": statistics.median(expand) / statistics.median(verify),
        "spread": {
            name: max(times) / min(times)
            for name, times in (("verify", verify), ("compress", compress), ("expand", expand))
        },
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':<16}{'MB':>8}" + "".join(f"{f'level {level}':>10}" for level in LEVELS)]
    for name, size in result["bytes"].items():
        ratios = [result["levels"][f"{level}"]["signals"][name] for level in LEVELS]
        lines.append(f"{name:<16}{size / 1e6:>8.2f}" + "".join(f"{r:>10.2f}" for r in ratios))
    ratios = [result["levels"][f"{level}"]["ratio"] for level in LEVELS]
    total = sum(result["bytes"].values()) / 1e6
    lines.append(f"{'all':<16}{total:>8.2f}" + "".join(f"{r:>10.2f}" for r in ratios))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="200 pairs instead of 1,000")
    parser.add_argument("--pairs", type=int, help="how many pairs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    pairs = arguments.pairs or (200 if arguments.quick else 1000)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        work = Path(folder)
        setting = find_setting(work / "data")
        dump(make_recipe(setting, pairs), work / "cache")
        result = {
            "benchmark": "bench_transfer",
            "generated_data": setting.generated,
            "pairs": pairs,
            **measure(work / "cache", work),
        }
    print(table(result))
    report(result, "bench_transfer", save=arguments.save)


if __name__ == "__main__":
    main()
