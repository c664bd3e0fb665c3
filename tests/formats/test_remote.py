"""The store over fsspec: what it does on memory://, and under a driver that fails."""

import builtins
import logging
import os
import pickle
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kdcache.errors import IdentityError, IntegrityError, KDCacheError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.stores import remote, retry
from kdcache.formats.stores.commit import write_file
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.remote import RemoteStore
from kdcache.formats.stores.scratch import scratch_folder
from kdcache.formats.stores.store import open_store
from kdcache.formats.window import WindowAhead, WindowReader, window_files
from kdcache.formats.writer import CacheWriter
from tests.formats.kinds import make_kinds
from tests.formats.labels import make_cache
from tests.formats.test_writer import batch, commit_of, declare

URL = "memory://bucket/caches/deen"


@pytest.fixture(autouse=True)
def _world(tmp_path, monkeypatch):
    """An empty memory, a local copy of its own, and no real waits."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", "1GB")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


class Faulty:
    """A driver whose calls fail as told, before or after they do what they should."""

    def __init__(self, inner: Any, before: Callable, after: Callable) -> None:
        self._inner, self._before, self._after = inner, before, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._before(name, *args)
            return self._after(name, found(*args, **options))

        return call


def nothing(name: str, *args: Any) -> None:
    """No fault before a call."""


def same(name: str, result: Any) -> Any:
    """No fault after it."""
    return result


def faulty(store: RemoteStore, before: Callable = nothing, after: Callable = same) -> RemoteStore:
    """The same store with a driver that fails."""
    files, root = store._connected()
    store._driver = os.getpid(), Faulty(files, before, after), root
    return store


def failing(times: int, name: str, error: Exception) -> tuple[Callable, list[str]]:
    """Fails the first calls of one name; keeps the names of all calls."""
    calls: list[str] = []

    def before(called: str, *args: Any) -> None:
        calls.append(called)
        if called == name and calls.count(name) <= times:
            raise error

    return before, calls


def put(store: RemoteStore, path: str, data: bytes) -> str:
    def write(stream):
        stream.write(data)
        return path

    return store.put_file("logits/hint.arrow", write)


def test_urls_and_paths_find_their_store(tmp_path):
    assert isinstance(open_store(URL), RemoteStore)
    assert isinstance(open_store(tmp_path), LocalStore)
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    assert RemoteStore(URL + "/").name == URL
    assert RemoteStore(URL).at("a/b") == URL + "/a/b"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nowhere://bucket/x", "nowhere://bucket/x: fsspec knows no nowhere://; correct the URL"),
        ("simplecache::s3://b/x", "chained URLs are not taken; give the store's own"),
    ],
)
def test_urls_that_are_none(url, said):
    with pytest.raises(StorageError) as caught:
        RemoteStore(url)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("protocol", "package", "said"),
    [("s3", "s3fs", "pip install s3fs"), ("gs", "gcsfs", "gcsfs")],
)
def test_a_missing_driver_is_one_line_that_says_what_to_install(
    protocol, package, said, monkeypatch
):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StorageError) as caught:
        RemoteStore(f"{protocol}://bucket/x")
    assert str(caught.value).startswith(
        f"{protocol}://bucket/x: no driver for {protocol}:// installed; "
    )
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_small_files(tmp_path):
    store = RemoteStore(URL)
    assert not store.exists()
    assert store.make()
    store.create("commits/logits.00000.json", b"one")
    with pytest.raises(FileExistsError):
        store.create("commits/logits.00000.json", b"two")
    assert store.read("commits/logits.00000.json") == b"one"
    assert store.size("commits/logits.00000.json") == 3
    store.replace("status.json", b"1")
    store.replace("status.json", b"22")
    assert store.read("status.json") == b"22"
    assert store.names("") == ["commits", "status.json"]
    assert store.names("commits") == ["logits.00000.json"]
    assert store.names("nothing") == []
    assert store.names("status.json") == []
    assert store.walk("") == ["commits/logits.00000.json", "status.json"]
    assert store.walk("commits") == ["commits/logits.00000.json"]
    assert store.walk("nothing") == []
    assert not RemoteStore(URL).make()
    for path in ("nothing", "commits"):
        with pytest.raises(FileNotFoundError):
            store.size(path)
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    store.remove("commits")
    store.remove("status.json")
    store.remove("nothing")
    assert not store.exists()


def test_data_files_of_every_length(monkeypatch):
    monkeypatch.setattr(remote, "RANGE_BYTES", 100)
    store = RemoteStore(URL)
    for size in (0, 1, 99, 100, 101, 250, 1000):
        data = random.Random(size).randbytes(size)
        path = put(store, f"logits/{size}.arrow", data)
        assert store.size(path) == size
        for chunk in (1, 7, 100, 150, 5000):
            pieces = list(store.pieces(path, chunk))
            assert b"".join(pieces) == data
            assert all(0 < len(piece) <= chunk for piece in pieces)
        with store.open(digest_bytes(data, path)) as handle:
            assert handle.read() == data


def test_folders_are_uploaded_file_by_file(tmp_path):
    store = RemoteStore(URL)
    contents = {"zarr.json": b"{}", "values/zarr.json": b"[]", "values/c/0/0/0": b"numbers"}

    def write(folder: Path) -> str:
        for path, data in contents.items():
            write_file(folder / path, [memoryview(data)])
        return "hidden/0.0-x.zarr"

    assert store.put_folder("hidden/0.0.zarr", write) == "hidden/0.0-x.zarr"
    assert store.walk("hidden") == sorted(f"hidden/0.0-x.zarr/{path}" for path in contents)
    for path, data in contents.items():
        assert store.read(f"hidden/0.0-x.zarr/{path}") == data
    files = [digest_bytes(data, f"hidden/0.0-x.zarr/{path}") for path, data in contents.items()]
    folder = store.folder(files)
    assert (folder / "hidden/0.0-x.zarr/values/c/0/0/0").read_bytes() == b"numbers"
    assert not list(tmp_path.glob("kdcache-upload-*"))


def test_claims_exclude_nobody():
    store = RemoteStore(URL)
    assert not store.exclusive
    first, second = store.claim("logits.00000"), store.claim("logits.00000")
    assert first is not None
    assert second is not None
    assert not second.stale
    assert store.stale_claims() == []
    first.release()
    second.release()
    store.discard(True)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cat_file", lambda store: store.read("a/x")),
        ("info", lambda store: store.size("a/x")),
        ("ls", lambda store: store.names("a")),
        ("find", lambda store: store.walk("a")),
        ("pipe_file", lambda store: store.create("a/new", b"1")),
        ("pipe_file", lambda store: store.replace("a/x", b"1")),
        ("put_file", lambda store: put(store, "a/y", b"1")),
        ("rm", lambda store: store.remove("a/x")),
        ("cat_file", lambda store: b"".join(store.pieces("a/x"))),
    ],
)
def test_every_call_is_tried_again_and_then_refused_in_one_line(name, call):
    good = RemoteStore(URL)
    good.create("a/x", b"12345")
    expected = call(RemoteStore(URL))
    good.remove("a")
    good.create("a/x", b"12345")
    before, calls = failing(3, name, ConnectionResetError("gone"))
    assert call(faulty(RemoteStore(URL), before)) == expected
    assert calls.count(name) == 4

    good.remove("a")
    good.create("a/x", b"12345")
    before, calls = failing(100, name, ConnectionResetError("gone"))
    with pytest.raises(StorageError) as caught:
        call(faulty(RemoteStore(URL), before))
    assert calls.count(name) == retry.TRIES
    assert str(caught.value).startswith(f"{URL}/a")
    assert "ConnectionResetError: gone; gave up after 10 tries" in str(caught.value)
    assert "\n" not in str(caught.value)

    before, calls = failing(100, name, PermissionError("not you"))
    with pytest.raises(StorageError, match="check the credentials"):
        call(faulty(RemoteStore(URL), before))
    assert calls.count(name) == 1


def test_a_read_resumes_where_it_stopped(monkeypatch):
    """Of ten ranges three are cut off or dropped: they alone are asked for again."""
    monkeypatch.setattr(remote, "RANGE_BYTES", 100)
    data = random.Random(1).randbytes(1000)
    put(RemoteStore(URL), "a/x", data)
    asked: list[int] = []

    def after(name: str, result: Any) -> Any:
        if name == "cat_file":
            asked.append(len(result))
            if len(asked) == 3:
                raise ConnectionResetError("dropped")
            if len(asked) in (6, 7):
                return result[:-1] if len(asked) == 6 else result + b"x"
        return result

    assert b"".join(faulty(RemoteStore(URL), after=after).pieces("a/x", 64)) == data
    assert asked == [100] * 13


def test_a_create_whose_answer_was_lost_meets_itself():
    """The record that stands is the caller's to compare."""
    lost: list[int] = []

    def after(name: str, result: Any) -> Any:
        if name == "pipe_file" and not lost:
            lost.append(1)
            raise ConnectionResetError("no answer")
        return result

    with pytest.raises(FileExistsError):
        faulty(RemoteStore(URL), after=after).create("commits/x", b"record")
    assert RemoteStore(URL).read("commits/x") == b"record"


def test_a_server_that_ignores_the_condition_replaces_nothing():
    RemoteStore(URL).create("commits/x", b"first")

    class Careless(Faulty):
        def pipe_file(self, path: str, value: bytes, mode: str = "") -> None:
            self._inner.pipe_file(path, value)

    store = RemoteStore(URL)
    files, root = store._connected()
    store._driver = os.getpid(), Careless(files, nothing, same), root
    with pytest.raises(FileExistsError):
        store.create("commits/x", b"second")
    assert store.read("commits/x") == b"first"


def test_an_upload_is_measured():
    """A store that keeps less than it was given is asked again, then reported."""
    kept: list[int] = []

    def after(name: str, result: Any) -> Any:
        if name == "info":
            kept.append(1)
            return {**result, "size": result["size"] - (len(kept) < 3)}
        return result

    assert put(faulty(RemoteStore(URL), after=after), "a/x", b"12345") == "a/x"
    assert len(kept) == 3

    def short(name: str, result: Any) -> Any:
        return {**result, "size": 4} if name == "info" else result

    with pytest.raises(StorageError, match="4 bytes stand there, expected 5; gave up after"):
        put(faulty(RemoteStore(URL), after=short), "a/x", b"12345")


def test_a_file_that_is_missing_or_broken_names_the_store():
    store = RemoteStore(URL)
    with pytest.raises(IntegrityError, match=rf"^{URL}/logits/x: missing; "):
        store.open(digest_bytes(b"12345", "logits/x"))
    put(store, "logits/x", b"12346")
    with pytest.raises(IntegrityError, match=rf"^{URL}/logits/x: xxh3 .* 3 times fetched; "):
        store.open(digest_bytes(b"12345", "logits/x"))


def test_files_are_fetched_several_at_a_time_and_no_more_than_half_the_bound(monkeypatch):
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", "1000")
    store = RemoteStore(URL)
    files = []
    for number in range(10):
        data = random.Random(number).randbytes(100)
        files.append(digest_bytes(data, put(store, f"logits/{number}", data)))
    store.fetch(files)
    assert sum(path.is_file() for path in store.local.root.rglob("*")) == 5
    before, calls = failing(0, "", ValueError())
    store = faulty(store, before)
    store.fetch(iter(files[:5]))
    assert not calls
    (broken,) = [digest_bytes(b"x", "logits/none")]
    with pytest.raises(IntegrityError):
        store.fetch([broken, *files[5:]])


def test_a_store_travels_to_another_process():
    store = RemoteStore(URL)
    store.create("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"1"


def test_a_store_connects_anew_after_a_fork():
    store = RemoteStore(URL)
    store.create("x", b"1")
    files, _ = store._connected()
    assert store._connected()[0] is files
    store._driver = os.getpid() + 1, files, "bucket"
    assert store._connected()[0] is not files
    assert store.read("x") == b"1"


def test_a_driver_without_create_only_puts_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(remote, "_ATOMIC", frozenset())
    store = RemoteStore(URL)
    with caplog.at_level(logging.WARNING, logger="kdcache"):
        store.create("commits/x", b"1")
        store.replace("status.json", b"1")
        with pytest.raises(FileExistsError):
            store.create("commits/x", b"2")
    assert store.walk("") == ["commits/x", "status.json"]
    assert store.read("commits/x") == b"1"
    (message,) = caplog.messages
    assert message.startswith(f"{URL}: kdcache knows of no create-only writes there")


def test_what_a_killed_upload_left_on_the_disk_is_swept(tmp_path):
    left = tmp_path / "kdcache-upload-dead"
    left.mkdir()
    (left / "lock").touch()
    (left / "big").write_bytes(b"x")
    with scratch_folder() as live, scratch_folder() as other:
        assert not left.exists()
        (live / "file").touch()
        (other / "file").touch()
        assert len(list(tmp_path.glob("kdcache-upload-*"))) == 2
        with scratch_folder():
            assert (live / "file").exists()
    assert not list(tmp_path.glob("kdcache-upload-*"))


def test_a_full_disk_under_an_upload_is_one_line(monkeypatch):
    def refuse(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.disk.OutputFile, "write", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        put(RemoteStore(URL), "a/x", b"1")


def tensors(location: str) -> list[Any]:
    """Everything that a window over the whole cache gives."""
    cache = open_cache(location)
    reader = WindowReader(cache, range(cache.num_shards), ["src", "tgt"], ["logits"])
    rows = range(reader.num_samples)
    found = [reader.take_stream(name, rows).fields["id"] for name in ("src", "tgt")]
    labels = reader.take_signal("logits", rows)
    return found + [labels[c].fields[f] for c in sorted(labels) for f in sorted(labels[c].fields)]


def test_a_cache_reads_the_same_from_a_url(tmp_path):
    make_cache(tmp_path / "cache")
    make_cache(URL)
    local, remote_store = open_store(tmp_path / "cache"), RemoteStore(URL)
    assert remote_store.walk("") == local.walk("")
    for path in local.walk(""):
        assert remote_store.read(path) == local.read(path), path
    expected, found = tensors(str(tmp_path / "cache")), tensors(URL)
    assert len(expected) == len(found) > 4
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, found, strict=True))


def test_a_cache_is_written_and_read_under_faults(tmp_path, monkeypatch):
    """One call in five fails, before or after its effect; nothing is lost and bytes are equal."""
    draw = random.Random(5)

    def before(name: str, *args: Any) -> None:
        if draw.random() < 0.1:
            raise ConnectionResetError("before")

    def after(name: str, result: Any) -> Any:
        if draw.random() < 0.1:
            raise ConnectionResetError("after")
        return result

    connect = RemoteStore._connect

    def connected(self: RemoteStore) -> tuple[Any, str]:
        files, root = connect(self)
        return Faulty(files, before, after), root

    make_cache(tmp_path / "cache")
    with monkeypatch.context() as context:
        context.setattr(RemoteStore, "_connect", connected)
        make_cache(URL)
        found = tensors(URL)
    local, plain = open_store(tmp_path / "cache"), RemoteStore(URL)
    assert {path: plain.read(path) for path in plain.walk("")} == {
        path: local.read(path) for path in local.walk("")
    }
    expected = tensors(str(tmp_path / "cache"))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, found, strict=True))


def test_the_next_window_is_fetched_ahead(tmp_path):
    """It lies in the local copy when it is asked for; of a local cache nothing is done."""
    make_cache(URL)
    cache = open_cache(URL)
    stop = threading.Event()
    WindowAhead(cache, ["logits"], stop).begin([1, 2])
    for thread in threading.enumerate():
        if thread.name == "kdcache-ahead":
            thread.join(10)
    here = {
        path.relative_to(cache.store.local.root).as_posix()
        for path in cache.store.local.root.rglob("*.arrow")
    }
    expected = window_files(cache, [1, 2], ["logits"])
    assert here == {file.path for file in expected}
    assert len(here) == 4

    stop.set()
    WindowAhead(cache, ["logits"], stop)._fetch([0])
    assert len(list(cache.store.local.root.rglob("*.arrow"))) == 4

    make_cache(tmp_path / "cache")
    ahead = WindowAhead(open_cache(tmp_path / "cache"), ["logits"], threading.Event())
    ahead._fetch = None  # would fail
    ahead.begin([0])


def test_a_window_reads_what_its_signals_were_made_from_too(tmp_path):
    make_kinds(tmp_path / "cache", only=["masks", "at_masked"])
    cache = open_cache(tmp_path / "cache")
    found = [file.path.split("/")[0] for file in window_files(cache, [0], ["at_masked"])]
    parts = {name: len(cache.commit_record(name, 0).parts) for name in ("masks", "at_masked")}
    assert Counter(found) == parts | {"samples": 1}


def test_what_fails_ahead_is_said_when_it_is_read(tmp_path):
    make_cache(URL)
    cache = open_cache(URL)
    (path,) = [path for path in cache.store.walk("logits") if "00001." in path]
    cache.store.remove(path)
    WindowAhead(cache, ["logits"], threading.Event())._fetch([1])
    with pytest.raises(KDCacheError, match="missing"):
        WindowReader(cache, [1], ["src"], ["logits"])


def test_a_part_that_another_machine_committed_first_is_taken_as_it_stands() -> None:
    location = "memory://first/cache"
    with CacheWriter(location) as writer:
        declare(writer)
        part = writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))
        standing = writer.commit(commit_of(part))
        late = writer.write_part("logits", 0, 0, 0, 2, batch(1, 3))
        assert late == part
        assert writer.commit(commit_of(late)) == standing
        with pytest.raises(IdentityError, match="no such part"):
            writer.write_part("logits", 0, 1, 2, 3, batch(1))
