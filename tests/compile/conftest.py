"""A corpus of every kind of signal, made once, and caches of parts of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compile.universe import PAIRS, Universe, make_universe


@pytest.fixture(scope="session")
def universe(tmp_path_factory: pytest.TempPathFactory) -> Universe:
    return make_universe(tmp_path_factory.mktemp("universe"))


@pytest.fixture(scope="session")
def whole(universe: Universe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of all samples and signals; not to be changed."""
    return universe.write(tmp_path_factory.mktemp("whole") / "cache", range(len(PAIRS)))
