"""Versions of libraries, as caches and runs write them down."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

from kdcache import __version__

_version = cache(version)  # which reads all that a package says of itself


def versions_of(libraries: Sequence[str]) -> dict[str, str]:
    """Name to version of some libraries, and of kdcache and Python."""
    found = {name: _version(name) for name in libraries}
    return {"kdcache": __version__, "python": platform.python_version(), **found}
