"""kdcache: run the teacher once; train students for ever after.

`kdcache.open_cache(path)` opens a cache for reading, `kdcache.batches(cache, ...)` streams it to a
loop of one's own, `kdcache.losses` holds the losses as plain functions, and `kdcache.hf` puts both
into transformers' Trainer. The command line is `kdcache --help`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache import hf as hf
    from kdcache import losses as losses
    from kdcache.formats.cache import open_cache as open_cache
    from kdcache.train.batches.batches import batches as batches

__all__ = ["__version__", "batches", "hf", "losses", "open_cache"]

__version__ = "0.1.0"

#: Where each name of the package is kept.
_HOMES = {"open_cache": "kdcache.formats.cache", "batches": "kdcache.train.batches.batches"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for, so that `kdcache --help` starts at once."""
    if name in ("losses", "hf"):
        return import_module(f"kdcache.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
