"""A sweep of 24 runs over one cache, killed twice, and what it costs beside an online teacher.

    python benchmarks/bench_sweep.py [--quick] [--save] [--jobs N] [--work DIR]

Temperature (2) x weight of the soft labels (3) x seed (4), the recipe `word-level` with a small
student, over one cache of `KDCACHE_DATA`'s Tatoeba or of generated text. `kdcache sweep` is ended
by SIGTERM after a quarter of the runs and by SIGKILL after half of them, and the same command goes
on each time. Then: no run that was finished before was touched again, no process was left, and runs
that were cut off have the weights of the same recipe trained by itself, bit for bit.

The cost: on a subset of the runs, steps from the cache and steps with the teacher's forward pass in
them take turns (A B A B ...) in one process, on the same batches with the same student. The online
step is torch and transformers alone: both losses from one forward pass, no logits of padding,
clipping, torch's fused Adam. `step` is the median over the subset of the median ratio of a turn;
`sweep` is that of all 24 runs, where the cached side pays for its dump too, which was timed here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from setting import Setting, find_setting, log, report
from step_cases import IGNORED, Plain, PlainBatch, valid_logits
from torch import Tensor

TEMPERATURES, WEIGHTS, SEEDS = (1.0, 2.0), (0.25, 0.5, 0.75), (1, 2, 3, 4)
GRID = {
    "train.objective.1.temperature": TEMPERATURES,
    "train.objective.1.weight": WEIGHTS,
    "train.seed": SEEDS,
}
#: Runs whose steps are timed: temperature and weight.
SUBSET = ((1.0, 0.5), (2.0, 0.5), (2.0, 0.75))
NUM_BATCHES = 40


def overrides(setting: Setting, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Of the recipe, for dump and training alike."""
    keys: dict[str, object] = {
        "corpus.fields.src": setting.train[0],
        "corpus.fields.tgt": setting.train[1],
        "corpus.limit": args.samples,
        "dump.teacher.path": setting.teacher,
        "train.validation.corpus.fields.src": setting.dev[0],
        "train.validation.corpus.fields.tgt": setting.dev[1],
        "train.validation.corpus.limit": 200,
        "train.validation.every_steps": args.steps,
        "train.checkpoints.every_steps": max(1, args.steps // 4),
        "train.checkpoints.average_last": 0,
        "train.max_steps": args.steps,
        "train.batch_tokens": 2048,
        "train.log_every": max(1, args.steps // 10),
        "train.schedule.warmup_steps": max(1, args.steps // 10),
        "train.student.config.encoder_layers": 2,
        "train.student.config.decoder_layers": 1,
        "train.student.config.d_model": 128,
        "train.student.config.encoder_ffn_dim": 256,
        "train.student.config.decoder_ffn_dim": 256,
        "train.objective.0.weight": 0.5,
    }
    return [(key, str(value)) for key, value in keys.items()]


def sweep_command(
    cache: Path, out: Path, pairs: list[tuple[str, str]], args: argparse.Namespace
) -> list[str]:
    """The one command that is given again and again."""
    words = [sys.executable, "-m", "kdcache", "sweep", "word-level", "--cache", str(cache)]
    words += ["--out", str(out), "--jobs", str(args.jobs), "--json"]
    for key, value in pairs:
        words += [f"--{key}", value]
    for key, values in GRID.items():
        words += [f"--sweep.grid.{key}", ",".join(map(str, values))]
    return words


def finished(out: Path) -> dict[str, int]:
    """Runs that have a summary, and when it was written."""
    found = {}
    for path in out.glob("runs/*/run.json"):
        if json.loads(path.read_text())["summary"] is not None:
            found[path.parent.name] = path.stat().st_mtime_ns
    return found


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes that a process has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.is_file() else []


def alive(pid: int) -> bool:
    """Whether a process is there, and not only its corpse."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def killed_twice(command: list[str], out: Path) -> dict[str, Any]:
    """Run the sweep to its end with two kills on the way."""
    total = len(TEMPERATURES) * len(WEIGHTS) * len(SEEDS)
    kills, stood = [], dict[str, int]()
    began = time.perf_counter()
    for number, share in ((signal.SIGTERM, 0.25), (signal.SIGKILL, 0.5)):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while len(finished(out)) < share * total:
            if process.poll() is not None:
                sys.exit(f"the sweep ended by itself with {process.returncode}")
            time.sleep(0.05)
        children = workers_of(process)
        begun = {path.parent.name for path in out.glob("runs/*/run.json")}
        process.send_signal(number)
        asked = time.perf_counter()
        code = process.wait(60)
        while any(map(alive, children)) and time.perf_counter() - asked < 60:
            time.sleep(0.02)
        now = finished(out)
        kept = all(now[name] == when for name, when in stood.items())
        kills.append(
            {
                "signal": signal.Signals(number).name,
                "exit_code": code,
                "seconds_to_end": round(time.perf_counter() - asked, 2),
                "processes_left": sum(map(alive, children)),
                "finished": len(now),
                "cut_off": sorted(begun - set(now)),
                "finished_before_untouched": kept,
            }
        )
        log(f"{kills[-1]}")
        stood = now
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    now = finished(out)
    found = json.loads(done.stdout)
    return {
        "kills": kills,
        "exit_code": done.returncode,
        "finished": len(now),
        "finished_before_untouched": all(now[name] == when for name, when in stood.items()),
        "seconds_with_kills": round(time.perf_counter() - began, 1),
        "best": [
            {key: row[key] for key in ("settings", "mean", "std")} for row in found["rows"][:3]
        ],
        "worst": {key: found["rows"][-1][key] for key in ("settings", "mean", "std")},
        "run_seconds_median": statistics.median(r["summary"]["seconds"] for r in found["runs"]),
    }


def same_alone(out: Path, cache: Path, names: list[str], work: Path) -> dict[str, bool]:
    """Whether runs that were cut off have the weights of the same run by itself."""
    from kdcache.recipe import load_recipe
    from kdcache.train.runs.loop import train

    found = {}
    for name in names:
        recipe = load_recipe(str(out / "runs" / name / "recipe.yaml"))
        train(recipe, cache, work / "alone" / name)
        there, here = (
            (place / name / "last/model.safetensors").read_bytes()
            for place in (out / "runs", work / "alone")
        )
        found[name] = there == here
    return found


class OnlineRun(Plain):
    """A run's step with its teacher at hand.

    Args:
        model: the student.
        batches: in memory.
        teacher: in evaluation mode.
        temperature: of the soft labels.
        weight: of their term; the references have 0.5.
    """

    def __init__(
        self, model: Any, batches: list[PlainBatch], teacher: Any, temperature: float, weight: float
    ) -> None:
        super().__init__(model, batches)
        self.teacher, self.temperature, self.weight = teacher, temperature, weight

    def loss(self, batch: PlainBatch) -> Tensor:
        """Scalar."""
        kept, t = batch.labels != IGNORED, self.temperature
        with torch.no_grad():
            wanted = F.log_softmax(valid_logits(self.teacher, batch, kept) / t, 1)
        logits = valid_logits(self.model, batch, kept)
        hard = F.cross_entropy(logits, batch.labels[kept])
        log_probs = F.log_softmax(logits / t, 1)
        soft = F.kl_div(log_probs, wanted, reduction="batchmean", log_target=True)
        return 0.5 * hard + self.weight * t * t * soft


class CachedRun:
    """A run's step as `kdcache train` does it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._batches = iter(trainer.stream)

    def step(self) -> None:
        """One batch."""
        self.trainer.step(next(self._batches))

    def close(self) -> None:
        """End the thread."""
        self._batches.close()


def measure_cost(
    setting: Setting, cache: Path, pairs: list[tuple[str, str]], args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step of each kind, in turns, on a subset of the runs."""
    from transformers import AutoModelForSeq2SeqLM

    from kdcache.formats.cache import open_cache
    from kdcache.recipe import load_recipe
    from kdcache.train.runs.trainer import Trainer

    teacher = AutoModelForSeq2SeqLM.from_pretrained(setting.teacher, dtype="float32").eval()
    turns, steps = (3, 3) if args.quick else (12, 8)
    rows = []
    for temperature, weight in SUBSET:
        keys = {
            "train.objective.1.temperature": temperature,
            "train.objective.1.weight": weight,
            "train.max_steps": 1_000_000,
        }
        chosen = [*pairs, *((key, str(value)) for key, value in keys.items())]
        section = load_recipe("word-level", chosen).train
        trainer, other = (Trainer(section, open_cache(cache)) for _ in range(2))
        batches = []
        with closing(iter(other.stream)) as stream:
            for batch in islice(stream, NUM_BATCHES):
                (micro,) = batch.micro
                source, target = micro.streams["src"], micro.streams["tgt"]
                labels = torch.where(target.mask, target.ids, IGNORED)
                batches.append(PlainBatch(source.ids.clone(), source.mask.long(), labels))
        device = next(trainer.model.parameters()).device
        online = OnlineRun(other.model.train(), batches, teacher.to(device), temperature, weight)
        sides: dict[str, Any] = {"cached": CachedRun(trainer), "online": online}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns + 1):
            for name, side in sides.items():
                began = time.perf_counter()
                for _ in range(steps):
                    side.step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first warms up
                    times[name].append((time.perf_counter() - began) / steps)
        for side in sides.values():
            side.close()
        ratios = [b / a for a, b in zip(times["cached"], times["online"], strict=True)]
        rows.append(
            {
                "temperature": temperature,
                "weight": weight,
                **{f"{k}_step_seconds": round(statistics.median(v), 5) for k, v in times.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
            }
        )
        log(f"{rows[-1]}")
    sizes = {"teacher": teacher, "student": trainer.model}
    return {
        "rows": rows,
        "turns": turns,
        "steps_of_a_turn": steps,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in sizes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps on few samples")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--steps", type=int, help="of each run (default 400, quick 20)")
    parser.add_argument("--samples", type=int, help="of the cache (default 20,000, quick 1,000)")
    parser.add_argument("--work", type=Path, help="a folder to keep; a temporary one without it")
    args = parser.parse_args()
    args.steps = args.steps or (20 if args.quick else 400)
    args.samples = args.samples or (1_000 if args.quick else 20_000)
    # Bit for bit is promised for one number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        measure(work, args)


def measure(work: Path, args: argparse.Namespace) -> None:
    """All of it, in a folder."""
    from kdcache.dump.runner import dump
    from kdcache.recipe import load_recipe
    from kdcache.report.report import write_report

    setting = find_setting(work / "setting")
    cache, out, pairs = work / "cache", work / "sweep", overrides(setting, args)
    began = time.perf_counter()
    dump(load_recipe("word-level", pairs), cache)
    dump_seconds = time.perf_counter() - began
    # The training takes nothing from these.
    pairs = [pair for pair in pairs if pair[0].split(".")[0] not in ("corpus", "dump")]
    swept = killed_twice(sweep_command(cache, out, pairs, args), out)
    cut = sorted({name for kill in swept["kills"] for name in kill["cut_off"]})[:2]
    same = same_alone(out, cache, cut, work)
    log(f"cut off and the same by themselves: {same}")
    page = write_report(out)
    cost = measure_cost(setting, cache, pairs, args)
    runs = len(TEMPERATURES) * len(WEIGHTS) * len(SEEDS)
    # What else the machine does falls on both sides of a turn alike: ratios come first.
    ratio = statistics.median(row["ratio"] for row in cost["rows"])
    cached = statistics.median(row["cached_step_seconds"] for row in cost["rows"])
    online = ratio * cached
    all_steps = runs * args.steps
    result = {
        "benchmark": "bench_sweep",
        "generated": setting.generated,
        "runs": runs,
        "steps_of_a_run": args.steps,
        "samples": args.samples,
        "jobs": args.jobs,
        "threads": torch.get_num_threads(),
        "online_over_cached": {
            "step": ratio,
            "sweep": round(all_steps * online / (dump_seconds + all_steps * cached), 3),
            "dump_seconds": round(dump_seconds, 1),
            "dump_pays_after_runs": round(
                dump_seconds / max(1e-9, args.steps * (online - cached)), 2
            ),
        },
        "cost": cost,
        "swept": swept,
        "cut_off_runs_same_as_alone": same,
        "report": {"bytes": page["bytes"], "pictures": page["pictures"]},
    }
    report(result, "bench_sweep", save=args.save)


if __name__ == "__main__":
    main()
