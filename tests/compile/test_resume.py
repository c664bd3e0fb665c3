"""A compilation that is stopped anywhere goes on, to the same bytes."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kdcache.cli import main
from kdcache.compile import CompileOptions, compile_caches
from kdcache.errors import IdentityError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.stores import disk
from tests.compile.universe import LOGITS, contents

NAMES = [LOGITS, "masks", "at_masked", "hidden_int8"]
OPTIONS = CompileOptions(
    filters=["tgt.length > 2"],
    codecs={LOGITS: {"name": "threshold", "c": 0.5}},
    rename={LOGITS: "small"},
    shard_tokens=12,
)


#: The same on the command line.
WORDS = ["--filter", "tgt.length > 2", "--codec", f"{LOGITS}={{name: threshold, c: 1/2}}"]
WORDS += ["--rename", f"{LOGITS}=small", "--shard-tokens", "12"]

#: Ends the process, without a word to anybody, right before one of its steps at the disk.
KILL = """
import os, sys
from kdcache.formats.stores import disk
left = [int(sys.argv[1])]
def die(step, path):
    left[0] -= 1
    if left[0] < 0:
        os._exit(9)
disk.observer = die
from kdcache.cli import main
sys.exit(main(sys.argv[2:]))
"""


class Stopped(BaseException):
    """Like an interrupt: nothing catches it, everything is left through its `finally`."""


@pytest.fixture(scope="module")
def sources(universe, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    return [
        universe.write(root / "a", [0, 1, 2, 3, 4, 6], NAMES),
        universe.write(root / "b", [4, 7, 1, 9, 10, 11], NAMES),
    ]


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("finished") / "out"
    compile_caches(sources, out, OPTIONS)
    assert verify_cache(out).faults == []
    assert len(open_cache(out).manifest.shards) > 2
    return files(out)


def files(root: Path) -> dict[str, bytes]:
    """Path to bytes of everything that is part of the format."""
    paths = [path for path in root.rglob("*") if path.is_file()]
    named = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    return {path: data for path, data in named.items() if not path.startswith(".locks/")}


def steps_of(sources, out, monkeypatch) -> int:
    """Steps at the disk of a whole compilation."""
    steps: list[str] = []
    monkeypatch.setattr(disk, "observer", lambda step, path: steps.append(step))
    compile_caches(sources, out, OPTIONS)
    monkeypatch.setattr(disk, "observer", None)
    return len(steps)


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(sources, finished, tmp_path, monkeypatch):
    total = steps_of(sources, tmp_path / "count", monkeypatch)
    for number in range(0, total, total // 12):
        out, left = tmp_path / f"out{number}", [number]

        def die(step, path, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Stopped

        monkeypatch.setattr(disk, "observer", die)
        with pytest.raises(Stopped):
            compile_caches(sources, out, OPTIONS)
        monkeypatch.setattr(disk, "observer", None)
        compile_caches(sources, out, OPTIONS)
        assert files(out) == finished, number


@pytest.mark.parametrize("share", [0.35, 0.8])
def test_killed_it_goes_on_to_the_same_bytes(sources, finished, tmp_path, monkeypatch, share):
    number = int(share * steps_of(sources, tmp_path / "count", monkeypatch))
    words = ["compile", *map(str, sources), "--out", str(tmp_path / "out"), *WORDS]
    command = [sys.executable, "-c", KILL, str(number), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert main(words) == 0
    assert files(tmp_path / "out") == finished


def test_what_is_committed_is_not_written_again(sources, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    compile_caches(sources, out, OPTIONS)
    written = []
    monkeypatch.setattr(disk, "observer", lambda step, path: written.append((step, path.name)))
    summary = compile_caches(sources, out, OPTIONS)
    assert [name for step, name in written if step in ("rename", "link")] == []
    shards = len(open_cache(out).manifest.shards)
    counts = {(s["shards_written"], s["shards_skipped"]) for s in summary["signals"].values()}
    assert counts == {(0, shards)}


def test_a_full_disk_is_told_and_waited_for(sources, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(step, path):
        if step == "write" and "hidden_int8" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "observer", full)
    with pytest.raises(StorageError, match="the disk is full"):
        compile_caches(sources, out, OPTIONS)
    monkeypatch.setattr(disk, "observer", None)
    compile_caches(sources, out, OPTIONS)
    assert files(out) == finished


def test_moved_caches_are_the_same(sources, finished, tmp_path):
    out = tmp_path / "out"
    compile_caches(sources, out, OPTIONS)
    (tmp_path / "moved").symlink_to(sources[0])
    compile_caches([tmp_path / "moved", sources[1]], out, OPTIONS)
    assert files(out) == finished


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"filters": ["tgt.length > 1"]}, r"operations.1.condition: 'tgt.length > 2' in the cache"),
        ({"shard_tokens": 13}, "shard_tokens: 12 in the cache, 13 given"),
        ({"rename": {LOGITS: "other"}}, "to: 'small' in the cache, 'other' given"),
        ({"codecs": {LOGITS: {"name": "threshold", "c": 0.25}}}, "codec.c: 0.5 in the cache"),
    ],
    ids=["filter", "shards", "rename", "codec"],
)
def test_another_compilation_is_refused(sources, finished, tmp_path, other, message):
    out = tmp_path / "out"
    compile_caches(sources, out, OPTIONS)
    with pytest.raises(IdentityError, match=message) as caught:
        compile_caches(sources, out, CompileOptions(**{**vars(OPTIONS), **other}))
    assert "\n" not in str(caught.value)
    with pytest.raises(IdentityError, match=r"sources\.0\.corpus: "):
        compile_caches(sources[::-1], out, OPTIONS)
    assert files(out) == finished


def test_caches_with_other_labels_are_another_compilation(universe, tmp_path):
    out, options = tmp_path / "out", CompileOptions(signals=["classes"])
    a = universe.write(tmp_path / "a", [0, 1], ["classes"])
    b = universe.replaced("classes", 1, 9).write(tmp_path / "b", [0, 1], ["classes"])
    compile_caches([a], out, options)
    with pytest.raises(IdentityError, match=r"sources\.0\.signals\.classes: "):
        compile_caches([b], out, options)


def test_another_compilation_is_refused_before_the_manifest_stands(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def die(step, path):
        if step == "link" and path.name == "kdcache.json":
            raise Stopped

    monkeypatch.setattr(disk, "observer", die)
    with pytest.raises(Stopped):
        compile_caches(sources, out, OPTIONS)
    monkeypatch.setattr(disk, "observer", None)
    before = files(out)
    for other in ([sources[1], sources[0]], [sources[0]]):
        with pytest.raises(IdentityError, match="samples shard"):
            compile_caches(other, out, OPTIONS)
    assert {k: v for k, v in files(out).items() if "commits" in k} == {
        k: v for k, v in before.items() if "commits" in k
    }


def test_a_dumped_cache_is_no_output(sources, universe, tmp_path):
    out = universe.write(tmp_path / "out", [0, 1], [])
    with pytest.raises(IdentityError, match="it holds a dumped cache; choose another output"):
        compile_caches(sources, out, OPTIONS)


def test_several_processes_share_the_work(sources, finished, tmp_path):
    """Threads have claims of their own, as processes have."""
    out, summaries = tmp_path / "out", []
    threads = [
        threading.Thread(target=lambda: summaries.append(compile_caches(sources, out, OPTIONS)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(summaries) == 3
    assert files(out) == finished
    assert contents(out)
    for name in summaries[0]["signals"]:
        written = [summary["signals"][name]["shards_written"] for summary in summaries]
        assert sum(written) == len(open_cache(out).manifest.shards)
