"""A list of samples in a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kdcache.errors import RecipeError, StorageError

_ID = re.compile(r"[0-9a-fA-F]{32}")


@dataclass(frozen=True)
class IdList:
    """Samples that are listed, each once.

    Attributes:
        name: the file, for messages.
        ids: [..] of 16 bytes each.
        rows: [..] int64 corpus rows.
    """

    name: str
    ids: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        """Samples that are listed."""
        return len(self.ids) + len(self.rows)

    @property
    def digest(self) -> str:
        """32 hex digits of what is listed, whatever its order."""
        packed = np.sort(self.ids).tobytes() + np.sort(self.rows).astype("<i8").tobytes()
        return xxhash.xxh3_128_hexdigest(packed)

    @classmethod
    def read(cls, path: str | Path) -> IdList:
        """Read a file: a sample_id in 32 hex digits or the number of a corpus row on each line.

        Empty lines are passed over.

        Raises:
            RecipeError: a line is neither, or there is none.
            StorageError: it cannot be read.
        """
        ids, rows = set(), set()
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise RecipeError(f"{path}: not UTF-8, expected a sample on each line") from None
        for number, line in enumerate(lines, start=1):
            word = line.strip()
            if _ID.fullmatch(word):
                ids.add(bytes.fromhex(word))
            elif word.isascii() and word.isdigit() and len(word) < 19:
                rows.add(int(word))
            elif word:
                raise RecipeError(
                    f"{path}: line {number}: {word[:40]!r}, expected a sample_id (32 hex digits) "
                    "or the number of a corpus row"
                )
        if not ids and not rows:
            raise RecipeError(f"{path}: it lists no sample")
        packed = np.array(sorted(ids), dtype="S16")
        return cls(str(path), packed, np.array(sorted(rows), dtype=np.int64))
