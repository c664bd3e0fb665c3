"""SIGTERM: the dump ends in one line where nothing is lost, and the same command goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache.dump.runner import dump
from kdcache.dump.stopping import Stopping
from kdcache.dump.teachers import in_turn
from kdcache.dump.teachers.loading import load_teacher
from kdcache.errors import StoppedError
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.stores.store import STATUS
from kdcache.formats.writer import CacheWriter
from kdcache.recipe import dump_recipe
from tests.dump.forks import Ended, Forks
from tests.dump.injection import Injection, Step
from tests.dump.world import tree


def test_a_first_request_is_noticed_and_a_second_would_end_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping:
        stopping.check()
        assert not stopping.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.requested
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            stopping.check()
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_signal_is_given_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="teacher died"), Stopping():
        raise RuntimeError("teacher died")
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_the_signal_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def work() -> None:
        with Stopping() as stopping:
            found.append(signal.getsignal(signal.SIGTERM))
            stopping.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_while_the_teacher_loads_it_is_noticed_before_anything_is_written(
    make_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return load_teacher(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(in_turn, "load_teacher", load)
    out = tmp_path / "cache"
    recipe = make_recipe(codec={"name": "full"})
    with pytest.raises(StoppedError, match="stopped by SIGTERM: nothing was written yet; the same"):
        dump(recipe, out)
    assert not out.exists()
    monkeypatch.undo()
    assert dump(recipe, out)["complete"]


class Dumps:
    """The dump of `whole`, by the command itself, in processes of their own."""

    def __init__(self, root: Path, forks: Forks, recipe: Path) -> None:
        self._root, self._forks, self._recipe = root, forks, recipe

    def command(self, out: Path) -> list[str]:
        """What follows `kdcache`."""
        return ["dump", str(self._recipe), "--out", str(out), "--json"]

    def run(self, out: Path, step: Step | None = None) -> Ended:
        """Dump, and send SIGTERM at a step."""
        injection = None if step is None else Injection(step, "terminate")
        return self._forks.run(self.command(out), out, injection=injection)


@pytest.fixture(scope="module")
def dumps(whole, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dumps]:
    """Runs the recipe of `whole`."""
    root = tmp_path_factory.mktemp("stopping")
    (root / "recipe.yaml").write_text(dump_recipe(whole[0]))
    with Forks(root / "work") as forks:
        made = Dumps(root, forks, root / "recipe.yaml")
        forks.warm(made.command(root / "warm"))
        assert tree(root / "warm") == whole[1]
        yield made


def last_line(ended: Ended) -> str:
    """The only line in which the command says how it ended."""
    assert "Traceback" not in ended.err
    (line,) = ended.messages
    return line


SHARDS = 4


@pytest.mark.parametrize(
    ("step", "least", "most"),
    [
        (Step("create", ".locks/logits.00000", 0), 0, 0),
        (Step("create", "logits/.tmp-00000.0.arrow", 0), 0, 2),
        (Step("create", "logits/.tmp-00001.0.arrow", 0), 1, 3),
        (Step("link", "commits/logits.00001.json", 0), 1, 3),
    ],
    ids=str,
)
def test_a_stopped_dump_says_where_it_goes_on(
    dumps: Dumps, whole, tmp_path: Path, step: Step, least: int, most: int
) -> None:
    root = tmp_path / "cache"
    ended = dumps.run(root, step)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.out == ""
    found = re.fullmatch(
        rf"kdcache: {root}: stopped by SIGTERM: (\d) of {SHARDS} shards of 'logits' are "
        r"committed; the same command goes on from there",
        last_line(ended),
    )
    assert found is not None
    with CacheWriter(root) as writer:
        committed = writer.committed("logits")
    # What its thread had in hand was finished, what the teacher had in hand dropped.
    assert committed == set(range(int(found[1])))
    assert least <= len(committed) <= most
    half = tree(root)
    assert {name: whole[1].get(name) for name in half} == half
    assert not [name for name in half if name.startswith(".locks") or ".tmp-" in name]
    report = verify_cache(root)
    assert report.faults == report.leftovers == []
    status = json.loads((root / STATUS / "00000-of-00001.json").read_text())
    assert status["state"] == "stopped"
    again = dumps.run(root)
    assert again.code == 0
    assert json.loads(again.out)["signals"]["logits"]["shards_skipped"] == len(committed)
    assert tree(root) == whole[1]


@pytest.mark.parametrize(
    "step",
    [Step("create", ".locks/samples", 0), Step("create", "samples/.tmp-00000.0.arrow", 0)],
    ids=str,
)
def test_a_dump_that_is_stopped_before_its_samples_leaves_nothing(
    dumps: Dumps, whole, tmp_path: Path, step: Step
) -> None:
    root = tmp_path / "cache"
    ended = dumps.run(root, step)
    assert ended.code == 128 + signal.SIGTERM
    assert last_line(ended) == (
        f"kdcache: {root}: stopped by SIGTERM: no samples are committed yet; the same command "
        "begins again"
    )
    assert not root.exists()
    assert dumps.run(root).code == 0
    assert tree(root) == whole[1]


def test_a_dump_that_has_nothing_left_to_do_ends_as_always(
    dumps: Dumps, whole, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    ended = dumps.run(root, Step("link", f"commits/logits.0000{SHARDS - 1}.json", 0))
    assert ended.code == 0
    assert json.loads(ended.out)["complete"]
    assert tree(root) == whole[1]


def test_a_dump_that_waits_for_another_can_be_stopped(dumps: Dumps, whole, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with CacheWriter(root) as writer, writer.claimed("samples"):
        waits = Step("rename", f"{STATUS}/00000-of-00001.json", 0)
        ended = dumps.run(root, waits)
        assert ended.code == 128 + signal.SIGTERM
        assert "no samples are committed yet" in last_line(ended)
        assert os.listdir(root / ".locks") == ["samples"]
