"""Build hook: compile `kdcache/formats/native.c` into the wheel, where there is a compiler.

Without one the wheel is pure Python, and numpy does the same work.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

NATIVE = "kdcache/formats/native.py"


class NativeHook(BuildHookInterface):
    """Compiles in place and adds the library to what is packed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before anything is packed."""
        native = runpy.run_path(str(Path(self.root, NATIVE)))
        try:
            path = native["build"]()
        except native["NotBuilt"] as error:
            self.app.display_warning(f"{NATIVE}: not built, numpy does its work: {error}")
            return
        build_data["artifacts"].append(path.relative_to(self.root).as_posix())
        build_data["pure_python"] = False
        # It calls nothing of Python's, so any version will do.
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"
