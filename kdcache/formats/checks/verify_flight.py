"""Tasks of `verify` under way: reads and checks in threads, so many bytes in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from types import TracebackType
from typing import Any, Self, TypeVar

from kdcache.formats.plan import PART_BYTES
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import Store
from kdcache.processes import num_cores

T = TypeVar("T")

#: Bytes that may be in memory; one part more is let in where nothing could move otherwise.
MOST_BYTES = 3 * PART_BYTES

#: Reads at a time from a disk, and from a store that answers late.
LOCAL_READERS, REMOTE_READERS = 2, 8

#: More threads than that would wait for Python.
MOST_CHECKERS = 8


class Flight:
    """Two pools of threads, one that reads and one that checks, and what both may hold.

    A check may wait for reads, and for checks that were given before it: each pool works in the
    order in which it was given its tasks, so the first that is not done never waits for one that
    has not begun. Used as a context manager; leaving waits for what runs and drops the rest.

    Attributes:
        most_bytes: that may be in memory.
    """

    def __init__(self, store: Store, share: int = 1) -> None:
        """Start with no tasks.

        Args:
            store: where the cache lies.
            share: processes that share the machine.
        """
        local = isinstance(store, LocalStore)
        readers = LOCAL_READERS if local else max(2, REMOTE_READERS // share)
        checkers = max(1 if share > 1 else 2, min(MOST_CHECKERS, num_cores() // share))
        self.most_bytes = max(PART_BYTES, MOST_BYTES // share)
        self._readers = ThreadPoolExecutor(readers, "verify-read")
        self._checkers = ThreadPoolExecutor(checkers, "verify-check")
        self._most_tasks = 4 * (readers + checkers)
        self._changed = Condition()
        self._bytes = 0
        self._tasks = 0
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what runs; drop what has not begun."""
        for pool in (self._readers, self._checkers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._checkers):
            pool.shutdown(wait=True)

    def reserve(self, num_bytes: int, own: int) -> None:
        """Wait until there is room for so many bytes more, and take it.

        Args:
            num_bytes: how many.
            own: of those taken, how many stay taken until the caller goes on; no use to wait for
                them.

        Raises:
            BaseException: what a task raised.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error is not None
                    or self._bytes == own
                    or self._bytes + num_bytes <= self.most_bytes
                )
            )
            self._raise()
            self._bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self._bytes -= num_bytes
            self._changed.notify_all()

    def release_after(
        self,
        tasks: Sequence[Future[Any]],
        num_bytes: int,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        """Give bytes back as soon as some tasks are done.

        Args:
            tasks: at least one.
            num_bytes: how many.
            first: is called before.
        """
        left = len(tasks)

        def done(task: Future[Any]) -> None:
            nonlocal left
            with self._changed:
                left -= 1
                if not left:
                    first()
                    self.release(num_bytes)

        for task in tasks:
            task.add_done_callback(done)

    def read(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Give a task to the threads that read; waits while too many tasks are under way."""
        return self._submit(self._readers, task, arguments)

    def check(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Give a task to the threads that check."""
        return self._submit(self._checkers, task, arguments)

    def finish(self) -> None:
        """Wait until everything is done.

        Raises:
            BaseException: what a task raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._tasks)
            self._raise()

    def _submit(
        self, pool: ThreadPoolExecutor, task: Callable[..., T], arguments: tuple[Any, ...]
    ) -> Future[T]:
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or self._tasks < self._most_tasks
            )
            self._raise()
            self._tasks += 1
        future = pool.submit(task, *arguments)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        with self._changed:
            self._tasks -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
