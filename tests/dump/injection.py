"""Ends the process, or lets the disk refuse, at one chosen step of writing a cache."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcache.formats.stores import disk

_PID = re.compile(r"\.tmp-\d+-")
_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}


@dataclass(frozen=True, order=True)
class Step:
    """One step that a dump takes on the disk, found again in another run of the same dump.

    Attributes:
        name: of `disk.STEPS`.
        path: relative to the cache, temporary names without the number of their process; a folder
            that is made durable right after another was made in it is "MADE/..".
        turn: how many times the same was done before.
    """

    name: str
    path: str
    turn: int

    @property
    def optional(self) -> bool:
        """Whether it is about the status file, without which a dump goes on."""
        return self.path.split("/")[0] == ".status"


@dataclass(frozen=True)
class Injection:
    """What happens at a step.

    Attributes:
        step: where.
        act: "kill" ends the process, "terminate" asks it to end; the name of an errno is what
            the disk says.
        torn: half of the bytes of a write are written before it happens.
        lasting: the disk refuses all that comes later too (a full one still removes files).
    """

    step: Step
    act: str = "kill"
    torn: bool = False
    lasting: bool = False

    def __str__(self) -> str:
        """For messages."""
        extras = [word for word in ("torn", "lasting") if getattr(self, word)]
        step = self.step
        return " ".join([self.act, *extras, "at", step.name, step.path, f"({step.turn})"])


class Injector:
    """Watches the steps of this process, and acts at the chosen one."""

    def __init__(self, root: Path, injection: Injection | None, journal: Path) -> None:
        """Begin to watch.

        Args:
            root: of the cache.
            injection: what happens where; None writes down what steps there are.
            journal: where `close` writes that it happened, or the steps.
        """
        self._root, self._injection, self._journal = root, injection, journal
        self._turns: dict[tuple[str, str], int] = {}
        self._made: dict[int, str] = {}
        self._steps: list[Step] = []
        self._fired = self._tear = False
        self._lock = threading.Lock()
        disk.observer = self._observe
        disk.OutputFile.write = lambda file, data: self._write(file, data)  # type: ignore

    def close(self) -> None:
        """Say what was seen."""
        steps = [asdict(step) for step in self._steps]
        self._journal.write_text(json.dumps({"fired": self._fired, "steps": steps}))

    def _observe(self, name: str, path: Path) -> None:
        place = _PID.sub(".tmp-", os.path.relpath(path, self._root))
        made = self._made.pop(threading.get_ident(), None)
        if name == "mkdir":
            self._made[threading.get_ident()] = place
        elif name == "sync_folder" and made is not None:
            place = f"{made}/.."
        with self._lock:
            turn = self._turns.get((name, place), 0)
            self._turns[name, place] = turn + 1
            step = Step(name, place, turn)
            if self._injection is None:
                self._steps.append(step)
            elif step == self._injection.step:
                self._fired = True
                self._tear = self._injection.torn
                if not self._tear:
                    self._act()
            elif self._fired and self._injection.lasting:
                self._refuse(name)

    def _act(self) -> None:
        assert self._injection is not None
        if self._injection.act in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[self._injection.act])
            return
        self._refuse(None)

    def _refuse(self, name: str | None) -> None:
        assert self._injection is not None
        code = getattr(errno, self._injection.act)
        # What a full disk cannot do is to take more; an empty file's name may still fit.
        if name is None or code != errno.ENOSPC or name in ("mkdir", "create", "write", "fsync"):
            raise OSError(code, os.strerror(code))

    def _write(self, file: disk.OutputFile, data: Any) -> int:
        """In place of `OutputFile.write`."""
        disk.note("write", file.path)
        if self._tear:
            self._tear = False
            file._stream.write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            file._stream.flush()
            self._act()
        return file._stream.write(data)
