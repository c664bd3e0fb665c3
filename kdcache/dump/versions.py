"""Versions of the libraries whose work a cache holds."""

from __future__ import annotations

from kdcache.versions import versions_of

LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece", "pyarrow", "numpy")


def library_versions() -> dict[str, str]:
    """Library name to version, Python's and kdcache's among them."""
    return versions_of(LIBRARIES)
