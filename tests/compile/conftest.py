"""A corpus of every kind of signal, made once, and caches of parts of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compile.universe import PAIRS, Universe, make_universe


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """No power fails here, and hundreds of tiny files would wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def universe(tmp_path_factory: pytest.TempPathFactory) -> Universe:
    return make_universe(tmp_path_factory.mktemp("universe"))


@pytest.fixture(scope="session")
def whole(universe: Universe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of all samples and signals; not to be changed."""
    return universe.write(tmp_path_factory.mktemp("whole") / "cache", range(len(PAIRS)))
