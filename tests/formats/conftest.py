"""A cache of every kind, made once: tests that change it take a copy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.formats.stores import disk
from tests.formats.kinds import Kinds, make_kinds
from tests.formats.observing import Observed


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """A cache with signals of every kind; not to be changed."""
    return make_kinds(tmp_path_factory.mktemp("kinds") / "cache")


@pytest.fixture(scope="session")
def int8_kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    """A cache whose only signal is hidden_int8; not to be changed."""
    return make_kinds(tmp_path_factory.mktemp("int8") / "cache", only=["hidden_int8"])


@pytest.fixture
def own_kinds(kinds: Kinds, tmp_path: Path) -> Kinds:
    """A copy of `kinds` that may be changed."""
    return copied(kinds, tmp_path / "cache")


@pytest.fixture
def own_int8(int8_kinds: Kinds, tmp_path: Path) -> Path:
    """A copy of `int8_kinds` that may be changed."""
    return copied(int8_kinds, tmp_path / "cache").root


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Observed:
    """The observer of the disk's steps, set for one test."""
    observer = Observed()
    monkeypatch.setattr(disk, "observer", observer)
    return observer


def copied(kinds: Kinds, root: Path) -> Kinds:
    shutil.copytree(kinds.root, root)
    return replace(kinds, root=root)
