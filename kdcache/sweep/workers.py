"""Processes that do the runs of a sweep: one GPU each where there are GPUs.

A worker imports once what all runs need. What a run says goes to its own log. A worker that dies
takes its run with it and nothing else.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from kdcache.errors import KDCacheError, one_line
from kdcache.processes import end_with_parent, num_cores
from kdcache.sweep.plan import PlannedRun
from kdcache.sweep.work import Worker

#: Seconds that a worker may take to end when it is asked to.
_PATIENCE = 10


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(filter(_names_gpu, listed.splitlines()))]


def _names_gpu(line: str) -> bool:
    return line.startswith("GPU ")


@dataclass
class _Process:
    """A worker process, and what it does now."""

    process: BaseProcess
    pipe: Connection
    run: PlannedRun | None = None
    last: PlannedRun | None = None


@dataclass
class Workers:
    """So many processes; they end when its context does.

    Attributes:
        jobs: processes.
        worker: what they are copies of.
    """

    jobs: int
    worker: Worker
    _all: list[_Process | None] = field(default_factory=list)

    def __enter__(self) -> Workers:
        """Nothing is started before there is something to do."""
        self._all = [None] * self.jobs
        self._gpus = visible_gpus() if self.jobs > 1 else []
        return self

    def __exit__(self, *error: object) -> None:
        """End them, at once if they are in the midst of a run: it goes on from a checkpoint."""
        alive = [one for one in self._all if one is not None]
        for one in alive:
            if one.run is None:
                one.pipe.close()  # which it waits on
            else:
                one.process.terminate()
        for one in alive:
            one.process.join(_PATIENCE)
            if one.process.is_alive():
                one.process.kill()
                one.process.join()

    @property
    def busy(self) -> list[PlannedRun]:
        """Runs that are being done."""
        return [one.run for one in self._all if one is not None and one.run is not None]

    @property
    def idle(self) -> Iterator[int]:
        """Numbers of the workers that have nothing to do."""
        for number, one in enumerate(self._all):
            if one is None or one.run is None:
                yield number

    def last(self, number: int) -> PlannedRun | None:
        """What a worker did last."""
        one = self._all[number]
        return None if one is None else one.last

    def give(self, number: int, run: PlannedRun) -> None:
        """Have an idle worker do a run; it is started if it is not there."""
        one = self._all[number]
        if one is None:
            one = self._all[number] = self._start(number)
        one.run = one.last = run
        one.pipe.send(run)

    def ended(self, seconds: float) -> list[tuple[PlannedRun, str | None]]:
        """Runs that have ended, each with why it failed.

        Args:
            seconds: to wait for one at most.
        """
        working = [one for one in self._all if one is not None and one.run is not None]
        ready = wait([one.pipe for one in working], timeout=seconds)
        found = []
        for one in working:
            if one.pipe not in ready:
                continue
            run, one.run = one.run, None
            assert run is not None
            try:
                found.append((run, one.pipe.recv()))
            except (EOFError, OSError):
                one.process.join()
                self._all[self._all.index(one)] = None
                how = _death(one.process.exitcode)
                found.append((run, f"its process {how}; {self.worker.folder.log_path(run)}"))
        return found

    def _start(self, number: int) -> _Process:
        """A fresh process: a fork would copy locks that threads hold."""
        context = get_context("spawn")
        here, there = context.Pipe()
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else None
        threads = max(1, num_cores() // self.jobs)
        arguments = (there, self.worker, gpu, threads)
        process = context.Process(target=_serve, args=arguments)
        process.start()
        there.close()
        return _Process(process, here)


def _death(code: int | None) -> str:
    """How a process ended."""
    if code == -9:
        return "was killed (by the system where memory ran out)"
    return f"ended with {code}"


def _serve(pipe: Connection, worker: Worker, gpu: str | None, threads: int) -> None:
    """The life of a worker: runs come, one line or None goes back."""
    end_with_parent()
    # Before torch is imported, which reads both.
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdcache").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
    while True:
        try:
            run = pipe.recv()
        except (EOFError, OSError):
            return
        _redirect(worker.folder.log_path(run))
        pipe.send(attempt(worker, run))


def attempt(worker: Worker, run: PlannedRun) -> str | None:
    """Do a run; why it failed, in one line, which is noted too."""
    try:
        worker.do(run)
    except (KDCacheError, OSError) as error:
        line = one_line(error)
    except Exception as error:
        traceback.print_exc()
        line = f"{type(error).__name__}: {one_line(error)} ({worker.folder.log_path(run)})"
    else:
        return None
    print(line, file=sys.stderr, flush=True)
    worker.folder.fail(run, line)
    return line


def _redirect(log: Path) -> None:
    """Have all that this process says go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(handle, standard)
    os.close(handle)
