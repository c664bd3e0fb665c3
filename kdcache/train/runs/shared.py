"""Work that several runs of one process share: open caches and encoded development sets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from kdcache.formats.cache import Cache, open_cache
from kdcache.train.families.family import Development

#: Development sets that are held; runs of one sweep mostly have one and the same.
MOST_SETS = 4


class Shared:
    """What runs one after another need not do again.

    Files that were read once are taken to stay as they are for as long as this lives.
    """

    def __init__(self) -> None:
        """Nothing is done yet."""
        self._caches: dict[str, Cache] = {}
        self._sets: OrderedDict[str, Development] = OrderedDict()

    def cache(self, path: str | Path) -> Cache:
        """An open cache; its files that were checked are not checked again.

        Raises:
            FormatError: there is none.
        """
        key = str(path)
        if key not in self._caches:
            self._caches[key] = open_cache(path)
        return self._caches[key]

    def development(self, key: str, make: Callable[[], Development]) -> Development:
        """A development set.

        Args:
            key: says all that it depends on.
            make: reads and encodes it.
        """
        found = self._sets.pop(key) if key in self._sets else make()
        self._sets[key] = found
        while len(self._sets) > MOST_SETS:
            self._sets.popitem(last=False)
        return found
