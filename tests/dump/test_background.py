"""The writer's thread: jobs in order, errors that come out, and what becomes of jobs at an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from kdcache.dump.background import Background
from kdcache.errors import StoppedError


def test_jobs_are_done_in_order_in_another_thread() -> None:
    done: list[tuple[int, str]] = []
    with Background("writer") as background:
        for number in range(20):
            background.submit(lambda n=number: done.append((n, threading.current_thread().name)))
    assert done == [(number, "writer") for number in range(20)]


def work_after(fail: Callable[[], object], done: list[int]) -> None:
    """Queue a job that fails, and more than can wait."""
    with Background("writer") as background:
        background.submit(fail)
        for number in range(100):
            background.submit(lambda n=number: done.append(n))


def test_an_error_of_a_job_comes_out_and_ends_the_work() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("of a job")

    with pytest.raises(ValueError, match="of a job"):
        work_after(fail, done)
    assert done == []


def leave(done: list[int], error: BaseException) -> None:
    """Leave by an error while the first of three jobs is at work."""
    begun = threading.Event()
    background = Background("writer")

    def first() -> None:
        begun.set()
        while background._jobs.qsize() < 3:  # the other two, and the end
            time.sleep(0.001)
        done.append(0)

    with background:
        background.submit(first)
        assert begun.wait(timeout=60)
        for number in (1, 2):
            background.submit(lambda n=number: done.append(n))
        raise error


@pytest.mark.parametrize(
    ("error", "expected"),
    [(StoppedError("stopped by SIGTERM"), [0, 1, 2]), (RuntimeError("teacher died"), [0])],
    ids=["stopped", "failed"],
)
def test_what_is_queued_is_done_after_a_stop_and_dropped_after_an_error(
    error: BaseException, expected: list[int]
) -> None:
    done: list[int] = []
    with pytest.raises(type(error), match=str(error)):
        leave(done, error)
    assert done == expected
