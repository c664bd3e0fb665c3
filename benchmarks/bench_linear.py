"""What losses fused with the output projection cost beside projecting first.

    python benchmarks/bench_linear.py [--quick] [--save] [--threads N]

Forward and backward pass from float32 hidden states [N, 256] through the projection, gradients of
hidden states, weight and bias included, with the labels of bench_loss. The unit is `F.linear` and
`F.cross_entropy`. The mix is 0.5 cross-entropy + 0.5 forward KL: `fused_mix` projects first and
takes `fused_loss` in place, `linear_mix` is `linear_losses`. The Jensen-Shannon divergence stands
for the losses made with autograd; `compiled_jensen_shannon` has them fused by torch.compile, where
there is a C++ compiler. What compiling takes is not in its times, nor is its memory measured.

Time: variants take turns (A B C A B C ...) in one process; medians, and the smallest and largest
ratio of a turn, with an allocator that keeps its pages where the C library has one. Memory:
`ru_maxrss` of a process of its own per variant, minus its value just before the step.
"""

# N rows, D hidden, V vocabulary

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_loss import Labels, keep_pages
from setting import log, report
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.losses import (
    DivergenceTerm,
    LossTerm,
    fused_loss,
    hard_target,
    jensen_shannon,
    jensen_shannon_rows,
    linear_losses,
)

SHAPES = {8_000: 4096, 32_000: 2048, 152_000: 512}  # V -> N: logits of 125 to 297 MiB
HIDDEN = 256
UNIT = "cross_entropy"
VARIANTS = [
    UNIT,
    "linear_cross_entropy",
    "fused_mix",
    "linear_mix",
    "jensen_shannon",
    "linear_jensen_shannon",
]
COMPILED = "compiled_jensen_shannon"


class Case:
    """Labels, hidden states and a projection."""

    def __init__(self, num_rows: int, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.data = Labels(num_rows, vocab_size, "cpu")
        self.hidden = torch.randn(num_rows, HIDDEN, generator=generator)
        self.weight = torch.randn(vocab_size, HIDDEN, generator=generator) / HIDDEN**0.5
        self.bias = torch.zeros(vocab_size)
        self.inputs = [self.hidden, self.weight, self.bias]
        for tensor in self.inputs:
            tensor.requires_grad_()

    def step(self, variant: str) -> None:
        """Forward and backward pass of a variant."""
        for tensor in self.inputs:
            tensor.grad = None
        self.loss(variant).backward()

    def loss(self, variant: str) -> Tensor:
        """Scalar loss of a variant."""
        labels, teacher = self.data.labels, self.data.teacher
        hard = hard_target(labels, self.data.vocab_size)
        mix = [LossTerm(hard, 1.0, 0.5), LossTerm(teacher, 1.0, 0.5)]
        if variant == "linear_cross_entropy":
            return linear_losses(*self.inputs, [LossTerm(hard)])[0]
        if variant == "linear_mix":
            return linear_losses(*self.inputs, mix)[0]
        if variant in ("linear_jensen_shannon", COMPILED):
            rows = partial(jensen_shannon_rows, compiled=variant == COMPILED)
            one = DivergenceTerm(rows, LossTerm(teacher))
            return linear_losses(*self.inputs, [], [one])[0]
        logits = F.linear(*self.inputs)
        if variant == "fused_mix":
            return fused_loss(logits, mix, inplace=True)[0]
        if variant == "jensen_shannon":
            return jensen_shannon(logits, teacher)
        return F.cross_entropy(logits, labels)


def compiles(case: Case) -> bool:
    """Whether torch can compile here."""
    try:
        case.step(COMPILED)
    except TrainingError as error:
        log(f"{COMPILED} is left out: {error}")
        return False
    return True


def time_variants(vocab_size: int, turns: int) -> dict[str, Any]:
    """Time of each variant over plain cross-entropy of a projection."""
    case = Case(SHAPES[vocab_size], vocab_size)
    variants = [*VARIANTS, COMPILED] if compiles(case) else VARIANTS
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for turn in range(turns + 1):
        for variant in variants:
            start = time.perf_counter()
            case.step(variant)
            if turn:  # the first turn warms up
                times[variant].append(time.perf_counter() - start)
    plain = times[UNIT]
    ratios = {
        name: [ours / theirs for ours, theirs in zip(taken, plain, strict=True)]
        for name, taken in times.items()
        if name != UNIT
    }
    return {
        name: {
            "median": round(statistics.median(times[name]) / statistics.median(plain), 3),
            "turns": [round(bound(found), 3) for bound in (min, max)],
        }
        for name, found in ratios.items()
    }


def peak_bytes(variant: str, vocab_size: int) -> int:
    """Growth of this process's peak memory over one step; call it once per process."""
    Case(8, 64).step(variant)
    case = Case(SHAPES[vocab_size], vocab_size)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case.step(variant)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def measure_memory(vocab_size: int, threads: int) -> dict[str, Any]:
    """Peak bytes of each variant. A child inherits its parent's peak: measure before timing."""
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--peak", variant, str(vocab_size)]
        command += ["--threads", str(threads)]
        peaks[variant] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    return {
        "logits_bytes": SHAPES[vocab_size] * vocab_size * 4,
        "peak_bytes": peaks,
        "over_cross_entropy": {
            name: round(peak / peaks[UNIT], 3) for name, peak in peaks.items() if name != UNIT
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 7")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab", type=int, choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "V"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_bytes(args.peak[0], int(args.peak[1])))
        return
    turns = 3 if args.quick else 7
    rows: dict[str, Any] = {}
    for vocab_size in args.vocab:
        memory = measure_memory(vocab_size, args.threads)
        rows[str(vocab_size)] = {"num_rows": SHAPES[vocab_size], "memory": memory}
        log(f"V={vocab_size} memory {memory['over_cross_entropy']}")
    kept = keep_pages(True)
    for vocab_size in args.vocab:
        found = time_variants(vocab_size, turns)
        rows[str(vocab_size)]["time_over_cross_entropy"] = found
        log(f"V={vocab_size} time {found}")
    result = {
        "benchmark": "bench_linear",
        "time_over_cross_entropy": max(
            row["time_over_cross_entropy"]["linear_mix"]["median"] for row in rows.values()
        ),
        "memory_over_cross_entropy": max(
            row["memory"]["over_cross_entropy"]["linear_mix"] for row in rows.values()
        ),
        "goals": {"memory_over_cross_entropy": 0.5},
        "hidden": HIDDEN,
        "kept_pages": kept,
        "turns": turns,
        "rows": rows,
        "threads": torch.get_num_threads(),
    }
    report(result, "bench_linear", save=args.save)


if __name__ == "__main__":
    main()
