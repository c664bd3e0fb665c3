r"""The real run: a De-En teacher, its cache over Tatoeba pairs, two students, a paired test.

    KDCACHE_DATA=DIR python benchmarks/run_tatoeba.py --out RUNS [--save]

Steps, every one a `kdcache` command that is printed before it runs:

1. `dump` the teacher over the first --pairs training pairs (design default: threshold 1/16).
2. Tune the student without a cache (recipe `no-kd`) on the development set, over every
   combination of --lrs and --dropouts, for --tune-epochs; the best development loss wins. The
   schedule (warm-up, then inverse square root) does not depend on the length of a run.
3. Train the student without (`no-kd`) and with the cache (`word-level`) for --epochs with the
   winner's settings; the objective is all that differs.
4. Read the test set once: `evaluate` both, with a paired bootstrap between them.

A killed run goes on where it stopped when the same command is given again.

The teacher at hand is small and middling, and a student that is tuned passes it. What a cache
is worth under a teacher that is better than its students shows in a second round, one size
down, with the first round's student without a cache as the teacher:

    KDCACHE_DATA=DIR python benchmarks/run_tatoeba.py --out RUNS2 --teacher RUNS/no-kd/best \
        --d-model 96 --ffn-dim 256 --epochs 5 --every-steps 400 --lrs 1.4e-3 2.8e-3 5.6e-3 \
        --name run_tatoeba_better_teacher
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from setting import Setting, find_setting, log, report


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


def student_config(args: argparse.Namespace) -> dict[str, int]:
    """Shape of both students."""
    return {
        "d_model": args.d_model,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": args.ffn_dim,
        "decoder_ffn_dim": args.ffn_dim,
    }


def train_arguments(
    setting: Setting, args: argparse.Namespace, lr: float, dropout: float, epochs: int
) -> list[str]:
    """What both students share."""
    pairs = {
        "train.validation.corpus.fields.src": setting.dev[0],
        "train.validation.corpus.fields.tgt": setting.dev[1],
        "train.validation.every_steps": args.every_steps,
        "train.checkpoints.every_steps": args.every_steps,
        "train.validation.limit_tokens": args.dev_tokens,
        "train.max_epochs": epochs,
        "train.max_steps": 1_000_000,
        "train.batch_tokens": args.batch_tokens,
        "train.schedule.warmup_steps": args.warmup_steps,
        "train.optimizer.lr": lr,
        "train.student.config.dropout": dropout,
        **{f"train.student.config.{key}": value for key, value in student_config(args).items()},
    }
    return [text for key, value in pairs.items() for text in (f"--{key}", str(value))]


def best_dev_loss(run: Path) -> float:
    """Lowest development loss of a run, in nats per token."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return min(row["dev_loss"] for row in map(json.loads, lines) if "dev_loss" in row)


def scores_of(run: Path) -> dict[str, Any]:
    """What an evaluation says of a model, without paths and times."""
    found = json.loads((run / "evaluation.json").read_text())
    kept = ["bleu", "chrf", "loss_nats", "perplexity", "accuracy", "shuffled", "parameters"]
    scores = {key: found[key] for key in kept}
    if "against" in found:
        scores["against_no_kd"] = {key: found["against"][key] for key in ("bleu", "chrf")}
    return scores


def parser_of_run() -> argparse.ArgumentParser:
    """Arguments of the run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for cache and runs")
    parser.add_argument("--teacher", type=Path, help="another teacher than the setting's")
    parser.add_argument("--d-model", type=int, default=192, help="192: a third of the teacher")
    parser.add_argument("--ffn-dim", type=int, default=512)
    parser.add_argument("--name", default="run_tatoeba", help="of the result that --save writes")
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--tune-epochs", type=int, default=2)
    parser.add_argument("--dev-tokens", type=int, default=10_000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--warmup-steps", type=int, default=400)
    parser.add_argument("--every-steps", type=int, default=200)
    parser.add_argument("--lrs", type=float, nargs="+", default=[7e-4, 1.4e-3, 2.8e-3, 5.6e-3])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.1])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--quick", action="store_true", help="a small run that shows the way")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    return parser


def shortened(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, made small where --quick is among them."""
    if args.quick:
        args.pairs, args.epochs, args.warmup_steps, args.every_steps = 600, 1, 20, 20
        args.tune_epochs = 1
        args.lrs, args.dropouts = [1.4e-3], [0.1]
    return args


def main() -> None:
    """Run every step and print one JSON object."""
    args = shortened(parser_of_run().parse_args())
    args.out.mkdir(parents=True, exist_ok=True)
    setting = find_setting(args.out / "data")
    if args.teacher is not None:
        setting = replace(setting, teacher=args.teacher.resolve())
    cache = args.out / "cache"
    kdcache(
        "dump", "word-level", "--out", str(cache),
        "--corpus.fields.src", str(setting.train[0]),
        "--corpus.fields.tgt", str(setting.train[1]),
        "--corpus.limit", str(args.pairs),
        "--dump.teacher.path", str(setting.teacher),
    )  # fmt: skip

    def train(recipe: str, run: Path, cell: tuple[float, float], epochs: int) -> None:
        shared = train_arguments(setting, args, *cell, epochs)
        kdcache("train", recipe, "--cache", str(cache), "--out", str(run), *shared)

    grid = list(itertools.product(args.lrs, args.dropouts))
    trials = {cell: args.out / f"tune-lr{cell[0]:g}-dropout{cell[1]:g}" for cell in grid}
    no_kd, word_level = args.out / "no-kd", args.out / "word-level"
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda cell: train("no-kd", trials[cell], cell, args.tune_epochs), grid))
        tuned = {cell: best_dev_loss(run) for cell, run in trials.items()}
        winner = min(tuned, key=lambda cell: tuned[cell])
        log(f"no-kd tuned on dev: {tuned}; the best is lr, dropout = {winner}")
        students = {"no-kd": no_kd, "word-level": word_level}
        list(pool.map(lambda it: train(*it, winner, args.epochs), students.items()))

    evaluations = {
        args.out / "teacher": [str(setting.teacher), "--out", str(args.out / "teacher")],
        no_kd: [str(no_kd)],
        word_level: [str(word_level), "--against", str(no_kd)],
    }
    for run, arguments in evaluations.items():
        if not (run / "evaluation.json").is_file():  # the test set is read once
            test = ["--evaluate.corpus.fields.src", str(setting.test[0])]
            test += ["--evaluate.corpus.fields.tgt", str(setting.test[1])]
            if args.quick:
                test += ["--evaluate.corpus.limit", "50"]
            kdcache("evaluate", *arguments, *test)
    result = {
        "benchmark": "run_tatoeba",
        "generated_data": setting.generated,
        "quick": args.quick,
        "pairs": args.pairs,
        "epochs": args.epochs,
        "student": student_config(args),
        "tuned_dev_loss": {f"lr {c[0]:g}, dropout {c[1]:g}": v for c, v in tuned.items()},
        "tune_epochs": args.tune_epochs,
        "dev_loss": {"no_kd": best_dev_loss(no_kd), "word_level": best_dev_loss(word_level)},
        "scores": {run.name: scores_of(run) for run in evaluations},
    }
    report(result, args.name, save=args.save)


if __name__ == "__main__":
    main()
