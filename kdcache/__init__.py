"""kdcache: run the teacher once; train students for ever after.

`kdcache.open_cache(path)` opens a cache for reading. The command line is `kdcache --help`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.formats.cache import open_cache as open_cache

__all__ = ["__version__", "open_cache"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the reader when it is first asked for, so that `kdcache --help` starts at once."""
    if name == "open_cache":
        from kdcache.formats.cache import open_cache

        return open_cache
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
