"""How a sweep is getting on: a table that is drawn anew on a terminal, lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.report.text import number
from kdcache.sweep.folder import METRICS, read_summary
from kdcache.sweep.plan import PlannedRun, short_names, shown
from kdcache.train.runs.run import whole_lines

#: Seconds between two drawings.
_INTERVAL = 0.5
#: Bytes of the end of a run's metrics that are looked at.
_TAIL = 1 << 14


class Status:
    """Says on stderr what a sweep does.

    Args:
        out: folder of the sweep.
        runs: all of them, in order.
        done: names of those that were finished before.
    """

    def __init__(self, out: Path, runs: Sequence[PlannedRun], done: Sequence[str]) -> None:
        self._out, self._runs = out, runs
        self._states = {run.name: "done" if run.name in done else "waiting" for run in runs}
        self._live = sys.stderr.isatty()
        self._drawn = 0  # lines
        self._last = 0.0
        self._began, self._times = time.monotonic(), list[float]()
        self._starts: dict[str, float] = {}
        if done:
            self.say(f"{len(done)} of {len(runs)} runs are done already")

    def begin(self, run: PlannedRun) -> None:
        """A run has begun."""
        self._states[run.name] = "running"
        self._starts[run.name] = time.monotonic()
        if not self._live:
            self.say(f"{self._place(run)} begins: {run.label}")

    def end(self, run: PlannedRun, failure: str | None) -> None:
        """A run has ended, or failed with a line."""
        self._states[run.name] = "done" if failure is None else "failed"
        seconds = time.monotonic() - self._starts[run.name]
        self._times.append(seconds)
        if failure is not None:
            self.say(f"{self._place(run)} failed: {run.label}: {failure}")
        elif not self._live:
            loss = (read_summary(run.result_path(self._out)) or {}).get("best_dev_loss")
            more = "" if loss is None else f", dev loss {loss:.4f}"
            self.say(f"{self._place(run)} done in {seconds:.1f} s{more}: {run.label}")

    def draw(self, final: bool = False) -> None:
        """Draw the table anew, where somebody watches and it is time."""
        now = time.monotonic()
        if not self._live or (now - self._last < _INTERVAL and not final):
            return
        self._last = now
        self._erase()
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in self.lines(max(3, height - 2))]
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()
        self._drawn = len(lines)

    def lines(self, most: int) -> list[str]:
        """The table in at most so many lines: what runs, then the best, then what waits."""
        order = {"running": 0, "failed": 1, "done": 2, "waiting": 3}
        rows = [(order[self._states[run.name]], run, self._numbers(run)) for run in self._runs]
        rows.sort(key=lambda row: (row[0], row[2]["dev_loss"] is None, row[2]["dev_loss"] or 0))
        paths = list(self._runs[0].settings)
        names = short_names(paths)
        cells = [["", *(names[path] for path in paths), "step", "loss", "dev loss"]]
        for _, run, found in rows:
            step = f"{found['step']:,}/{found['total']:,}" if found["step"] else ""
            step = " ".join([*found["stage"], step]).rstrip() if step else ""
            settings = [shown(run.settings[path]) for path in paths]
            numbers = [number(found[key]) if found[key] else "" for key in ("loss", "dev_loss")]
            cells.append([self._states[run.name], *settings, step, *numbers])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
        if len(lines) > most - 1:
            lines = [*lines[: most - 2], f"... {len(lines) - most + 2} more"]
        return [*lines, self._counts()]

    def _counts(self) -> str:
        """How many runs are where, and how long it will take yet."""
        states = list(self._states.values())
        counts = {state: states.count(state) for state in ("done", "running", "failed", "waiting")}
        text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        left = counts["running"] + counts["waiting"]
        if self._times and left:
            pace = (time.monotonic() - self._began) / len(self._times)
            text += f"; about {_duration(left * pace)} left"
        return f"{len(states)} runs: {text}"

    def _numbers(self, run: PlannedRun) -> dict[str, Any]:
        """The last step, loss and lowest dev loss that a run, or its newest stage, has noted."""
        found: dict[str, Any] = {"step": None, "loss": None, "dev_loss": None}
        if self._states[run.name] == "waiting":
            return found
        path, recipe = run.run_path(self._out), run.recipe
        begun = [stage for stage in run.stages if (path / stage / METRICS).is_file()][-1:]
        for stage in begun:
            path, recipe = path / stage, recipe.stages[stage]
        found |= {"stage": begun, "total": recipe.train.max_steps}
        for line in _last_lines(path / METRICS):
            found["step"] = line["step"]
            found["loss"] = line.get("loss", found["loss"])
            dev = line.get("dev_loss")
            if dev is not None:
                found["dev_loss"] = min(dev, found["dev_loss"] or dev)
        return found

    def _place(self, run: PlannedRun) -> str:
        """Which run of how many."""
        return f"[{self._runs.index(run) + 1}/{len(self._runs)}]"

    def say(self, line: str) -> None:
        """A line that stays.

        Args:
            line: without its end.
        """
        self._erase()
        print(line, file=sys.stderr, flush=True)

    def _erase(self) -> None:
        """Take the table back."""
        if self._drawn:
            sys.stderr.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last lines of metrics that are whole."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()[1 if size > _TAIL else 0 :]
    except OSError:
        return []
    return whole_lines(lines)


def _duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
