"""Commands as processes of their own, forked by a server that has imported everything.

A `kdcache dump` takes seconds to start and a tenth of one to run. The server pays for the start
once, so that hundreds of processes can be killed. Run as a program this file is the server.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tests.dump.injection import Injection, Injector, Step

ROOT = Path(__file__).parents[2]

#: Seconds after which a command that does not end has hung.
PATIENCE = 120


@dataclass(frozen=True)
class Ended:
    """What became of a command.

    Attributes:
        code: its exit code; minus the signal that ended it.
        out: its stdout.
        err: its stderr.
        fired: whether what was to be injected happened, where the process lived to tell.
        steps: what it did on the disk, where that was asked for.
    """

    code: int
    out: str
    err: str
    fired: bool = False
    steps: tuple[Step, ...] = ()

    @property
    def messages(self) -> list[str]:
        """The lines of the command's own last words."""
        return [line for line in self.err.splitlines() if line.startswith("kdcache: ")]


class Fork:
    """One command that runs."""

    def __init__(self, server: Forks, pid: int, log: Path) -> None:
        self._server, self.pid, self._log = server, pid, log

    def send(self, number: int) -> None:
        """Send a signal; the process stays known until it is waited for."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end."""
        code = self._server.ask(wait=self.pid)["code"]
        if code is None:
            raise RuntimeError(f"it had to be killed after {PATIENCE} s: {self._log}")
        out, err = (self._log.with_suffix(end).read_text() for end in (".out", ".err"))
        journal, told = self._log.with_suffix(".journal"), {"fired": False, "steps": []}
        if journal.is_file():
            told = json.loads(journal.read_text())
        return Ended(code, out, err, told["fired"], tuple(Step(**step) for step in told["steps"]))


class Forks:
    """The server's client, used as a context manager."""

    def __init__(self, work: Path) -> None:
        """Nothing runs yet.

        Args:
            work: folder for what the commands print.
        """
        self._work, self._numbers = work, count()
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Start the server."""
        self._work.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for key in [key for key in environment if key in ("RANK", "WORLD_SIZE") or "SLURM" in key]:
            del environment[key]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.dump.forks"],
            stdin=pipe,
            stdout=pipe,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the server."""
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def warm(self, argv: Sequence[str]) -> None:
        """Run a command in the server itself, which imports what it needs."""
        told = self.ask(warm=list(argv), log=str(self._work / "warm"))
        assert told == {"code": 0, "threads": 1}, told

    def start(
        self,
        argv: Sequence[str],
        cache: Path,
        injection: Injection | None = None,
        record: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Fork:
        """Start a command.

        Args:
            argv: what follows `kdcache`.
            cache: that it writes.
            injection: what happens to it.
            record: whether to write down its steps.
            environment: variables that it has beside this process's.
        """
        log = self._work / f"{next(self._numbers):06d}"
        for end in (".out", ".err"):
            log.with_suffix(end).touch()  # it may be killed before it opens them
        watched = None if injection is None else asdict(injection)
        request = {"argv": list(argv), "cache": str(cache), "log": str(log), "record": record}
        told = self.ask(start=request, injection=watched, environment=dict(environment or {}))
        return Fork(self, told["pid"], log)

    def run(self, argv: Sequence[str], cache: Path, **options: Any) -> Ended:
        """As `start`, and wait for the end."""
        return self.start(argv, cache, **options).wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer."""
        assert self._server is not None
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of forks ended ({self._server.wait()})")
        told: dict[str, Any] = json.loads(answer)
        return told


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer until there are no more requests, then end what still runs."""
    running = set()
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": _wait(request["wait"])}
            running.discard(request["wait"])
        elif "warm" in request:
            _redirect(Path(request["log"]))
            code = _main(request["warm"])
            # A fork has its caller's thread alone; the allocator's own look after themselves.
            answer = {"code": code, "threads": threading.active_count()}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            running.add(pid)
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _wait(pid: int) -> int | None:
    """Exit code of a command; None where it had to be killed, so that nothing waits for ever."""
    late = time.monotonic() + PATIENCE
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > late:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)


def _redirect(log: Path) -> None:
    """Let stdout and stderr go to files."""
    for number, end in ((1, ".out"), (2, ".err")):
        handle = os.open(log.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, number)
        os.close(handle)


def _child(request: dict[str, Any]) -> None:
    """Be the command; never returns."""
    code = 70
    try:
        start, injection = request["start"], request["injection"]
        log = Path(start["log"])
        _redirect(log)
        os.environ.update(request["environment"])
        injector = None
        if injection is not None or start["record"]:
            if injection is not None:
                injection = Injection(**(injection | {"step": Step(**injection["step"])}))
            journal = log.with_suffix(".journal")
            injector = Injector(Path(start["cache"]), injection, journal)
        code = _main(start["argv"])
        if injector is not None:
            injector.close()
    finally:
        os._exit(code)


def _main(argv: list[str]) -> int:
    """The command's exit code, its traceback printed as the interpreter would."""
    from kdcache.cli import main

    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.fsync = os.fstat  # no power fails here
    answering = os.fdopen(os.dup(1), "w")
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread of its own, which no fork would have
    tqdm.set_lock(threading.RLock())  # its own is one for all forks, and a killed one keeps it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _serve(sys.stdin, answering)
