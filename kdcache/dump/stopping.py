"""SIGTERM as a request: the work in hand is dropped or finished cleanly, then the process ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from kdcache.errors import StoppedError


class Stopping:
    """Notices SIGTERM for as long as its context lasts; a second one ends the process at once.

    Outside the main thread, where Python lets nobody handle signals, it never notices any.
    """

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self.requested = False
        self._before: object = None
        self._handling = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        """Handle the signal."""
        if self._handling:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the signal to whoever had it before."""
        if self._handling:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]

    def check(self) -> None:
        """Stop here if that was asked for.

        Raises:
            StoppedError: it was.
        """
        if self.requested:
            raise StoppedError("stopped by SIGTERM")

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
