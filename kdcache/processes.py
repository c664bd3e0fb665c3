"""Other processes of this machine that share out some work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_pool(
    processes: int, begin: Callable[..., None], arguments: tuple[Any, ...]
) -> ProcessPoolExecutor:
    """A pool of fresh processes, which end when this one does, however it ends.

    Args:
        processes: how many.
        begin: called once in each.
        arguments: of `begin`; they are pickled.
    """
    context = get_context("spawn")  # a fork would copy locks that threads hold
    return ProcessPoolExecutor(processes, context, _begin, (begin, arguments))


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    begin(*arguments)


def end_with_parent() -> None:
    """Have this process end when the one that started it does, and not by its keyboard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes would wait for ever for work from one that was killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
