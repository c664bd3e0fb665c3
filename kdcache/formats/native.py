"""Compiled code: `native.c`, where it was built; without it numpy does the same.

`python -m kdcache.formats.native` builds it in place, as an installation does where there is a
compiler. The library's name has the digest of its source, so that one of another version is not
loaded. This module needs nothing but Python, for it runs before anything is installed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
#: What the C compiler is called, unless the environment's CC says otherwise.
COMPILERS = ("cc", "gcc", "clang")
#: Environment variable that leaves the library alone, to see what it brings.
OFF = "KDCACHE_NO_COMPILED"
FLAGS = ("-O3", "-std=c99", "-shared", "-fPIC")


class NotBuilt(Exception):
    """No compiler, or one that cannot."""


def library_path(folder: Path = SOURCE.parent) -> Path:
    """Where the library of this source is.

    Args:
        folder: of the library; the package's own by default.
    """
    digest = hashlib.blake2b(SOURCE.read_bytes(), digest_size=6).hexdigest()
    return folder / f"native-{digest}.library"  # Python would take a name in .so for a module


def build(folder: Path = SOURCE.parent) -> Path:
    """Compile the library, and say where it is.

    Args:
        folder: to put it in; the package's own by default.

    Raises:
        NotBuilt: nothing could compile it.
    """
    path = library_path(folder)
    partial = path.with_suffix(f".{os.getpid()}")
    faults = []
    for compiler in (os.environ["CC"],) if os.environ.get("CC") else COMPILERS:
        command = [*compiler.split(), *FLAGS, "-o", str(partial), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            faults.append(f"{compiler}: {(getattr(error, 'stderr', '') or str(error)).strip()}")
            continue
        partial.replace(path)
        return path
    raise NotBuilt("; ".join(faults))


def load(path: Path) -> ctypes.CDLL | None:
    """A library that was built.

    Args:
        path: from `build`.

    Returns:
        It; None where there is none, or one for another machine.
    """
    try:
        found = ctypes.CDLL(str(path)) if path.exists() else None
    except OSError:
        return None
    if found is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        found.kdcache_find.argtypes = [
            *(pointer, number, pointer, number, pointer, number, pointer, number),
            *(pointer, pointer, pointer, pointer),
        ]
        found.kdcache_copy.argtypes = [
            *(pointer, number, number),
            *(pointer, pointer, pointer, pointer, pointer),
        ]
        found.kdcache_rows.argtypes = [pointer, number, number, pointer, number, pointer]
        found.kdcache_sums.argtypes = [
            *(pointer, number, number),
            *(pointer, number, pointer, pointer),
        ]
        found.kdcache_widths.argtypes = [pointer, number, pointer, pointer]
        found.kdcache_widths.restype = number
        found.kdcache_pad.argtypes = [
            *(pointer, number, pointer, pointer, pointer, number, pointer),
            *(pointer, number, pointer, pointer),
        ]
        found.kdcache_permute.argtypes = [number, number, pointer, pointer]
        found.kdcache_fill.argtypes = [
            *(pointer, number, pointer, number, number, number, number),
            *(pointer, pointer, pointer, pointer, pointer, pointer),
        ]
        found.kdcache_fill.restype = number
        found.kdcache_permute.restype = None
    return found


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library of this installation; None where it was not built, or is not wanted."""
    return None if os.environ.get(OFF) else load(library_path())


if __name__ == "__main__":
    try:
        print(f"built {build().name}")
    except NotBuilt as error:
        sys.exit(f"not built, numpy does its work: {error}")
