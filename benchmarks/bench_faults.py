"""Dumps that are killed, refused and shared out: are the bytes always the same?

A small dump of four kinds of signals (hypotheses and labels of them, hidden states, labels) is
killed at random moments, right before every step of the commit protocol, and in the middle of
every write; the disk refuses every step with ENOSPC, EIO and EACCES, once and from then on;
several ranks, and several dumps that know nothing of each other, write one cache and are killed.
Each time the same command is then run to its end, and every file is compared with those of a dump
that nothing happened to, made by the command itself. Nothing else may lie in the cache, and
`verify` must find it sound. A refusal must have been told in one line: where, what, and what to
do.

The machinery is that of the tests: tests/dump/ordeal.py, injection.py and forks.py.
"""

from __future__ import annotations

import argparse
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import log, report

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are no part of what is installed

from tests.dump.forks import Forks
from tests.dump.injection import Injection, Step
from tests.dump.ordeal import Ordeal, make_corpus
from tests.dump.verdicts import Problems, step_kinds

ERRORS = ("ENOSPC", "EIO", "EACCES")
WORLDS = (1, 2, 3, 5)

#: Tokens of a shard: six shards for what happens at some moment, three where steps have their turn.
MANY, FEW = 200, 400


@dataclass(frozen=True)
class Trial:
    """One thing that happens to a dump.

    Attributes:
        group: kills, faults, stops or worlds.
        kind: what of it, for the counts.
        shard_tokens: of the dump.
        act: method of `Ordeal` that does it and says what is wrong afterwards.
        given: its arguments.
        times: how often it happens.
    """

    group: str
    kind: str
    shard_tokens: int
    act: Callable[..., Problems]
    given: tuple[Any, ...] = ()
    times: int = 1


def step_trials(steps: Sequence[Step], share: float, draw: random.Random) -> list[Trial]:
    """Kills before every step of a dump, refusals of every step.

    Of the writes to one file, tens where Arrow pads, the first, the last and one between are
    refused and torn.

    Args:
        steps: all of them.
        share: of them to take.
        draw: chooses, where that is not all; the first of each name is always taken.
    """
    trials = []
    first = {kind[0] for kind in step_kinds(steps).values()}
    writes: dict[str, list[Step]] = {}
    for step in steps:
        if step.name == "write":
            writes.setdefault(step.path, []).append(step)
    some = {step for one in writes.values() for step in (one[0], one[len(one) // 2], one[-1])}

    def take(group: str, kind: str, injection: Injection) -> None:
        chosen = share == 1 or draw.random() < share
        if chosen or (injection.step in first and not injection.lasting):
            act = Ordeal.killed if injection.act == "kill" else Ordeal.refused
            trials.append(Trial(group, kind, FEW, act, (injection,)))

    for number, step in enumerate(steps):
        take("kills", f"before {step.name}", Injection(step))
        if step.name == "write" and step not in some:
            continue
        for error in ERRORS:
            take("faults", error, Injection(step, error))
        take("faults", "lasting", Injection(step, ERRORS[number % 3], lasting=True))
        if step.name == "write":
            take("kills", "in the middle of a write", Injection(step, torn=True))
            take("faults", "in the middle of a write", Injection(step, "ENOSPC", torn=True))
    return trials


def moment_trials(number: int, seconds: float, draw: random.Random) -> list[Trial]:
    """Kills and stops at random moments; every fourth dump is killed three times.

    Args:
        number: signals of each sort in all, about.
        seconds: that a dump takes.
        draw: says when.
    """
    trials = []
    for group, name in (("kills", signal.SIGKILL), ("stops", signal.SIGTERM)):
        left = number
        while left > 0:
            times = min(left, 3 if draw.random() < 0.25 else 1)
            delays = [draw.uniform(0, seconds) for _ in range(times)]
            given = (name, delays)
            kind = "at a random moment"
            trials.append(Trial(group, kind, MANY, Ordeal.signalled, given, times))
            left -= times
    return trials


def world_trials(number: int, draw: random.Random) -> list[Trial]:
    """Ranks in every number, killed and started again in another; dumps without ranks at once.

    Args:
        number: of each.
        draw: chooses.
    """
    trials = []
    for turn in range(number):
        sizes = [draw.choice(WORLDS) for _ in range(draw.randint(1, 3))] + [WORLDS[turn % 4]]
        in_turn = turn % 3 == 2
        kind = f"world {sizes[-1]}, {'one after the other' if in_turn else 'at once'}"
        given = (sizes, random.Random(draw.random()), in_turn)
        trials.append(Trial("worlds", kind, MANY, Ordeal.worlds, given))
        together = 2 + turn % 2
        kind, pause = f"{together} dumps without ranks", draw.choice([0, draw.uniform(0, 0.3)])
        trials.append(Trial("worlds", kind, MANY, Ordeal.together, (together, pause)))
    return trials


def real_trials(number: int, draw: random.Random, torchrun: bool) -> list[Trial]:
    """Kills of `python -m kdcache dump` itself, and of a rank of torchrun's.

    Args:
        number: of the former.
        draw: says when.
        torchrun: whether to take the latter too, which is five processes.
    """
    trials = [Trial("worlds", "torchrun", MANY, Ordeal.under_torchrun)] if torchrun else []
    for _ in range(number):
        given = (random.Random(draw.random()),)
        trials.append(Trial("kills", "the command itself", MANY, Ordeal.really_killed, given))
    return trials


class Bench:
    """Trials on several threads, each with servers of its own."""

    def __init__(self, root: Path, workers: int, stack: ExitStack) -> None:
        """Dump once without any trouble.

        Args:
            root: folder for everything.
            workers: threads.
            stack: ends the servers.
        """
        make_corpus(root)
        self.ordeals: queue.Queue[dict[int, Ordeal]] = queue.Queue()
        servers = [stack.enter_context(Forks(root / f"log-{n}")) for n in range(workers)]
        self.first = {size: Ordeal(root, servers[0], size) for size in (MANY, FEW)}
        self.ordeals.put(self.first)
        for number, forks in enumerate(servers[1:], 1):
            beside = {
                size: ordeal.beside(forks, f"worker-{number}")
                for size, ordeal in self.first.items()
            }
            self.ordeals.put(beside)
        self.workers = workers

    def run(self, trials: list[Trial]) -> tuple[Problems, dict[str, Counter[str]]]:
        """Run trials; what is wrong, and how many there were of each kind."""
        problems = Problems()
        counts: dict[str, Counter[str]] = {}
        for trial in trials:
            counts.setdefault(trial.group, Counter())[trial.kind] += trial.times
        began = said = time.perf_counter()
        with ThreadPoolExecutor(self.workers) as pool:
            tasks = [pool.submit(self._one, trial) for trial in trials]
            for done, task in enumerate(as_completed(tasks), 1):
                found = task.result()
                problems += found
                if found:
                    log(str(found))
                if time.perf_counter() - said > 30:
                    said = time.perf_counter()
                    log(f"{done} of {len(trials)} trials after {said - began:.0f} s")
        return problems, counts

    def _one(self, trial: Trial) -> Problems:
        ordeals = self.ordeals.get()
        try:
            return trial.act(ordeals[trial.shard_tokens], *trial.given)
        except Exception as error:  # such as a dump that hangs; the others go on
            return Problems(unsound=[f"{trial.group} {trial.kind} {trial.given}: {error!r}"])
        finally:
            self.ordeals.put(ordeals)


def run(root: Path, quick: bool, share: float, seed: int, workers: int) -> dict[str, Any]:
    """All trials."""
    draw = random.Random(seed)
    with ExitStack() as stack:
        bench = Bench(root, workers, stack)
        many, few = bench.first[MANY], bench.first[FEW]
        log(f"a dump takes {few.seconds:.2f} s and {len(few.steps)} steps in three shards")
        trials = step_trials(few.steps, share, draw)
        trials += moment_trials(16 if quick else 200, many.seconds, draw)
        trials += world_trials(4 if quick else 40, draw)
        trials += real_trials(1 if quick else 24, draw, torchrun=not quick)
        draw.shuffle(trials)
        log(f"{len(trials)} trials")
        problems, counts = bench.run(trials)
    found = {name: len(lines) for name, lines in vars(problems).items()}
    return {
        **{group: sum(kinds.values()) for group, kinds in sorted(counts.items())},
        **found,
        "problems": str(problems).splitlines()[:20],
        "kinds": {group: dict(sorted(kinds.items())) for group, kinds in sorted(counts.items())},
        "steps": {name: len(steps) for name, steps in step_kinds(few.steps).items()},
        "shards": {"steps": few.num_shards, "else": many.num_shards},
        "files": sum(not name.endswith("/") for name in many.expected),
    }


def main() -> None:
    """Print one JSON object on the last line; exit 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes on 2 cores")
    parser.add_argument("--seed", type=int, default=1, help="of random moments and choices")
    parser.add_argument("--share", type=float, help="of the steps (default 1, quick 0.01)")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--work", help="folder for the trials, kept if anything was wrong")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kdcache-bench-", dir=args.work))
    began = time.perf_counter()
    share = args.share or (0.01 if args.quick else 1)
    figures = run(root, args.quick, share, args.seed, args.workers)
    wrong = sum(figures[name] for name in vars(Problems()))
    if wrong:
        log(f"what was wrong lies in {root}")
    else:
        shutil.rmtree(root)
    result = {
        "benchmark": "bench_faults",
        "quick": args.quick,
        "share_of_steps": share,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - began),
        **figures,
    }
    report(result, "bench_faults", save=args.save)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
