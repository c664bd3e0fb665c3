"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.formats.labels import make_cache


@pytest.fixture
def tiny_cache(tmp_path: Path) -> Path:
    """A whole cache of 8 samples in 3 shards with a hand-made threshold signal "logits"."""
    return make_cache(tmp_path / "cache")
