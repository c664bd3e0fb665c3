"""TensorBoard: the numbers of metrics.jsonl as curves, in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError

FOLDER = "tensorboard"


def check_installed() -> None:
    """Refuse a run that could not log, before it begins.

    Raises:
        RecipeError: the package is missing.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise RecipeError(
            "train.log is tensorboard, which is not installed; "
            'pip install "kdcache[tensorboard]", or set train.log null'
        ) from None


class Board:
    """Writes the lines of a run's metrics.

    Args:
        run: the run directory.
        step: last step that stands; what an earlier process logged after it is hidden.
    """

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add one line of metrics; its numbers get the names that they have there."""
        for name, value in _scalars(line, ()):
            if name != "step":
                self._writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()


def _scalars(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Numbers of a tree with their keys joined by slashes, which make groups of curves."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, (*path, key))
        elif isinstance(value, int | float):
            yield "/".join((*path, key)), float(value)
