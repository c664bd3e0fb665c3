"""What must be true of a dump's end, and of the cache that it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.dump.forks import Ended
from tests.dump.injection import Step

#: A line that says where, what was found and what to do.
_CLEAR = re.compile(r"kdcache: (?P<where>[^:]+): cannot be written: [^;]+; \w[^\n]+")
_STOPPED = re.compile(
    r"kdcache: (?P<where>[^:]+): stopped by SIGTERM: .*; the same command (goes on|begins again)"
)
_STATUS = re.compile(r"\d{5}-of-\d{5}\.json")


@dataclass
class Problems:
    """What was found that must not be, one line each.

    Attributes:
        unequal: caches whose files are not those of the dump that nothing happened to.
        unsound: caches that `verify` finds fault with, or whose dump could not be finished.
        unclear: ends that were not told in one clear line.
        missed: injections at steps that never came.
    """

    unequal: list[str] = field(default_factory=list)
    unsound: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def __iadd__(self, other: Problems) -> Problems:
        """Those of another trial too."""
        for name, lines in vars(self).items():
            lines += getattr(other, name)
        return self

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(vars(self).values())

    def __str__(self) -> str:
        """All of them."""
        return "\n".join(f"{kind}: {line}" for kind, lines in vars(self).items() for line in lines)


def clear_refusal(ended: Ended, out: Path, step: Step | None = None) -> bool:
    """Whether a dump said in one line which file of its cache could not be written.

    Args:
        ended: the dump.
        out: the cache.
        step: that was refused, if it was one alone; the file must be of the same folder.
    """
    if ended.code != 1 or len(ended.messages) != 1 or "Traceback" in ended.err:
        return False
    match = _CLEAR.fullmatch(ended.messages[0])
    if match is None or not match["where"].startswith(str(out)):
        return False
    if step is None or step.path == ".":
        return True
    told = os.path.relpath(match["where"], out)
    return told.split("/")[0] == step.path.removeprefix(".tmp-").split("/")[0]


def clear_stop(ended: Ended, out: Path) -> bool:
    """Whether a dump that got a SIGTERM ended as it should.

    It says where it goes on, or it had not begun to write and was ended by the signal itself, or it
    was finished.
    """
    if ended.code in (0, -signal.SIGTERM):
        return not ended.messages and "Traceback" not in ended.err
    if ended.code != 128 + signal.SIGTERM or len(ended.messages) != 1:
        return False
    match = _STOPPED.match(ended.messages[0])
    return match is not None and match["where"] == str(out) and "Traceback" not in ended.err


def last_line(ended: Ended) -> str:
    """The last thing that a command said."""
    return (ended.err.strip().splitlines() or ["it said nothing"])[-1]


def files_of(root: Path) -> dict[str, bytes]:
    """Bytes of every file of a cache, and b"" for every folder, under paths relative to it.

    Status files, which are no part of it, are left out if they are what they should be, and so is
    the folder of claims if it is empty.
    """
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            found[f"{name}/"] = b""
        else:
            found[name] = path.read_bytes()
    for name, data in list(found.items()):
        folder, _, file = name.partition("/")
        if folder == ".status" and (not file or (_STATUS.fullmatch(file) and json.loads(data))):
            del found[name]
    found.pop(".locks/", None)
    return found


def step_kinds(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """Steps by their name."""
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        kinds.setdefault(step.name, []).append(step)
    return kinds
