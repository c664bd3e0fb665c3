"""What sharing out the tokenising of a corpus brings: samples of a dump with several processes.

    python benchmarks/bench_tokenise.py [--quick] [--save] [--rows N] [--processes N]

The text of the setting is repeated until there are so many rows; each dump reads, tokenises, hashes
and writes all of them, in turns of one process and of several (the first process reads, hashes and
writes while the others tokenise). `several_over_one` is the tokens per second of several over those
of one. The bytes of both are compared.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import statistics
import tempfile
from pathlib import Path

from setting import find_setting, log, report

from kdcache.dump.encode import FEW_ROWS
from kdcache.dump.runner import dump
from kdcache.formats.cache import open_cache
from kdcache.processes import num_cores
from kdcache.recipe import Recipe, parse_recipe


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--rows", type=int, default=FEW_ROWS + 40_000, help="of the corpus")
    parser.add_argument("--processes", type=int, default=num_cores(), help="default: the cores")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    turns = 1 if arguments.quick else 3
    counts = (1, arguments.processes)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as folder:
        recipe, generated = make_recipe(Path(folder), arguments.rows)
        speeds: dict[int, list[float]] = {count: [] for count in counts}
        for turn in range(turns):
            for count in counts:
                out = Path(folder) / f"cache{count}"
                shutil.rmtree(out, ignore_errors=True)
                found = dump(recipe, out, processes=count)
                tokens = sum(found["tokens"].values())
                speeds[count].append(tokens / found["seconds"]["tokenise"])
                log(f"turn {turn}, {count} processes: {speeds[count][-1]:,.0f} tokens/s")
        one, several = (open_cache(Path(folder) / f"cache{count}") for count in counts)
        equal = one.manifest == several.manifest and all(
            one.commit_record("samples", shard) == several.commit_record("samples", shard)
            for shard in range(one.num_shards)
        )
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    report(
        {
            "benchmark": "bench_tokenise",
            "generated_data": generated,
            "rows": arguments.rows,
            "tokens": tokens,
            "processes": arguments.processes,
            "several_over_one": statistics.median(ratios),
            "turns": ratios,
            "tokens_per_second": {str(n): statistics.median(one) for n, one in speeds.items()},
            "equal_bytes": equal,
        },
        "bench_tokenise",
        save=arguments.save,
    )


def make_recipe(folder: Path, rows: int) -> tuple[Recipe, bool]:
    """A corpus of so many rows under the teacher's tokenizer; whether its text was generated."""
    setting = find_setting(folder / "setting")
    fields = {}
    for name, path in zip(("src", "tgt"), setting.train, strict=True):
        read = gzip.open if path.suffix == ".gz" else open
        with read(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
        fields[name] = str(folder / name)
        with (folder / name).open("w", encoding="utf-8") as file:
            file.writelines(lines[n % len(lines)] for n in range(rows))
    tokenizers = {"teacher": {"kind": "pretrained", "path": str(setting.teacher)}}
    tree = {"name": "bench-tokenise", "corpus": {"fields": fields}}
    return parse_recipe({**tree, "dump": {"tokenizers": tokenizers}}), setting.generated


if __name__ == "__main__":
    main()
