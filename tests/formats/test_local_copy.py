"""The local copy: what is fetched, checked, shared between processes and evicted."""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores import local_copy
from kdcache.formats.stores.local_copy import DEFAULT_BYTES, LocalCopy, parse_bytes

URL = "s3://bucket/cache"
GB = 10**9


def content(number: int, size: int = 1000) -> bytes:
    return random.Random(number).randbytes(size)


def record(number: int, size: int = 1000, path: str | None = None) -> FileRecord:
    return digest_bytes(content(number, size), path or f"logits/{number:05d}.0-x.arrow")


class Fetcher:
    """Fetches made-up contents and counts."""

    def __init__(self, size: int = 1000) -> None:
        self.size, self.fetched = size, []

    def of(self, number: int) -> Callable:
        def fetch(stream):
            self.fetched.append(number)
            data = content(number, self.size)
            stream.write(data[:300])
            stream.write(memoryview(data)[300:])

        return fetch


def read(copy: LocalCopy, file: FileRecord, fetch: Callable) -> bytes:
    with copy.ensure(file, fetch) as handle:
        return handle.read()


def never(stream) -> None:
    raise AssertionError("fetched although it is here")


def files_in(folder: Path) -> dict[str, int]:
    """Size of every file but the lock, by its path in the folder."""
    sizes = {}
    for file in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # what is on its way may go meanwhile
            if file.is_file() and file.name != ".lock":
                sizes[str(file.relative_to(folder))] = file.stat().st_size
    return sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("200GB", 200 * GB),
        ("200 gb", 200 * GB),
        ("1.5T", 15 * 10**11),
        ("2KiB", 2048),
        ("3mi", 3 << 20),
        ("12B", 12),
    ],
)
def test_sizes_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1PB", "1GBs", "1e9", "ten"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="write one like 200GB"):
        parse_bytes(text)


def test_a_file_is_fetched_once_and_lies_under_its_path(tmp_path):
    copy, fetcher = LocalCopy(tmp_path, 10_000, URL), Fetcher()
    for _ in range(3):
        assert read(copy, record(1), fetcher.of(1)) == content(1)
    again = LocalCopy(tmp_path, 10_000, URL)
    assert read(again, record(1), never) == content(1)
    assert fetcher.fetched == [1]
    assert files_in(tmp_path) == {f"{copy.root.name}/logits/00001.0-x.arrow": 1000}


def test_caches_of_two_urls_lie_apart(tmp_path):
    here, there = LocalCopy(tmp_path, 10_000, URL), LocalCopy(tmp_path, 10_000, URL + "2")
    one, two = record(1, path="a/b"), record(2, path="a/b")
    fetcher = Fetcher()
    for _ in range(2):
        assert read(here, one, fetcher.of(1)) == content(1)
        assert read(there, two, fetcher.of(2)) == content(2)
    assert fetcher.fetched == [1, 2]


def test_another_content_under_the_same_path_is_fetched_anew(tmp_path):
    copy, fetcher = LocalCopy(tmp_path, 10_000, URL), Fetcher()
    for number in (1, 2, 1):
        assert read(copy, record(number, path="a/b"), fetcher.of(number)) == content(number)
    assert fetcher.fetched == [1, 2, 1]


def test_a_cache_that_another_process_met_anew_is_noticed(tmp_path):
    """A tokenizer's file has the same name and size in another cache at the same place."""
    one, two = LocalCopy(tmp_path, 10_000, URL), LocalCopy(tmp_path, 10_000, URL)
    for copy, number in ((one, 1), (two, 2), (one, 1), (two, 2), (two, 1), (one, 2)):
        file = record(number, path="tokenizers/teacher/tokens.json")
        assert read(copy, file, Fetcher().of(number)) == content(number)


@pytest.mark.parametrize("damage", ["flip", "cut", "grow"])
def test_a_copy_that_changed_on_the_disk_is_fetched_again(tmp_path, damage):
    fetcher = Fetcher()
    read(LocalCopy(tmp_path, 10_000, URL), record(1), fetcher.of(1))
    (path,) = tmp_path.rglob("*.arrow")
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(
        {"flip": bytes(data), "cut": content(1)[:-1], "grow": content(1) + b"x"}[damage]
    )
    assert read(LocalCopy(tmp_path, 10_000, URL), record(1), fetcher.of(1)) == content(1)
    assert fetcher.fetched == [1, 1]


@pytest.mark.parametrize("size", [0, 999, 1001])
def test_another_length_is_noticed_at_every_use(tmp_path, size):
    """A file that is cut under a map would end the process."""
    copy, fetcher = LocalCopy(tmp_path, 10_000, URL), Fetcher()
    read(copy, record(1), fetcher.of(1))
    (path,) = tmp_path.rglob("*.arrow")
    os.truncate(path, size)
    assert read(copy, record(1), fetcher.of(1)) == content(1)
    assert fetcher.fetched == [1, 1]


def wrong_contents() -> dict[str, tuple[FileRecord, bytes, str]]:
    right = content(1)
    flipped = bytes([right[0] ^ 1]) + right[1:]
    other = digest_bytes(flipped, "x")
    return {
        "flipped": (record(1), flipped, f"xxh3 {other.xxh3}, expected {record(1).xxh3}"),
        "cut": (record(1), right[:-1], "999 bytes, expected 1000"),
        "empty": (record(1), b"", "0 bytes, expected 1000"),
        "long": (record(1), right + b"x", "more than the 1000 bytes expected"),
        "crc32c alone": (
            record(1).model_copy(update={"crc32c": other.crc32c}),
            right,
            f"crc32c {record(1).crc32c}, expected {other.crc32c}",
        ),
    }


@pytest.mark.parametrize("name", wrong_contents())
def test_wrong_bytes_are_fetched_again_and_then_refused(tmp_path, name):
    file, data, fault = wrong_contents()[name]
    copy, fetched = LocalCopy(tmp_path, 10_000, URL), []

    def fetch(stream):
        fetched.append(1)
        stream.write(data)

    with pytest.raises(IntegrityError) as caught:
        copy.ensure(file, fetch)
    assert str(caught.value).startswith(f"{URL}/{file.path}: {fault}, 3 times fetched; ")
    assert len(fetched) == 3
    assert not files_in(tmp_path)


@pytest.mark.parametrize("name", sorted(set(wrong_contents()) - {"crc32c alone"}))
def test_the_third_fetch_may_be_right(tmp_path, name):
    _, data, _ = wrong_contents()[name]
    contents = [data, data, content(1)]
    copy = LocalCopy(tmp_path, 10_000, URL)
    assert read(copy, record(1), lambda stream: stream.write(contents.pop(0))) == content(1)


def test_a_fetch_that_fails_leaves_nothing(tmp_path):
    def fetch(stream):
        stream.write(b"half")
        raise StorageError("the store is gone")

    with pytest.raises(StorageError, match="the store is gone"):
        LocalCopy(tmp_path, 10_000, URL).ensure(record(1), fetch)
    assert not files_in(tmp_path)


def test_the_least_recently_used_go_first(tmp_path):
    """Against a model: a dict in order of use."""
    draw, bound = random.Random(3), 5000
    copy, model = LocalCopy(tmp_path, bound, URL), OrderedDict[int, int]()
    for _ in range(200):
        number = draw.randrange(12)
        size = 500 + 100 * number
        fetcher = Fetcher(size)
        assert read(copy, record(number, size), fetcher.of(number)) == content(number, size)
        assert bool(fetcher.fetched) == (number not in model)
        model[number] = size
        model.move_to_end(number)
        while sum(model.values()) > bound:
            model.popitem(last=False)
        here = {int(path.split("/")[-1][:5]) for path in files_in(tmp_path)}
        assert here == set(model)


def test_a_handle_survives_eviction(tmp_path):
    copy, fetcher = LocalCopy(tmp_path, 1500, URL), Fetcher()
    with copy.ensure(record(1), fetcher.of(1)) as handle:
        assert read(copy, record(2), fetcher.of(2)) == content(2)
        assert [path.split("/")[-1] for path in files_in(tmp_path)] == ["00002.0-x.arrow"]
        assert handle.read() == content(1)


def test_tokenizers_are_never_evicted_but_count(tmp_path):
    copy, fetcher = LocalCopy(tmp_path, 2500, URL), Fetcher()
    tokens = record(9, path="tokenizers/teacher/tokens.json")
    read(copy, tokens, fetcher.of(9))
    for number in range(3):
        read(copy, record(number), fetcher.of(number))
    assert sorted(path.split("/")[-1] for path in files_in(tmp_path)) == [
        "00002.0-x.arrow",
        "tokens.json",
    ]
    with pytest.raises(StorageError) as caught:
        copy.ensure(record(5, 1600), Fetcher(1600).of(5))
    assert str(caught.value) == (
        f"{URL}/logits/00005.0-x.arrow: 1600 bytes do not fit into the local copy {tmp_path}, "
        "which may hold 2500 (1000 of them tokenizers); set $KDCACHE_LOCAL_COPY_BYTES to more"
    )
    assert read(copy, tokens, never) == content(9)


def test_a_file_larger_than_the_bound_is_refused_before_it_is_fetched(tmp_path):
    with pytest.raises(
        StorageError, match=r"1000 bytes do not fit .* set \$KDCACHE_LOCAL_COPY_BYT"
    ):
        LocalCopy(tmp_path, 999, URL).ensure(record(1), never)
    assert not files_in(tmp_path)


def test_a_fetch_waits_for_the_room_of_another(tmp_path):
    """What is on its way cannot be evicted; once it is there it can."""
    copy, fetcher = LocalCopy(tmp_path, 1500, URL), Fetcher()
    begun, finish = threading.Event(), threading.Event()

    def slow(stream):
        begun.set()
        assert finish.wait(10)
        stream.write(content(1))

    first = threading.Thread(target=lambda: read(copy, record(1), slow))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=lambda: read(copy, record(2), fetcher.of(2)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert not fetcher.fetched
    finish.set()
    first.join(10)
    second.join(10)
    assert fetcher.fetched == [2]
    assert [path.split("/")[-1] for path in files_in(tmp_path)] == ["00002.0-x.arrow"]


CHILD = """
    import os, random, sys, time
    from pathlib import Path
    from tests.formats.test_local_copy import *
    folder, bound, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    copy, log = LocalCopy(folder, bound, URL), Path(sys.argv[4])
    def note(text):
        with log.open("a") as stream:
            stream.write(text + "\\n")
"""


def child(folder: Path, bound: int, seed: int, log: Path, script: str) -> subprocess.Popen:
    """A process that runs a script on a local copy."""
    code = textwrap.dedent(CHILD) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, *map(str, (folder, bound, seed, log))]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def wait_for(log: Path, text: str) -> None:
    for _ in range(2000):
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} did not come")


def test_processes_race_under_a_bound_and_lose_nothing(tmp_path):
    """Every handle has the right bytes, and the bound holds whenever the folder is looked at."""
    script = """
        draw = random.Random(seed)
        for _ in range(60):
            number = draw.randrange(8)
            held = copy.ensure(record(number), Fetcher().of(number))
            with open(folder / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                taken = sum(files_in(folder).values())
            assert taken <= bound, taken
            assert held.read() == content(number)
            held.close()
        note("done")
    """
    folder, log = tmp_path / "copy", tmp_path / "log"
    children = [child(folder, 4500, seed, log, script) for seed in range(4)]
    assert [process.wait(60) for process in children] == [0] * 4
    assert log.read_text().split() == ["done"] * 4
    assert sum(files_in(folder).values()) <= 4500
    assert not list((folder / ".incoming").iterdir())


def test_two_processes_fetch_a_file_once(tmp_path):
    script = """
        def fetch(stream):
            note(f"fetch {seed}")
            while log.read_text().count("begin") < 3:
                time.sleep(0.01)
            time.sleep(0.3)
            stream.write(content(1))
        note("begin")
        assert read(copy, record(1), fetch) == content(1)
        note("read")
    """
    log = tmp_path / "log"
    children = [child(tmp_path / "copy", 5000, seed, log, script) for seed in range(3)]
    assert [process.wait(60) for process in children] == [0] * 3
    lines = log.read_text().split("\n")
    assert sum(line.startswith("fetch") for line in lines) == 1
    assert lines.count("read") == 3


HANGS = """
    def fetch(stream):
        stream.write(content(1)[:700])
        note("half")
        time.sleep(60)
    copy.ensure(record(1), fetch)
"""


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_fetch_holds_neither_its_file_nor_its_room(tmp_path, number):
    """The bound has room for one file: that of the killed process must come free."""
    folder, log = tmp_path / "copy", tmp_path / "log"
    process = child(folder, 1500, 0, log, HANGS)
    wait_for(log, "half")
    assert list(files_in(folder).values()) == [1000]  # its room is taken
    process.send_signal(signal.SIGKILL)
    process.wait()
    copy, fetcher = LocalCopy(folder, 1500, URL), Fetcher()
    assert read(copy, record(number), fetcher.of(number)) == content(number)
    assert fetcher.fetched == [number]
    assert files_in(folder) == {f"{copy.root.name}/logits/0000{number}.0-x.arrow": 1000}


def test_who_waits_for_a_killed_fetch_takes_over(tmp_path):
    folder, log = tmp_path / "copy", tmp_path / "log"
    holder = child(folder, 1500, 0, log, HANGS)
    wait_for(log, "half")
    waiter = child(
        folder, 1500, 1, log, "assert read(copy, record(1), Fetcher().of(1))\nnote('got')"
    )
    time.sleep(0.3)
    assert waiter.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert waiter.wait(30) == 0
    assert "got" in log.read_text()


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "free some space or set $KDCACHE_LOCAL_COPY_BYTES to less"),
        (errno.EIO, "set $KDCACHE_LOCAL_COPY to a folder on a local disk"),
    ],
)
def test_a_disk_that_refuses_is_one_line(tmp_path, monkeypatch, code, advice):
    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local_copy.os, "fsync", refuse)
    with pytest.raises(StorageError) as caught:
        LocalCopy(tmp_path, 5000, URL).ensure(record(1), Fetcher().of(1))
    assert str(caught.value) == f"local copy {tmp_path}: {os.strerror(code)}; {advice}"
    assert not files_in(tmp_path)


def test_the_environment_says_where_and_how_much(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "here"))
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", "1.5GB")
    copy = LocalCopy.from_environment(URL)
    assert (copy.folder, copy.max_bytes) == (tmp_path / "here", 15 * 10**8)
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", "much")
    with pytest.raises(StorageError, match=r"\$KDCACHE_LOCAL_COPY_BYTES: 'much' is no number"):
        LocalCopy.from_environment(URL)


@pytest.mark.parametrize(
    ("free", "bound"), [(1000 * GB, DEFAULT_BYTES), (50 * GB, (50 * GB + 1000) // 2)]
)
def test_without_it_at_most_half_of_the_free_disk(tmp_path, monkeypatch, free, bound):
    monkeypatch.delenv("KDCACHE_LOCAL_COPY", raising=False)
    monkeypatch.delenv("KDCACHE_LOCAL_COPY_BYTES", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "kdcache"
    read(LocalCopy(folder, 10_000, URL), record(1), Fetcher().of(1))
    usage = type(shutil.disk_usage(tmp_path))(2 * free, free, free)
    monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda path: usage)
    copy = LocalCopy.from_environment(URL)
    assert (copy.folder, copy.max_bytes) == (folder, bound)


def test_a_lock_is_held_while_room_is_made(tmp_path):
    """Who has the folder's lock keeps others from evicting and naming."""
    copy, fetcher = LocalCopy(tmp_path, 5000, URL), Fetcher()
    read(copy, record(1), fetcher.of(1))
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=lambda: read(copy, record(2), fetcher.of(2)))
        other.start()
        other.join(0.2)
        assert other.is_alive()
        assert read(copy, record(1), never) == content(1)  # what is here needs no lock
    other.join(10)
    assert fetcher.fetched == [1, 2]


def left_behind(folder: Path) -> Path:
    """A temporary whose process was killed."""
    path = folder / ".incoming" / ("0" * 32)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    return path


def test_a_temporary_is_removed_under_its_lock(tmp_path, monkeypatch):
    path, held = left_behind(tmp_path), []
    unlink = Path.unlink

    def watched(self, missing_ok=False):
        if self == path:
            with path.open("rb") as other, contextlib.suppress(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            held.append(True)
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    read(LocalCopy(tmp_path, 10_000, URL), record(1), Fetcher().of(1))
    assert held == [True]
    assert not path.exists()


def test_a_temporary_that_took_the_name_of_another_stays(tmp_path, monkeypatch):
    path, flock = left_behind(tmp_path), fcntl.flock

    def late(handle, operation):
        if operation & fcntl.LOCK_NB:  # what was opened has got its final name by now
            path.rename(tmp_path / "renamed")
            path.write_bytes(b"another")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    read(LocalCopy(tmp_path, 10_000, URL), record(1), Fetcher().of(1))
    assert path.read_bytes() == b"another"


@pytest.mark.slow
def test_processes_that_are_killed_at_random_harm_nobody(tmp_path):
    script = """
        draw = random.Random(seed)
        while True:
            number = draw.randrange(8)
            assert read(copy, record(number), Fetcher().of(number)) == content(number)
            with open(folder / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                assert sum(files_in(folder).values()) <= bound
    """
    folder, log, draw = tmp_path / "copy", tmp_path / "log", random.Random(0)
    children = [child(folder, 4500, seed, log, script) for seed in range(3)]
    try:
        for kill in range(60):
            time.sleep(draw.uniform(0.3, 0.9))
            chosen = draw.randrange(3)
            assert [process.poll() for process in children] == [None] * 3
            children[chosen].kill()
            children[chosen].wait()
            children[chosen] = child(folder, 4500, 100 + kill, log, script)
    finally:
        for process in children:
            process.kill()
            process.wait()
    copy = LocalCopy(folder, 4500, URL)
    for number in range(8):
        assert read(copy, record(number), Fetcher().of(number)) == content(number)
    assert sum(files_in(folder).values()) <= 4500
    assert not list((folder / ".incoming").iterdir())
