"""The central claim: does a student of sparse cached labels learn what online distillation teaches?

    KDCACHE_DATA=DIR python benchmarks/bench_fidelity.py [--quick] [--save]

One student, one order of batches, pure forward KL at T = 1. What changes is where the labels come
from: the teacher itself in the loop, or a signal of one cache (`full`, `threshold` 1/8 and 1/16,
`sampled(50)`, `topk(12)` renormalised as its users do). Development loss and BLEU after the first
and after the last epoch over the same pairs: noise that is drawn once and read every epoch would
show as a gap that grows. Every run is a process of its own on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setting import Setting, find_setting, log, report

SIGNALS: dict[str, dict[str, Any]] = {
    "full": {"name": "full", "values": "float16"},
    "threshold_8": {"name": "threshold", "c": "1/8"},
    "threshold_16": {"name": "threshold", "c": "1/16"},
    "sampled_50": {"name": "sampled", "n": 50},
    "topk_12": {"name": "topk", "k": 12, "values": "float16"},
}
METHODS = ["online", *SIGNALS]
STUDENT = {
    "model_type": "marian",
    "d_model": 128,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256,
    "dropout": 0.1,
    "activation_function": "relu",
    "scale_embedding": True,
    "max_position_embeddings": 256,
}


def dump_cache(setting: Setting, out: Path, pairs: int) -> None:
    """One cache with every signal, so that all runs share samples and order."""
    from kdcache.dump.runner import dump
    from kdcache.recipe import parse_recipe

    src, tgt = setting.train
    recipe = parse_recipe(
        {
            "name": "bench-fidelity",
            "corpus": {"fields": {"src": str(src), "tgt": str(tgt)}, "limit": pairs},
            "dump": {
                "teacher": {"path": str(setting.teacher)},
                "signals": {name: {"codec": codec} for name, codec in SIGNALS.items()},
            },
        }
    )
    dump(recipe, out)


def train_one(args: argparse.Namespace, method: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Train one student and score it after chosen epochs."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from kdcache.dump.batches import Batch as Read
    from kdcache.dump.teachers.loading import load_teacher
    from kdcache.formats.cache import open_cache
    from kdcache.labels.coded_labels import CodedLabels
    from kdcache.labels.decoding import decode
    from kdcache.models.loading import load_tokenizer
    from kdcache.recipe import StudentSection, TeacherSection
    from kdcache.train.batches.batch import Batch
    from kdcache.train.batches.stream import BatchStream
    from kdcache.train.evaluation.translate import translate
    from kdcache.train.losses.fused_loss import LossTerm, fused_loss
    from kdcache.train.runs.validate import score
    from kdcache.train.students.student import build_student, student_logits

    torch.set_num_threads(1)
    cache = open_cache(args.work / "cache")
    teacher = load_teacher(TeacherSection(path=str(setting.teacher), device="cpu"))
    record = cache.manifest.tokenizers["teacher"]
    vocab_size = teacher.vocab_size
    student = build_student(StudentSection(config=STUDENT), record, vocab_size, seed)
    tokenizer = load_tokenizer(cache.tokenizer_dir("teacher"))
    optimizer = torch.optim.Adam(student.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-9)
    signals = [] if method == "online" else [method]
    stream = BatchStream(
        cache, ["src", "tgt"], signals, args.batch_tokens, seed, 4, max_epochs=args.epochs
    )
    tail = "renormalise" if method == "topk_12" else "auto"
    dev = [path.read_text(encoding="utf-8").split("\n")[: args.dev] for path in setting.dev]

    def loss_of(logits: Tensor, batch: Batch) -> Tensor:
        if method not in ("online", "full"):
            labels = batch.signals[method]
            assert isinstance(labels, CodedLabels)
            target = decode(labels, 1.0, tail)
            return fused_loss(logits, [LossTerm(target)], inplace=True)[0]
        # Dense on both sides: nothing is gained by listing all V ids of a position.
        if method == "full":
            full = batch.signals["full"]
            assert isinstance(full, CodedLabels)
            assert full.exact_code is not None
            teachers = full.exact_code.float().view(logits.shape)  # [N, V]
        else:
            src, tgt = batch.streams["src"], batch.streams["tgt"]
            teachers = teacher.logits(Read(tgt.ids, tgt.mask, None, src.ids, src.mask), tgt.mask)
        expected = torch.log_softmax(teachers, dim=-1)
        log_probs = torch.log_softmax(logits, dim=-1)
        return F.kl_div(log_probs, expected, reduction="batchmean", log_target=True)

    def scored(epoch: int) -> dict[str, float]:
        device = torch.device("cpu")
        found: dict[str, float] = {"dev_loss": score(student, tokenizer, *dev, device).loss_nats}
        if epoch in (1, args.epochs):
            import sacrebleu

            hypotheses = translate(student, tokenizer, dev[0], num_beams=1)
            found["bleu"] = sacrebleu.corpus_bleu(hypotheses, [dev[1]]).score
        return found

    torch.manual_seed(seed)
    curve: dict[int, dict[str, float]] = {}
    step = epoch = 0
    for batch in _with_end(stream):
        if batch is None or batch.epoch != epoch:
            epoch += 1
            if epoch in args.score_epochs:
                curve[epoch] = scored(epoch)
        if batch is None:
            break
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / args.warmup_steps)
        (micro,) = batch.micro
        src, tgt = micro.streams["src"], micro.streams["tgt"]
        logits = student_logits(student, src.ids, src.mask, tgt.ids, tgt.mask)
        loss_of(logits, micro).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"method": method, "seed": seed, "steps": step, "curve": curve}


def _with_end(stream: Any) -> Iterator[Any]:
    """The batches, then None."""
    yield from stream
    yield None


def summary(runs: list[dict[str, Any]], epochs: list[int]) -> dict[str, Any]:
    """Per method and epoch: median over seeds with the spread, and the gap to online by seed."""
    out: dict[str, Any] = {}
    of = {(run["method"], run["seed"]): run["curve"] for run in runs}
    seeds = sorted({seed for _, seed in of})
    for method in METHODS:
        rows = {}
        for epoch in epochs:
            row: dict[str, Any] = {}
            for figure in ("dev_loss", "bleu"):
                found = [of[method, seed][str(epoch)].get(figure) for seed in seeds]
                if None in found:
                    continue
                online = [of["online", seed][str(epoch)][figure] for seed in seeds]
                gaps = [a - b for a, b in zip(found, online, strict=True)]
                row[figure] = {
                    "median": statistics.median(found),
                    "min": min(found),
                    "max": max(found),
                    "median_gap_to_online": statistics.median(gaps),
                    "gaps_to_online": gaps,
                }
            rows[epoch] = row
        out[method] = rows
    return out


def draw(result: dict[str, Any], path: Path) -> None:
    """Gap of the development loss to online distillation over epochs, a line per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method in METHODS[1:]:
        rows = result["methods"][method]
        epochs = [int(epoch) for epoch in rows]
        gaps = [rows[epoch]["dev_loss"]["gaps_to_online"] for epoch in rows]
        (line,) = axes.plot(epochs, [statistics.median(g) for g in gaps], "o-", label=method)
        low, high = [min(g) for g in gaps], [max(g) for g in gaps]
        axes.fill_between(epochs, low, high, alpha=0.15, color=line.get_color())
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(epochs, [str(epoch) for epoch in epochs])
    axes.set_xlabel("epochs over the same pairs")
    axes.set_ylabel("dev loss minus online's (nats per token)")
    axes.set_title(f"Cached labels against the teacher in the loop, {result['pairs']:,} pairs")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all methods and seeds and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench_fidelity"), help="cache and runs")
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--dev", type=int, default=300, help="development pairs scored")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--quick", action="store_true", help="a small run that shows the way")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.dev, args.epochs, args.seeds, args.warmup_steps = 400, 100, 2, 1, 5
    args.work.mkdir(parents=True, exist_ok=True)
    args.score_epochs = sorted({1, 2, 5, 10, args.epochs} & set(range(args.epochs + 1)))
    setting = find_setting(args.work / "data")
    if args.run:
        print(json.dumps(train_one(args, args.run[0], int(args.run[1]), setting)))
        return

    dump_cache(setting, args.work / "cache", args.pairs)

    def one(cell: tuple[str, int]) -> dict[str, Any]:
        method, seed = cell
        kept = args.work / f"{method}-{seed}.json"
        if not kept.is_file():
            command = [sys.executable, *sys.argv, "--run", method, str(seed)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            kept.write_bytes(done.stdout.splitlines()[-1])
        run: dict[str, Any] = json.loads(kept.read_text())
        log(f"{method} seed {seed}: {run['curve']}")
        return run

    cells = [(method, seed) for seed in range(1, args.seeds + 1) for method in METHODS]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(one, cells))
    result = {
        "benchmark": "bench_fidelity",
        "generated_data": setting.generated,
        "quick": args.quick,
        "pairs": args.pairs,
        "steps": runs[0]["steps"],
        "seeds": args.seeds,
        "student": STUDENT,
        "methods": summary(runs, args.score_epochs),
    }
    report(result, "bench_fidelity", save=args.save, draw=draw)


if __name__ == "__main__":
    main()
