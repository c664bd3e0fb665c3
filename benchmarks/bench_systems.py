r"""The systems of the papers, all of a kind in one table: translation, or language understanding.

    KDCACHE_DATA=DIR python benchmarks/bench_systems.py --out WORK [--table understanding]
        [--scale smoke] [--save]

Every step is a `kdcache` command that is printed before it runs. Translation:

1. Train the teacher, and the masked language models that teach the mask task, from caches that
   hold no labels.
2. `dump` once what all the translation systems need (recipe `nmt-all`), and once what those of
   the mask task need; `compile` what some of them make of it.
3. Tune the student without a cache on the development set, over learning rates and dropouts.
4. Train every row with the winner's settings; the core rows with every seed.
5. Read the test set once for every run: `evaluate`, with a paired bootstrap against the student
   without a cache of the same seed.

Understanding (MKD, LightPAFF and the students of BERT):

1. Train a BERT, a GPT-2 and a MASS from text alone, then the teachers from these: one of five
   tasks, a classifier, a language model, a translator.
2. `dump` once what all students of the five tasks need, and once for each stage of LightPAFF.
3. Train every row with the recipes' own learning rates; the core rows with every seed.
4. Read the test sets once for every run.

A run that is killed, or that ends after --minutes, goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from setting import log, report
from systems import translation
from systems.understanding import story as understanding
from systems.work import OutOfTimeError, Workshop

TABLES: Mapping[str, Any] = {"translation": translation, "understanding": understanding}


def main() -> None:
    """Run every step, and print one JSON object."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    table = TABLES[args.table]
    scale = table.SCALES[args.scale]
    scale = replace(scale, seeds=scale.seeds[: args.seeds])
    rows = _chosen(table, args.rows, args.scale)
    workshop = Workshop(args.out, scale.jobs, args.minutes)
    story = table.make_story(args.out, scale, workshop, rows)
    try:
        for commands in story.phases():
            workshop.run(commands)
    except OutOfTimeError:
        log("out of time: the same command goes on from here")
        return
    found = {"benchmark": "bench_systems", "table": args.table, "scale": args.scale}
    kind = "" if args.table == "translation" else f"_{args.table}"
    report(found | story.result(), f"bench_systems{kind}_{args.scale}", save=args.save)


def _chosen(table: Any, named: Sequence[str] | None, scale: str) -> list[Any]:
    """The rows that were asked for, and those that they are compared with."""
    rows = table.ROWS
    named = named or (list(rows) if scale == "smoke" else table.CORE)
    unknown = [name for name in named if name not in rows]
    if unknown:
        raise SystemExit(f"--rows {unknown[0]!r}: there is no such row; there are {list(rows)}")
    wanted = {name for row in named for name in (row, rows[row].base) if name}
    return [row for name, row in rows.items() if name in wanted]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for texts, caches and runs")
    parser.add_argument("--table", choices=TABLES, default="translation")
    parser.add_argument("--scale", choices=translation.SCALES, default="smoke")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="these alone (smoke: all; else the core rows)"
    )
    parser.add_argument("--seeds", type=int, help="the first so many seeds of the core rows")
    parser.add_argument("--minutes", type=float, help="begin no command after so many")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
