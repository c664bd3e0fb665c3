"""What a training step from a cache costs beside a plain one, and beside online distillation.

    python benchmarks/bench_step.py [--quick] [--save] [--threads N]

The step is that of `kdcache train` with the recipe `word-level`: a batch from the stream's thread,
cross-entropy and forward KL on threshold 1/16 labels, clipping, Adam. Beside it stand, on the same
batches (random ids, drawn labels, lengths of 5 to 35 tokens), with torch and transformers alone:

- `plain`, the unit of the headline: `model(input_ids, attention_mask, labels).loss` on padded
  batches that lie in memory, clipping, torch's fused Adam;
- `lean`: the same without padding in the output projection, which a careful user writes by hand;
- `online`: both losses with the teacher's forward pass in the step. Its bound is 1 + teacher
  forward over the lean step, both timed in the same turns. The teacher's weights are random.

Time: variants take turns (A B C A B C ...) in one process; medians, and the smallest and largest
ratio of a turn; the same of processor time, which a busy machine changes less. The headline is the
setting that favours plain steps, an allocator that keeps its pages; `fresh_pages` is the C library
as it comes. Memory: largest resident memory of a process of its own per variant over some steps,
minus what it held before the first one; the optimiser's state is in it. Start-up: fresh processes
in turns, see `step_startup.py`.

On a GPU: tokens/s of each variant, and the loss alone beside other libraries, see `step_cuda.py`.
"""

from __future__ import annotations

import argparse
import copy
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_loss import keep_pages
from scale_caches import make_cache
from setting import log, report
from step_cases import (
    SIZES,
    VARIANTS,
    Online,
    PlainBatch,
    Size,
    TeacherForward,
    make_variant,
    marian,
    plain_batches,
)
from step_cuda import measure_cuda
from step_startup import measure_startup, spread

CACHE_TOKENS = 1_000_000  # of both streams
NUM_BATCHES = 40
MEMORY_STEPS = 8
GOALS = {"time_over_plain": 1.0, "memory_over_plain": 1.0}


def make_teacher(size: Size, seed: int) -> Any:
    """A teacher of random weights: its time does not depend on what it knows."""
    torch.manual_seed(seed)
    keys = dict(size.teacher)
    inner = keys.pop("ffn_dim")
    return marian(
        size.vocab_size, keys | {"encoder_ffn_dim": inner, "decoder_ffn_dim": inner}
    ).eval()


def num_parameters(model: Any) -> int:
    """Of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


Times = dict[str, list[float]]


def run_turns(variants: dict[str, Any], turns: int, steps: int) -> tuple[Times, Times]:
    """Seconds of so many steps of each variant, turn by turn, on the wall and of processors.

    The first turn warms up. Of processors, those of the stream's thread count too.
    """
    walls: Times = {name: [] for name in variants}
    busy: Times = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, variant in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                variant.step()
            if turn:
                walls[name].append(time.perf_counter() - wall)
                busy[name].append(time.process_time() - cpu)
    return walls, busy


def time_variants(
    size: Size, folder: Path, batches: list[PlainBatch], turns: int, steps: int, online: bool
) -> dict[str, Any]:
    """Ratios of a size; with online distillation where that is asked for."""
    model = marian(size.vocab_size, size.student)
    variants = {name: make_variant(name, size, folder, model, batches) for name in VARIANTS}
    if online:
        teacher = make_teacher(size, 2)
        variants["online"] = Online(copy.deepcopy(model), batches, teacher)
        variants["teacher"] = TeacherForward(batches, teacher)
    times, busy = run_turns(variants, turns, steps)
    for variant in variants.values():
        variant.close()
    ours = times["cached"]
    found: dict[str, Any] = {
        "over_plain": spread(ours, times["plain"]),
        "over_lean": spread(ours, times["lean"]),
        "processor_over_plain": spread(busy["cached"], busy["plain"]),
        "processor_over_lean": spread(busy["cached"], busy["lean"]),
        "turns": turns,
        "steps_of_a_turn": steps,
    }
    if online:
        mid = {name: statistics.median(taken) for name, taken in times.items()}
        bound = 1 + mid["teacher"] / mid["lean"]
        speed_up = spread(times["online"], ours)
        found["online"] = {
            "speed_up": speed_up,
            "bound": round(bound, 3),
            "share_of_bound": round(speed_up["median"] / bound, 3),
            "teacher_over_student": round(num_parameters(teacher) / num_parameters(model), 2),
        }
    return found


def peak_bytes(variant: str, size: Size, folder: Path, batches: Path) -> int:
    """Growth of this process's largest resident memory over some steps; once per process."""
    if variant == "cached":
        made = make_variant(variant, size, folder, None, [])
    else:
        kept = [PlainBatch(*tensors) for tensors in torch.load(batches)]
        made = make_variant(variant, size, folder, marian(size.vocab_size, size.student), kept)
    before = _resident_bytes()
    for _ in range(MEMORY_STEPS):
        made.step()
    grown = _peak_bytes() - before
    made.close()
    return grown


def _resident_bytes() -> int:
    """What this process holds now; on Linux its peak starts again from here."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return _peak_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    """The most that this process ever held, since `_resident_bytes` on Linux."""
    if Path("/proc/self/status").is_file():
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(key: str) -> int:
    """A line of the process's status."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure_memory(name: str, cache: Path, batches: Path, args: argparse.Namespace) -> Any:
    """Bytes of each variant, from runs that take turns, and their ratios."""
    grown: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(1 if args.quick else 3):
        for variant, found in grown.items():
            command = [sys.executable, __file__, "--peak", variant, name, str(cache), str(batches)]
            command += ["--threads", str(args.threads)]
            found.append(int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    return {
        "bytes": {variant: round(statistics.median(found)) for variant, found in grown.items()},
        "over_plain": spread(grown["cached"], grown["plain"]),
        "over_lean": spread(grown["cached"], grown["lean"]),
        "steps": MEMORY_STEPS,
    }


def measure_size(name: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of one size of student."""
    size, cache, kept = SIZES[name], work / name, work / f"{name}.pt"
    make_cache(cache, 1, CACHE_TOKENS, vocab_size=size.vocab_size, alike=True)
    batches = plain_batches(size, cache, NUM_BATCHES)
    torch.save([(one.source, one.mask, one.labels) for one in batches], kept)
    tokens = sum(one.num_tokens for one in batches)
    row: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "student_parameters": num_parameters(marian(size.vocab_size, size.student)),
        "tokens_of_a_batch": round(tokens / NUM_BATCHES),
        "padding": round(1 - tokens / sum(one.labels.numel() for one in batches), 3),
        "memory": measure_memory(name, cache, kept, args),
    }
    log(f"{name} memory {row['memory']}")
    # Fresh first: once pages are kept, large requests would find them.
    settings = [("fresh_pages", False, 1 if args.quick else 4)]
    settings += [("kept_pages", True, 2 if args.quick else 9)]
    for setting, keep, turns in settings:
        row["pages_can_be_kept"] = keep_pages(keep)
        steps = 1 if args.quick else size.steps
        row[setting] = time_variants(size, cache, batches, turns, steps, online=keep)
        log(f"{name} {setting} {row[setting]}")
    keep_pages(False)
    return row


def worst(rows: dict[str, Any], part: str, key: str) -> float:
    """The largest ratio of all sizes."""
    return max(row[part][key]["median"] for row in rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 turns of one step instead of 9")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument(
        "--peak", nargs=4, metavar=("VARIANT", "SIZE", "CACHE", "BATCHES"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        variant, name, cache, batches = args.peak
        print(peak_bytes(variant, SIZES[name], Path(cache), Path(batches)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = {name: measure_size(name, work, args) for name in args.sizes}
        startup = measure_startup(work / args.sizes[0], work, 2 if args.quick else 7)
        log(f"startup {startup}")
        cuda = measure_cuda(work, list(rows), 3 if args.quick else 15)
    result = {
        "benchmark": "bench_step",
        "time_over_plain": worst(rows, "kept_pages", "over_plain"),
        "memory_over_plain": worst(rows, "memory", "over_plain"),
        "goals": GOALS,
        "time_over_lean": worst(rows, "kept_pages", "over_lean"),
        "memory_over_lean": worst(rows, "memory", "over_lean"),
        "time_over_plain_fresh_pages": worst(rows, "fresh_pages", "over_plain"),
        "startup_over_imports": startup["over_imports"]["median"],
        "startup_over_imports_and_model": startup["over_imports_and_model"]["median"],
        "rows": rows,
        "startup": startup,
        "cuda": cuda,
        "threads": torch.get_num_threads(),
    }
    report(result, "bench_step", save=args.save)


if __name__ == "__main__":
    main()
