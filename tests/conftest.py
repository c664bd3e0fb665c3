"""Fixtures that every test may use."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.formats.labels import make_cache

# Before torch is imported, here and in child processes: on tiny tensors threads cost time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples everywhere, and no clock.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is imported stays: the collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """No power fails here, and thousands of tiny files would wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which minds whether the descriptor is open
        yield


@pytest.fixture
def tiny_cache(tmp_path: Path) -> Path:
    """A whole cache of 8 samples in 3 shards with a hand-made threshold signal "logits"."""
    return make_cache(tmp_path / "cache")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The compiled code, built for these tests."""
    from kdcache.formats import native

    try:
        path = native.build(tmp_path_factory.mktemp("native"))
    except native.NotBuilt as error:
        pytest.skip(f"no compiler: {error}")
    found = native.load(path)
    assert found is not None
    return found


@pytest.fixture(params=["numpy", "compiled"])
def copying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL | None:
    """Makes batches be planned and copied by numpy, then by compiled code (None for numpy)."""
    from kdcache.formats import joined, keyed, rows
    from kdcache.train.batches import order

    found = request.getfixturevalue("compiled") if request.param == "compiled" else None
    for module in (joined, keyed, order, rows):
        monkeypatch.setattr(module, "library", lambda: found)
    return found
