"""What a mixed loss over sparse soft labels costs beside plain cross-entropy.

    python benchmarks/bench_loss.py [--quick] [--save] [--threads N]

Forward and backward pass of 0.5 cross-entropy + 0.5 forward KL over the same float32 logits, in
place, with threshold-like labels (about 6 entries a row), against `F.cross_entropy` alone, and
against the same mix with the teacher made dense as `[N, V]`. The backward pass ends at the logits.

Time: variants take turns (A B C A B C ...) in one process; medians, and the smallest and largest
ratio of a turn. Memory that is freed and taken again costs a page fault per 4 KiB, so what
cross-entropy takes depends on the allocator. The headline is the setting that favours it: an
allocator that keeps its pages. `fresh_pages` is glibc as it comes.

Memory: `ru_maxrss` of a process of its own per variant, minus its value just before the step. The
step makes the logits, as a model would, so they count on both sides.
"""

# N rows, V vocabulary, E entries

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from setting import log, report
from torch import Tensor

from kdcache.labels.sparse_target import SparseTarget
from kdcache.train.losses.fused_loss import LossTerm, fused_loss, hard_target

SHAPES = {8_000: 4096, 32_000: 1024, 152_000: 256}  # V -> N: logits of 125 to 148 MiB
ENTRIES = 6
VARIANTS = ["cross_entropy", "fused", "fused_t2", "dense"]


class Handoff(torch.autograd.Function):
    """Logits that stand where a model's output would, and a backward pass that ends at them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        """Takes the logits into the graph of the anchor."""
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Drops the gradient."""
        return gradient.new_zeros(1), None


class Labels:
    """Labels and a threshold-like teacher: the head's own masses, and draws of 1/16 each.

    Args:
        num_rows: N.
        vocab_size: V.
        device: where they lie.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        counts = torch.randint(1, 2 * ENTRIES, (num_rows,), generator=generator)
        rows = torch.repeat_interleave(torch.arange(num_rows), counts)  # [E]
        ids = torch.randint(vocab_size, (len(rows),), generator=generator)
        order = torch.argsort(rows * vocab_size + ids)
        values = torch.full((len(rows),), 1 / 16)
        first = counts.cumsum(0) - counts
        values[first] += 1 - counts / 16
        self.vocab_size = vocab_size
        self.labels = ids[first].to(device)
        self.teacher = SparseTarget(
            rows=rows.to(device),
            ids=ids[order].to(device),
            values=values.to(device),
            uniform=None,
            bucket=None,
            constant=torch.full((num_rows,), -1.5, device=device),
        )

    def loss(self, variant: str, logits: Tensor) -> Tensor:
        """Scalar loss of a variant."""
        temperature = 2.0 if variant.endswith("_t2") else 1.0
        if variant == "cross_entropy":
            return F.cross_entropy(logits, self.labels)
        if variant.startswith("fused"):
            hard = LossTerm(hard_target(self.labels, self.vocab_size), 1.0, 0.5)
            soft = LossTerm(self.teacher, temperature, 0.5 * temperature**2)
            return fused_loss(logits, [hard, soft], inplace=True)[0]
        teacher = self.teacher
        density = torch.zeros_like(logits, requires_grad=False)
        density.index_put_((teacher.rows, teacher.ids), teacher.values, accumulate=True)
        log_probs = F.log_softmax(logits, 1)
        soft_loss = F.kl_div(log_probs, density, reduction="batchmean")
        return 0.5 * F.nll_loss(log_probs, self.labels) + 0.5 * soft_loss


def step(labels: Labels, variant: str, logits: Tensor) -> None:
    anchor = torch.zeros(1, device=logits.device, requires_grad=True)
    labels.loss(variant, Handoff.apply(anchor, logits)).backward()


def keep_pages(keep: bool) -> bool:
    """Whether the C library could be told to keep freed memory (True) or to return it (False)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim, mmap_max = -1, -4
    mallopt(mmap_max, 0 if keep else 65536)
    mallopt(trim, 2**31 - 1 if keep else 128 * 1024)
    return True


def time_variants(vocab_size: int, turns: int, device: str) -> dict[str, Any]:
    """Time of each variant over plain cross-entropy, in turns over the same logits.

    Milliseconds are told of a GPU alone: those of a shared processor mean nothing elsewhere.
    """
    num_rows = SHAPES[vocab_size]
    labels = Labels(num_rows, vocab_size, device)
    original = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(2)) * 3
    original = original.to(device)
    scratch = torch.empty_like(original)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(turns + 1):
        for variant in VARIANTS:
            scratch.copy_(original)
            wait()
            start = time.perf_counter()
            step(labels, variant, scratch)
            wait()
            if turn:  # the first turn warms up
                times[variant].append((time.perf_counter() - start) * 1e3)
    plain = times["cross_entropy"]
    medians = {name: round(statistics.median(taken), 2) for name, taken in times.items()}
    return {
        **({"milliseconds": medians} if device == "cuda" else {}),
        "over_cross_entropy": {
            name: {
                "median": round(statistics.median(taken) / statistics.median(plain), 3),
                "turns": [round(bound(_ratios(taken, plain)), 3) for bound in (min, max)],
            }
            for name, taken in times.items()
            if name != "cross_entropy"
        },
    }


def _ratios(taken: list[float], plain: list[float]) -> list[float]:
    return [ours / theirs for ours, theirs in zip(taken, plain, strict=True)]


def peak_bytes(variant: str, vocab_size: int) -> int:
    """Growth of this process's peak memory over one step; call it once per process."""
    warm = Labels(8, 64, "cpu")
    step(warm, variant, torch.randn(8, 64))
    num_rows = SHAPES[vocab_size]
    labels = Labels(num_rows, vocab_size, "cpu")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(labels, variant, torch.empty(num_rows, vocab_size).normal_())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def measure_memory(vocab_size: int, threads: int) -> dict[str, Any]:
    """Peak bytes of each variant. A child inherits its parent's peak: measure before timing."""
    peaks = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--peak", variant, str(vocab_size)]
        command += ["--threads", str(threads)]
        peaks[variant] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    plain = peaks["cross_entropy"]
    return {
        "logits_bytes": SHAPES[vocab_size] * vocab_size * 4,
        "peak_bytes": peaks,
        "over_cross_entropy": {
            name: round(peak / plain, 3) for name, peak in peaks.items() if name != "cross_entropy"
        },
    }


def measure_cuda(vocab_size: int, turns: int) -> dict[str, Any]:
    """Milliseconds, and peak bytes of the allocator with the logits in them, on a GPU."""
    row = time_variants(vocab_size, turns, "cuda")
    num_rows = SHAPES[vocab_size]
    labels = Labels(num_rows, vocab_size, "cuda")
    peaks = {}
    for variant in VARIANTS:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(labels, variant, torch.randn(num_rows, vocab_size, device="cuda"))
        peaks[variant] = torch.cuda.max_memory_allocated() - before
    return {**row, "peak_bytes": peaks}


def worst(rows: dict[str, Any], part: str, variant: str) -> float:
    ratios = [row[part]["over_cross_entropy"][variant] for row in rows.values()]
    return max(ratio["median"] if isinstance(ratio, dict) else ratio for ratio in ratios)


def summary(rows: dict[str, Any], turns: int) -> dict[str, Any]:
    """The result: worst V first, then everything."""
    timing = "kept_pages" if all("kept_pages" in row for row in rows.values()) else "fresh_pages"
    return {
        "benchmark": "bench_loss",
        "time_over_cross_entropy": worst(rows, timing, "fused"),
        "memory_over_cross_entropy": worst(rows, "memory", "fused"),
        "goals": {"time_over_cross_entropy": 0.9, "memory_over_cross_entropy": 0.6},
        "time_over_cross_entropy_fresh_pages": worst(rows, "fresh_pages", "fused"),
        "t2_time_over_cross_entropy": worst(rows, timing, "fused_t2"),
        "t2_memory_over_cross_entropy": worst(rows, "memory", "fused_t2"),
        "dense_time_over_cross_entropy": worst(rows, timing, "dense"),
        "dense_memory_over_cross_entropy": worst(rows, "memory", "dense"),
        "timing": timing,
        "turns": turns,
        "rows": rows,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 15")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vocab", type=int, choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "V"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_bytes(args.peak[0], int(args.peak[1])))
        return
    turns = 3 if args.quick else 15
    rows: dict[str, Any] = {str(vocab_size): {} for vocab_size in args.vocab}
    for vocab_size in args.vocab:
        rows[str(vocab_size)]["num_rows"] = SHAPES[vocab_size]
        rows[str(vocab_size)]["memory"] = measure_memory(vocab_size, args.threads)
        log(f"V={vocab_size} memory {rows[str(vocab_size)]['memory']['over_cross_entropy']}")
    # Fresh first: once pages are kept, large requests would find them.
    for name, keep in (("fresh_pages", False), ("kept_pages", True)):
        if keep and not keep_pages(True):
            log("this C library cannot be told to keep pages")
            continue
        for vocab_size in args.vocab:
            rows[str(vocab_size)][name] = time_variants(vocab_size, turns, "cpu")
            log(f"V={vocab_size} {name} {rows[str(vocab_size)][name]['over_cross_entropy']}")
    if torch.cuda.is_available():
        for vocab_size in args.vocab:
            rows[str(vocab_size)]["cuda"] = measure_cuda(vocab_size, turns)
            log(f"V={vocab_size} cuda {rows[str(vocab_size)]['cuda']}")
    result = summary(rows, turns)
    report(result, "bench_loss", save=args.save)


if __name__ == "__main__":
    main()
