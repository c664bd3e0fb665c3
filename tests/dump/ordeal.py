"""A small dump that is killed, refused and shared out, and what must be true of it afterwards."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from kdcache.formats.checks.verify import verify_cache
from tests.dump.forks import ROOT, Ended, Fork, Forks
from tests.dump.injection import Injection
from tests.dump.verdicts import Problems, clear_refusal, clear_stop, files_of, last_line

SIGNALS: dict[str, Any] = {
    "logits": {"codec": {"name": "threshold", "c": "1/8"}},
    "hidden": {"kind": "hidden", "stream": "src", "layers": [1], "values": "int8"},
    "beams": {"kind": "beams", "num_beams": 2, "max_length": 6},
    "best": {"codec": {"name": "topk", "k": 4}, "hypotheses": "beams"},
}


def make_corpus(root: Path) -> None:
    """A corpus of 60 pairs, and a teacher that has read none of it."""
    from tests.dump import zoo
    from tests.dump.world import make_lines

    src, tgt = make_lines(60)
    for name, lines in (("src", src), ("tgt", tgt)):
        (root / name).write_text("".join(f"{line}\n" for line in lines))
    zoo.make("bart", "lm", root / "teacher", [*src, *tgt])


class Ordeal:
    """One recipe, the bytes of its dump, and trials that must lead to the same bytes."""

    def __init__(self, root: Path, forks: Forks, shard_tokens: int = 200) -> None:
        """Write the recipe, and dump it once by the command itself.

        Args:
            root: folder with what `make_corpus` made; trials go there too.
            forks: runs commands.
            shard_tokens: 200 gives six shards, 400 three.
        """
        self.forks, self._root, self._numbers = forks, root / f"shards-of-{shard_tokens}", count()
        self._root.mkdir()
        self.recipe = self._root / "recipe.yaml"
        tree = {
            "name": "ordeal",
            "corpus": {"fields": {side: str(root / side) for side in ("src", "tgt")}},
            "dump": {
                "teacher": {"path": str(root / "teacher"), "device": "cpu"},
                "shard_tokens": shard_tokens,
                "batch_tokens": 400,
                "signals": SIGNALS,
            },
        }
        self.recipe.write_text(yaml.safe_dump(tree))
        whole = self.new()
        done = self.real(whole)
        assert done.code == 0, done.err
        report = verify_cache(whole)
        assert not report.faults
        assert not report.leftovers
        self.expected = files_of(whole)
        self.num_shards = json.loads(done.out)["shards"]
        forks.warm(self.command(self.new()))
        began = time.perf_counter()
        recorded = self.run(self.new(), record=True)
        self.seconds = time.perf_counter() - began
        self.steps = recorded.steps

    def beside(self, forks: Forks, name: str) -> Ordeal:
        """The same with a server and a folder of its own, for another thread.

        Args:
            forks: the server.
            name: of the folder.
        """
        other = copy.copy(self)
        other.forks, other._root, other._numbers = forks, self._root / name, count()
        other._root.mkdir()
        forks.warm(other.command(other.new()))
        return other

    def new(self) -> Path:
        """Path of a cache that is not there."""
        return self._root / f"{next(self._numbers):06d}"

    def command(self, out: Path) -> list[str]:
        """What dumps into a cache."""
        return ["dump", str(self.recipe), "--out", str(out), "--json"]

    def start(self, out: Path, **options: Any) -> Fork:
        """Start a dump."""
        return self.forks.start(self.command(out), out, **options)

    def run(self, out: Path, **options: Any) -> Ended:
        """Dump, to whatever end."""
        return self.start(out, **options).wait()

    def real(self, out: Path, *before: str, **options: Any) -> Ended:
        """Dump by the command itself.

        Args:
            out: the cache.
            before: what starts `-m kdcache` in place of the interpreter.
            options: of `subprocess.run`; `environment` is beside this process's.
        """
        process = self.popen(out, *before, **options)
        out_text, err_text = process.communicate(timeout=120)
        return Ended(process.returncode, out_text, err_text)

    def popen(
        self, out: Path, *before: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """As `real`, not waited for."""
        words = [*(before or (sys.executable,)), "-m", "kdcache", *self.command(out)]
        variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, stdout=pipe, stderr=pipe, text=True, env=variables | dict(environment or {})
        )

    def finished(self, out: Path, what: object) -> Problems:
        """Run the same command again, to its end; what is wrong with the cache then.

        Args:
            out: the cache.
            what: happened to it, for messages.
        """
        again = self.run(out)
        problems = self.judged(out, what)
        if again.code:
            problems.unsound.append(f"{what}: not finished: {last_line(again)}")
        return problems

    def judged(self, out: Path, what: object) -> Problems:
        """What is wrong with a cache that should be whole; it is removed if nothing is."""
        problems = Problems()
        found = files_of(out)
        differing = sorted(
            name
            for name in found.keys() | self.expected.keys()
            if found.get(name) != self.expected.get(name)
        )
        if differing:
            problems.unequal.append(f"{what}: {out}: {', '.join(differing[:4])}")
        try:
            report = verify_cache(out)
            lines = [*report.faults, *report.leftovers]
        except Exception as error:
            lines = [repr(error)]
        if lines:
            problems.unsound.append(f"{what}: {lines[0]}")
        if not problems:
            shutil.rmtree(out)
        return problems

    def killed(self, injection: Injection) -> Problems:
        """Kill a dump at a step, and finish it."""
        out = self.new()
        ended = self.run(out, injection=injection)
        problems = self.finished(out, injection)
        if ended.code != -signal.SIGKILL and not injection.step.optional:
            problems.missed.append(f"{injection}: {ended.code} {last_line(ended)}")
        return problems

    def refused(self, injection: Injection) -> Problems:
        """Let the disk refuse something to a dump, and finish it."""
        out = self.new()
        ended = self.run(out, injection=injection)
        problems, step = Problems(), injection.step
        clear = clear_refusal(ended, out, None if injection.lasting else step)
        if step.optional:
            clear = ended.code == 0 or (injection.lasting and clear)
        elif not ended.fired:
            problems.missed.append(f"{injection}: {ended.code} {last_line(ended)}")
        if not clear:
            problems.unclear.append(f"{injection}: {ended.code}: {last_line(ended)}")
        problems += self.finished(out, injection)
        return problems

    def signalled(self, number: int, delays: Sequence[float]) -> Problems:
        """Send a signal to a dump after a while, start it again, and so on; then finish it.

        Args:
            number: SIGKILL or SIGTERM.
            delays: seconds before each.
        """
        out = self.new()
        what = f"{signal.Signals(number).name} after {', '.join(f'{d:.3f}' for d in delays)} s"
        problems = Problems()
        for delay in delays:
            fork = self.start(out)
            time.sleep(delay)
            fork.send(number)
            ended = fork.wait()
            if number == signal.SIGTERM and not clear_stop(ended, out):
                problems.unclear.append(f"{what}: {ended.code}: {last_line(ended)}")
        problems += self.finished(out, what)
        return problems

    def shared(
        self, out: Path, world: int, kills: Mapping[int, float], in_turn: bool = False
    ) -> list[Ended]:
        """Dump by several ranks.

        Args:
            out: the cache.
            world: how many.
            kills: rank to the seconds after which it is killed.
            in_turn: one after the other, in place of all at once.
        """
        ended = []
        running: dict[int, Fork] = {}
        for rank in range(world):
            named = {"RANK": str(rank), "WORLD_SIZE": str(world)}
            running[rank] = self.start(out, environment=named)
            if in_turn:
                _kill_later(running, kills)
                ended.append(running.pop(rank).wait())
        _kill_later(running, kills)
        return ended + [fork.wait() for fork in running.values()]

    def worlds(self, sizes: Sequence[int], draw: random.Random, in_turn: bool) -> Problems:
        """Dump by one number of ranks after another, some killed; the last number finishes.

        Args:
            sizes: numbers of ranks.
            draw: says who is killed and when.
            in_turn: ranks run one after the other.
        """
        out, problems = self.new(), Problems()
        order = "one after the other" if in_turn else "at once"
        what = f"worlds {' then '.join(map(str, sizes))}, ranks {order}"
        for world in sizes[:-1]:
            victims = draw.sample(range(world), draw.randint(1, world))
            kills = {rank: draw.uniform(0.05, self.seconds) for rank in victims}
            for rank, ended in enumerate(self.shared(out, world, kills, in_turn)):
                if rank not in kills and ended.code:
                    problems.unclear.append(f"{what}: rank {rank}: {last_line(ended)}")
        for rank, ended in enumerate(self.shared(out, sizes[-1], {}, in_turn)):
            if ended.code:
                problems.unclear.append(f"{what}: last rank {rank}: {last_line(ended)}")
        problems += self.judged(out, what)
        return problems

    def together(self, number: int, pause: float) -> Problems:
        """Several dumps that know nothing of each other, into one cache at once.

        Args:
            number: how many.
            pause: seconds between their starts.
        """
        out, problems = self.new(), Problems()
        what = f"{number} dumps at once, {pause:.3f} s apart"
        forks = []
        for _ in range(number):
            forks.append(self.start(out))
            time.sleep(pause)
        for fork in forks:
            ended = fork.wait()
            if ended.code:
                problems.unclear.append(f"{what}: {last_line(ended)}")
            elif not json.loads(ended.out)["complete"]:
                problems.unclear.append(f"{what}: ended well before the cache was complete")
        problems += self.judged(out, what)
        return problems

    def really_killed(self, draw: random.Random) -> Problems:
        """Kill the command itself, no fork of it, once it has begun; then finish it.

        Args:
            draw: says when.
        """
        out, delay = self.new(), draw.uniform(0, self.seconds)
        what = f"the command itself killed after {delay:.3f} s"
        process = self.popen(out)
        look(out.exists)
        time.sleep(delay)
        process.kill()
        process.communicate()
        again, problems = self.real(out), Problems()
        if again.code:
            problems.unsound.append(f"{what}: not finished: {last_line(again)}")
        problems += self.judged(out, what)
        return problems

    def under_torchrun(self) -> Problems:
        """Let torchrun start two ranks and kill one of them; then let it start three."""
        out, problems = self.new(), Problems()
        torchrun = shutil.which("torchrun", path=Path(sys.executable).parent)
        assert torchrun is not None, "it comes with torch"
        process = self.popen(out, torchrun, "--nproc-per-node", "2")
        look((out / "commits/beams.00001.json").exists)
        told = json.loads((out / ".status/00001-of-00002.json").read_text())
        os.kill(told["pid"], signal.SIGKILL)
        before = {path.name for path in out.glob("commits/[a-z]*")}
        err = process.communicate(timeout=120)[1]
        if process.returncode != 1 or "Signal 9" not in err:
            problems.missed.append(f"torchrun: {process.returncode}: no rank was killed")
        gone = before - {path.name for path in out.glob("commits/*")}
        if gone:
            problems.unequal.append(f"torchrun: {out}: gone: {', '.join(sorted(gone))}")
        again = self.real(out, torchrun, "--nproc-per-node", "3")
        if again.code:
            problems.unsound.append(f"torchrun: not finished: {last_line(again)}")
        problems += self.judged(out, "torchrun, a rank killed")
        return problems


def look(condition: Callable[[], bool]) -> None:
    """Look again and again, for a minute at most."""
    late = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < late, "nothing happened for a minute"
        time.sleep(0.002)


def _kill_later(running: Mapping[int, Fork], kills: Mapping[int, float]) -> None:
    """Kill some of those that run, each at its time from now."""
    began = time.perf_counter()
    for rank, delay in sorted(kills.items(), key=lambda item: item[1]):
        if rank in running:
            time.sleep(max(0.0, began + delay - time.perf_counter()))
            running[rank].send(signal.SIGKILL)
