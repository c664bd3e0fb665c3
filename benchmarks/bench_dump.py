"""Wall time of a dump over the bare teacher forward on the same batches.

A is the teacher alone: the planned batches lie in memory as tensors and only the forward is
timed, output projection included, at valid positions, as the dump itself runs it. B is a whole
dump into an empty directory: reading, tokenising, batching, forward, selection, coding,
writing, committing; loading the model is left out of both. A and B alternate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from setting import Setting, find_setting, log, report

from kdcache.dump.batches import Batch, pad, plan_batches
from kdcache.dump.runner import dump
from kdcache.dump.teacher import Teacher
from kdcache.dump.teachers.loading import load_teacher
from kdcache.formats.cache import open_cache
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids, max_bytes_per_token
from kdcache.recipe import Recipe, parse_recipe


def make_recipe(setting: Setting, pairs: int, codec: str, device: str, batch_tokens: int) -> Recipe:
    """What is dumped."""
    src, tgt = setting.train
    return parse_recipe(
        {
            "name": "bench-dump",
            "corpus": {"fields": {"src": str(src), "tgt": str(tgt)}, "limit": pairs},
            "dump": {
                "teacher": {"path": str(setting.teacher), "device": device},
                "batch_tokens": batch_tokens,
                "signals": {"logits": {"codec": json.loads(codec)}},
            },
        }
    )


def planned_batches(recipe: Recipe, path: Path, teacher: Teacher) -> list[Batch]:
    """The batches of a dump, as tensors on the teacher's device."""
    cache, section = open_cache(path), recipe.dump.signals["logits"]
    most = max_bytes_per_token(section.codec, teacher.vocab_size, section.temperatures)
    batches = []
    for number in range(cache.num_shards):
        streams = cache.samples(number).streams
        src, tgt = (
            Ragged(s.offsets, {"id": join_ids(s.fields)}) for s in (streams["src"], streams["tgt"])
        )
        for start, stop in plan_parts(tgt.lengths, most):
            lengths = src.lengths[start:stop], tgt.lengths[start:stop]
            for rows in plan_batches(*lengths, recipe.dump.batch_tokens):
                read, labels = (pad(s, rows + start, teacher.pad_id) for s in (src, tgt))
                batches.append(Batch.from_numpy(*labels, None, *read, device=teacher.device))
    return batches


def forward_seconds(teacher: Teacher, batches: list[Batch]) -> float:
    """Seconds of the bare forward over all batches."""
    began = time.perf_counter()
    for batch in batches:
        teacher.logits(batch, batch.mask)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run(recipe: Recipe, root: Path, rounds: int) -> dict[str, object]:
    """Alternate A and B."""
    first = dump(recipe, root / "warm-up")  # also gives the plan
    assert recipe.dump.teacher is not None
    teacher = load_teacher(recipe.dump.teacher)
    batches = planned_batches(recipe, root / "warm-up", teacher)
    forward_seconds(teacher, batches[: max(1, len(batches) // 4)])
    forwards, walls, stages = [], [], []
    for number in range(rounds):
        forwards.append(forward_seconds(teacher, batches))
        seconds = dump(recipe, root / f"round-{number}")["seconds"]
        walls.append(seconds["total"] - seconds["load"])
        stages.append(seconds)
        log(
            f"round {number}: forward {forwards[-1]:.2f} s, dump {walls[-1]:.2f} s (tokenise "
            f"{seconds['tokenise']:.2f}, teacher {seconds['teacher']:.2f})"
        )
    ratios = [wall / forward for wall, forward in zip(walls, forwards, strict=True)]
    signal = [s["teacher"] / forward for s, forward in zip(stages, forwards, strict=True)]
    masks = [(batch.source_mask, batch.mask) for batch in batches]
    sizes = np.array([[s.numel() + t.numel(), int(s.sum() + t.sum())] for s, t in masks])
    return {
        "wall_over_forward": statistics.median(ratios),
        "wall_over_forward_rounds": ratios,
        "signal_stage_over_forward": statistics.median(signal),
        "samples": first["samples"],
        "tokens": first["tokens"],
        "batches": len(batches),
        "padding": float(1 - sizes[:, 1].sum() / sizes[:, 0].sum()),
        "bytes_per_token": first["signals"]["logits"]["bytes_per_token"],
    }


def main() -> None:
    """Print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes on 2 cores")
    parser.add_argument("--pairs", type=int, help="pairs of the corpus (default 6000, quick 1000)")
    parser.add_argument("--rounds", type=int, help="times A and B alternate (default 5, quick 3)")
    parser.add_argument("--codec", default='{"name": "threshold"}', help="codec as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, help="torch threads; torch's default without it")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    pairs = args.pairs or (1000 if args.quick else 6000)
    rounds = args.rounds or (3 if args.quick else 5)
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as directory:
        root = Path(directory)
        setting = find_setting(root / "data")
        recipe = make_recipe(setting, pairs, args.codec, args.device, args.batch_tokens)
        result = {
            "benchmark": "bench_dump",
            "generated_data": setting.generated,
            "quick": args.quick,
            "codec": json.loads(args.codec),
            "device": args.device,
            "threads": torch.get_num_threads(),
            **run(recipe, root, rounds),
        }
    report(result, "bench_dump", save=args.save)


if __name__ == "__main__":
    main()
