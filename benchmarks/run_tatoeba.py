"""The real run: a trained De-En teacher, its cache over Tatoeba pairs, two students, one paired test.

    KDCACHE_DATA=DIR python benchmarks/run_tatoeba.py --out RUNS [--save]

Steps, every one a `kdcache` command that is printed before it runs:

1. `dump` the teacher over the first --pairs training pairs (design default: threshold 1/16).
2. Tune the student without a cache (recipe `no-kd`) on the development set, over every
   combination of --lrs and --dropouts, at the full number of steps; the best development loss wins.
3. Train the student with the cache (recipe `word-level`) once, with the winner's settings
   and nothing else changed.
4. Read the test set once: `evaluate` both, with a paired bootstrap between them.

A killed run goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setting import Setting, find_setting, log, report

# A third of the teacher's 10.1 M parameters: 2+2 layers, d 192.
STUDENT = {
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
}


def kdcache(*arguments: str) -> None:
    """Run one kdcache command on one thread, and show it first."""
    log("kdcache " + " ".join(arguments))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "kdcache", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment,
    )


def train_arguments(setting: Setting, args: argparse.Namespace, lr: float, dropout: float) -> list:
    """What both students share."""
    pairs = {
        "train.validation.corpus.fields.src": setting.dev[0],
        "train.validation.corpus.fields.tgt": setting.dev[1],
        "train.validation.every_steps": args.every_steps,
        "train.checkpoints.every_steps": args.every_steps,
        "train.max_epochs": args.epochs,
        "train.max_steps": 1_000_000,
        "train.batch_tokens": args.batch_tokens,
        "train.schedule.warmup_steps": args.warmup_steps,
        "train.optimizer.lr": lr,
        "train.student.config.dropout": dropout,
        **{f"train.student.config.{key}": value for key, value in STUDENT.items()},
    }
    return [text for key, value in pairs.items() for text in (f"--{key}", str(value))]


def best_dev_loss(run: Path) -> float:
    """Lowest development loss of a run, in nats per token."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return min(row["dev_loss"] for row in map(json.loads, lines) if "dev_loss" in row)


def main() -> None:
    """Run every step and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for cache and runs")
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--warmup-steps", type=int, default=400)
    parser.add_argument("--every-steps", type=int, default=200)
    parser.add_argument("--lrs", type=float, nargs="+", default=[7e-4, 1.4e-3])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--quick", action="store_true", help="a small run that shows the way")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.epochs, args.warmup_steps, args.every_steps = 600, 1, 20, 20
        args.lrs, args.dropouts = [1.4e-3], [0.1]
    args.out.mkdir(parents=True, exist_ok=True)
    setting = find_setting(args.out / "data")
    cache = args.out / "cache"
    kdcache(
        "dump", "word-level", "--out", str(cache),
        "--corpus.fields.src", str(setting.train[0]),
        "--corpus.fields.tgt", str(setting.train[1]),
        "--corpus.limit", str(args.pairs),
        "--dump.teacher.path", str(setting.teacher),
    )  # fmt: skip

    grid = list(itertools.product(args.lrs, args.dropouts))
    runs = {cell: args.out / f"no-kd-lr{cell[0]:g}-dropout{cell[1]:g}" for cell in grid}

    def train(recipe: str, run: Path, cell: tuple[float, float]) -> None:
        shared = train_arguments(setting, args, *cell)
        kdcache("train", recipe, "--cache", str(cache), "--out", str(run), *shared)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda cell: train("no-kd", runs[cell], cell), grid))
    tuned = {cell: best_dev_loss(run) for cell, run in runs.items()}
    winner = min(tuned, key=lambda cell: tuned[cell])
    log(f"no-kd tuned on dev: {tuned}; the best is lr, dropout = {winner}")
    student = args.out / "word-level"
    train("word-level", student, winner)

    test = ["--evaluate.corpus.fields.src", str(setting.test[0])]
    test += ["--evaluate.corpus.fields.tgt", str(setting.test[1])]
    kdcache("evaluate", str(setting.teacher), "--out", str(args.out / "teacher"), *test)
    kdcache("evaluate", str(runs[winner]), *test)
    kdcache("evaluate", str(student), "--against", str(runs[winner]), *test)
    scores = {
        name: json.loads((run / "evaluation.json").read_text())
        for name, run in [
            ("teacher", args.out / "teacher"),
            ("no_kd", runs[winner]),
            ("word_level", student),
        ]
    }
    result = {
        "benchmark": "run_tatoeba",
        "generated_data": setting.generated,
        "quick": args.quick,
        "pairs": args.pairs,
        "epochs": args.epochs,
        "student": STUDENT,
        "tuned_dev_loss": {f"lr {c[0]:g}, dropout {c[1]:g}": v for c, v in tuned.items()},
        "word_level_dev_loss": best_dev_loss(student),
        "scores": scores,
    }
    report(result, "run_tatoeba", save=args.save)


if __name__ == "__main__":
    main()
