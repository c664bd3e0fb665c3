"""Commands that want others before them, in waves of those that can run side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from systems.work import Command


@dataclass(frozen=True)
class Step:
    """One command of a table.

    Attributes:
        command: to run.
        needs: names of the steps that it wants before it.
    """

    command: Command
    needs: tuple[str, ...] = ()


def waves(steps: Mapping[str, Step], wanted: Iterable[str]) -> Iterator[list[Command]]:
    """What is wanted and what that needs; each wave needs those before it alone.

    Args:
        steps: by name.
        wanted: names.
    """
    left = dict.fromkeys(wanted)
    for name in (found := list(left)):
        more = [need for need in steps[name].needs if need not in left]
        left.update(dict.fromkeys(more))
        found.extend(more)
    waiting = [name for name in steps if name in left]
    done: set[str] = set()
    while waiting:
        ready = [name for name in waiting if done.issuperset(steps[name].needs)]
        assert ready, waiting  # no step needs itself
        yield [steps[name].command for name in ready]
        done.update(ready)
        waiting = [name for name in waiting if name not in done]
