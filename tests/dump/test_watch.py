"""What a dump tells while it runs: the status file's fields, and its figures by brute force."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from kdcache.dump import runner, watch
from kdcache.dump.ranks import Ranks
from kdcache.dump.runner import dump
from kdcache.dump.stopping import Stopping
from kdcache.dump.watch import Watch
from kdcache.errors import StorageError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.manifest import CommitRecord, FileRecord, PartRecord
from kdcache.formats.ragged import Ragged
from kdcache.formats.stores import disk
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import STATUS
from tests.dump.world import CODECS, THRESHOLD, tree


def status_of(root: Path, name: str = "00000-of-00001.json") -> dict[str, Any]:
    return json.loads((root / STATUS / name).read_text())


class Clock:
    """A clock that stands until it is set, in place of the module."""

    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stands = Clock()
    monkeypatch.setattr(watch, "time", stands)
    return stands


def commit(shard: int, num_bytes: int, tokens: int, **entries: int) -> CommitRecord:
    xxh3 = "0" * 16
    file = FileRecord(
        path=f"logits/{shard:05d}.0-{xxh3}.arrow", bytes=num_bytes, crc32c="0" * 8, xxh3=xxh3
    )
    return CommitRecord(
        signal="logits",
        shard=shard,
        start=0,
        stop=1,
        tokens=tokens,
        entries={"tokens": tokens, **entries},
        parts=[PartRecord(start=0, stop=1, files=[file])],
    )


def test_the_status_names_its_process_and_moment(tmp_path: Path, clock: Clock) -> None:
    seen = Watch(LocalStore(tmp_path), Ranks(1, 4), Stopping())
    assert not (tmp_path / STATUS).exists()
    clock.now += 61
    seen.stage("loading", signal="logits")
    assert os.listdir(tmp_path / STATUS) == ["00001-of-00004.json"]
    assert status_of(tmp_path, "00001-of-00004.json") == {
        "state": "loading",
        "signal": "logits",
        "rank": 1,
        "world": 4,
        "host": platform.node(),
        "pid": os.getpid(),
        "began": "2001-09-09T01:46:40Z",
        "updated": "2001-09-09T01:47:41Z",
    }
    seen.stage("done", complete=True)
    found = status_of(tmp_path, "00001-of-00004.json")
    assert (found["state"], found["complete"]) == ("done", True)
    assert "signal" not in found


def test_figures_are_those_of_what_was_done(tmp_path: Path, clock: Clock) -> None:
    seen = Watch(LocalStore(tmp_path), Ranks(), Stopping())
    clock.now += 5
    with seen.signal("logits", "logits", own=6, done=2, tokens=400):
        found = status_of(tmp_path)
        assert {key: found[key] for key in ("state", "signal", "kind", "shards")} == {
            "state": "dumping",
            "signal": "logits",
            "kind": "logits",
            "shards": 6,
        }
        assert (found["shards_done"], found["tokens"], found["tokens_done"]) == (2, 400, 0)
        assert found["expected_end"] is None
        assert {"bytes_per_token", "entries_per_token", "teacher_loss"}.isdisjoint(found)
        clock.now += 10
        seen.advance(75)
        seen.advance(25)
        # 60 targets of 0 nats and 20 of 25: codes are roots of 25ths.
        seen.labels({"tokens": Ragged(np.array([0, 60]), {"gold": np.zeros(60, np.uint8)})})
        seen.labels({"tokens": Ragged(np.array([0, 20]), {"gold": np.full(20, 255, np.uint8)})})
        seen.labels({"values": Ragged(np.array([0, 20]), {"values": np.zeros(20, np.uint8)})})
        seen.committed(commit(2, 700, 80, exact=100, drawn=30), tokens=90)
        seen.committed(commit(3, 300, 20, exact=15, drawn=5), tokens=10)
        clock.now += 10
        seen.advance(0)
    found = status_of(tmp_path)
    assert (found["shards_done"], found["tokens_done"]) == (4, 100)
    assert found["tokens_per_second"] == 5.0
    # 300 tokens at 5 a second, from second 25 on.
    assert found["expected_end"] == "2001-09-09T01:48:05Z"
    assert found["bytes_per_token"] == 10.0
    assert found["entries_per_token"] == 1.5
    assert found["teacher_loss"] == 6.25


def test_the_status_is_written_now_and_then(tmp_path: Path, clock: Clock) -> None:
    seen = Watch(LocalStore(tmp_path), Ranks(), Stopping())
    with seen.signal("logits", "logits", own=1, done=0, tokens=100):
        written = []
        for _ in range(50):
            clock.now += 0.1
            seen.advance(1)
            written.append(status_of(tmp_path)["tokens_done"])
    assert sorted(set(written)) == [0, 20, 40]


class Noting(Watch):
    """A watch that keeps what it says after every commit."""

    said: ClassVar[dict[str, dict[str, Any]]] = {}

    def committed(self, record: CommitRecord, tokens: int) -> None:
        super().committed(record, tokens)
        self.said[record.signal] = {**self._status, **self._figures()}


def brute(cache: Cache, name: str, shards: list[int]) -> dict[str, float]:
    """Figures of some shards of a signal, from the cache itself."""
    stream = cache.signal(name).stream
    tokens = sum(len(cache.samples(n).streams[stream].fields["id"]) for n in shards)
    found: dict[str, float] = {"tokens": tokens, "bytes": 0.0, "entries": 0.0}
    nats: list[float] = []
    for number in shards:
        for part in cache.commit_record(name, number).parts:
            found["bytes"] += sum((Path(cache.path) / f.path).stat().st_size for f in part.files)
        if cache.signal(name).kind == "logits":
            for _, _, columns in cache.signal_shard(name, number).parts:
                codes = columns["tokens"].fields["gold"].astype(float)
                nats += (25 * (codes / 255) ** 2).tolist()
                found["entries"] += sum(
                    len(column.fields["code" if key == "exact" else "id"])
                    for key, column in columns.items()
                    if key != "tokens"
                )
    if nats:
        found["teacher_loss"] = float(np.mean(nats))
    return found


SIGNALS = {
    "logits": {"codec": THRESHOLD},
    "top": {"codec": CODECS["topk"]},
    "hidden": {"kind": "hidden", "stream": "src", "layers": [1], "values": "int8"},
}


@pytest.mark.parametrize("again", [False, True], ids=["whole", "one shard"])
def test_a_dump_says_what_its_cache_holds(
    make_recipe, tmp_path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    recipe, root = make_recipe("bart", signals=SIGNALS), tmp_path / "cache"
    monkeypatch.setattr(Noting, "said", {})
    monkeypatch.setattr(runner, "Watch", Noting)
    dump(recipe, root)
    shards = list(range(open_cache(root).num_shards))
    assert len(shards) > 2
    if again:
        for name in SIGNALS:
            (root / f"commits/{name}.00001.json").unlink()
        Noting.said.clear()
        dump(recipe, root)
    made = [1] if again else shards
    cache = open_cache(root)
    assert set(Noting.said) == set(SIGNALS)
    for name, found in Noting.said.items():
        expected = brute(cache, name, made)
        assert found["state"] == "dumping"
        assert (found["signal"], found["kind"]) == (name, cache.signal(name).kind)
        assert found["shards"] == found["shards_done"] == len(shards)
        assert found["tokens_done"] == expected["tokens"]
        # What is to come is reckoned in proportion, so that no shard need be opened for it.
        assert found["tokens"] == pytest.approx(expected["tokens"], rel=0.2 if again else 1e-9)
        assert found["bytes_per_token"] == pytest.approx(
            expected["bytes"] / expected["tokens"], abs=5e-4
        )
        if cache.signal(name).kind == "logits":
            assert found["teacher_loss"] == pytest.approx(expected["teacher_loss"], abs=5e-5)
            assert found["entries_per_token"] == pytest.approx(
                expected["entries"] / expected["tokens"], abs=5e-4
            )
        else:
            assert "teacher_loss" not in found
    last = status_of(root)
    assert (last["state"], last["complete"]) == ("done", True)


def test_states_follow_one_another(make_recipe, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []
    real = LocalStore.replace

    def replace(self: LocalStore, path: str, data: bytes) -> None:
        real(self, path, data)
        states.append(json.loads(data)["state"])

    monkeypatch.setattr(LocalStore, "replace", replace)
    dump(make_recipe(codec=THRESHOLD), tmp_path / "cache")
    assert states == ["tokenising", "loading", "dumping", "done"]


def test_a_dump_that_fails_says_so(make_recipe, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, root = make_recipe(codec=THRESHOLD), tmp_path / "cache"

    def refuse(step: str, path: Path) -> None:
        if step == "rename" and path.parent.name == "logits":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "observer", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        dump(recipe, root)
    assert status_of(root)["state"] == "failed"


def test_a_status_that_cannot_be_written_costs_no_dump(
    make_recipe, tmp_path, whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def refuse(step: str, path: Path) -> None:
        if STATUS in path.parts:
            refused.append(step)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk, "observer", refuse)
    recipe, expected = whole
    assert dump(recipe, tmp_path / "cache")["complete"]
    assert refused
    assert not (tmp_path / "cache" / STATUS).exists()
    assert tree(tmp_path / "cache") == expected


def test_ranks_have_a_status_each_and_others_shards_are_told(make_recipe, tmp_path, whole) -> None:
    recipe, expected = whole
    root = tmp_path / "cache"
    first = dump(recipe, root, ranks=Ranks(1, 3))
    assert first["complete"] is False
    assert first["signals"]["logits"]["shards_written"] == 1
    assert status_of(root, "00001-of-00003.json")["complete"] is False
    for rank in (0, 2):
        dump(recipe, root, ranks=Ranks(rank, 3))
    assert sorted(os.listdir(root / STATUS)) == [f"0000{n}-of-00003.json" for n in range(3)]
    assert status_of(root, "00002-of-00003.json")["complete"] is True
    assert tree(root) == expected
