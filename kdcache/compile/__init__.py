"""Caches to a cache, without a teacher: merge, mix, select, choose targets, re-encode, reshard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.compile.compiler import compile_caches
    from kdcache.compile.options import CompileOptions

__all__ = ["CompileOptions", "compile_caches"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line's arguments cost nothing."""
    if name == "compile_caches":
        from kdcache.compile.compiler import compile_caches

        return compile_caches
    if name == "CompileOptions":
        from kdcache.compile.options import CompileOptions

        return CompileOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
