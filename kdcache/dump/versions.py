"""Versions of the libraries whose work a cache holds."""

from __future__ import annotations

import platform
from importlib.metadata import version

from kdcache import __version__

LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece", "pyarrow", "numpy")


def library_versions() -> dict[str, str]:
    """Library name to version, Python's and kdcache's among them."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"kdcache": __version__, "python": platform.python_version(), **versions}
