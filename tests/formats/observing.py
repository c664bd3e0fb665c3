"""What the disk's observer is told, and failures that it makes."""

from __future__ import annotations

from pathlib import Path


class Observed:
    """An observer of the disk's steps that takes note of them and can let one fail.

    Attributes:
        seen: steps and paths so far, in order.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, Path]] = []
        self._step: str | None = None
        self._error: BaseException | None = None

    def __call__(self, step: str, path: Path) -> None:
        """Take note of a step, or raise in its place."""
        self.seen.append((step, path))
        if step == self._step and self._error is not None:
            error, self._error = self._error, None
            raise error

    def fail(self, step: str, error: BaseException) -> None:
        """Let the next step of that name fail, once."""
        self._step, self._error = step, error

    def steps(self, root: Path) -> list[tuple[str, str]]:
        """Steps so far with their paths below a folder."""
        return [(step, path.relative_to(root).as_posix()) for step, path in self.seen]
