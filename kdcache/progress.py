"""Progress bars on stderr, silent where nobody watches."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm


def progress(
    total: int | None, description: str, unit: str = "it", silent: bool = False
) -> tqdm[NoReturn]:
    """A bar to be advanced by hand with `update`, best used in a `with` block.

    Args:
        total: units until it is done; None where that is unknown.
        description: what is going on, in a word or two.
        unit: what one step is, for the rate ("token", "file", ...).
        silent: draw nothing, since another process does.

    Returns:
        A bar that draws on stderr, and nothing where stderr is no terminal.
    """
    return tqdm(
        total=total,
        desc=description,
        unit=f" {unit}" if unit != "it" else unit,
        unit_scale=unit not in ("it", "shard", "file"),
        dynamic_ncols=True,
        smoothing=0.1,
        disable=True if silent else None,
    )
