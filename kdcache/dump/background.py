"""One thread that does jobs in order while the caller goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from kdcache.errors import StoppedError

#: Jobs that may wait; the caller then waits as well, so memory stays bounded.
MAX_WAITING = 4


class Background:
    """Runs jobs one after another in a thread.

    Used as a context manager. A job that raises ends the work: the error comes out of the
    caller's next `submit`, or of the end of the context. If the caller itself raises, jobs
    that have not begun are dropped; where it was asked to stop they are done.
    """

    def __init__(self, name: str) -> None:
        """Name the thread; it starts when the context is entered."""
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(MAX_WAITING)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def submit(self, job: Callable[[], object]) -> None:
        """Queue a job; raise what an earlier one raised."""
        self._raise()
        self._jobs.put(job)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the thread; raise what a job raised, unless the caller already raises."""
        self._dropping = kind is not None and not issubclass(kind, StoppedError)
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._error is not None or self._dropping:
                continue
            try:
                job()
            except BaseException as error:
                self._error = error
