"""Commands that want others before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

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


def ordered(steps: Mapping[str, Step], wanted: Iterable[str]) -> list[Command]:
    """What is wanted and what that needs, each behind those that it needs, in the steps' order.

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
    done: dict[str, Command] = {}
    while waiting:
        ready = [name for name in waiting if done.keys() >= set(steps[name].needs)]
        assert ready, waiting  # no step needs itself
        for name in ready:
            after = tuple(done[need] for need in steps[name].needs)
            done[name] = replace(steps[name].command, after=after)
        waiting = [name for name in waiting if name not in done]
    return list(done.values())
