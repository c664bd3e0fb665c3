"""Flipped bits, cut, lengthened and exchanged files: the short form of bench_flips."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.formats.checks.verify import verify_cache
from tests.formats import damage
from tests.formats.damage import DAMAGES, Damage, World, draw_damage, make_world, run_trials

SIGNALS = ["masks", "beams", "masked_hidden", "attention", "classes", "at_masked"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("damage"), SIGNALS)


def test_every_damage_is_reported_and_no_wrong_value_is_read(world: World, tmp_path: Path) -> None:
    outcomes = list(run_trials(world, tmp_path, count=100, seed=0, workers=2))
    assert [(done, lines) for done, lines in outcomes if lines] == []
    assert sorted(done.number for done, _ in outcomes) == list(range(100))
    assert {done.name for done, _ in outcomes} == set(DAMAGES)
    assert {done.kind for done, _ in outcomes} == set(world.files)


def test_a_world_has_every_kind_of_file(world: World) -> None:
    assert list(world.files) == [
        "Zarr metadata",
        "attention (Zarr shard)",
        "beams (Arrow)",
        "classes (Arrow)",
        "commit of a signal",
        "commit of samples",
        "hidden (Zarr shard)",
        "hidden (scales)",
        "logits (Arrow)",
        "manifest",
        "masks (Arrow)",
        "samples",
        "signal record",
        "tokenizer file",
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("verify finds nothing", "verify found nothing"),
        ("verify names another file", "verify names no "),
        ("reads nothing", "a trainer gets wrong "),
        ("raises", "a trainer gets IndexError"),
    ],
)
def test_a_miss_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, message: str
) -> None:
    copy = damage.linked_copy(world.root, tmp_path / "copy")
    done = draw_damage(world, 0, 0)
    if broken.startswith("verify"):
        report = type("Report", (), {"faults": ["x"] if "another" in broken else []})
        monkeypatch.setattr(damage, "verify_cache", lambda root: report)
    elif broken == "raises":
        monkeypatch.setattr(damage, "open_cache", lambda root: [][0])
    else:
        monkeypatch.setattr(damage, "read_all", lambda root: {})
    assert any(line.startswith(message) for line in damage.try_damage(world, copy, done))
    monkeypatch.undo()
    assert verify_cache(copy).faults == []  # it was undone


def test_a_process_that_dies_is_told(world: World, tmp_path: Path) -> None:
    child = damage._Child(world, tmp_path / "copy", 0, [3, 2, 1])
    child._process.kill()
    results = []
    while child.alive:
        results.append(child.next_result())
    assert results[-1][0] == 1
    assert "the process died with exit code -9" in results[-1][1][0]


def test_damage_is_the_same_every_time(world: World) -> None:
    def drawn(number: int) -> Damage:
        return draw_damage(world, 5, number)

    assert [drawn(number) for number in range(20)] == [drawn(number) for number in range(20)]
    assert drawn(0) != drawn(1)
