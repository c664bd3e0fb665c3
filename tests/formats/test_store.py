"""LocalStore: a cache's files on a disk, read and written by their paths inside it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.manifest import FileRecord
from kdcache.formats.stores import local as module
from kdcache.formats.stores.commit import write_file
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import open_store
from tests.formats.observing import Observed


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A store with a file in a folder, and a file beside its folder."""
    (tmp_path / "outside").write_bytes(b"secret")
    found = LocalStore(tmp_path / "cache")
    found.create("signals/a.json", b"one")
    return found


def files(store: LocalStore) -> dict[str, bytes]:
    return {path: (store.root / path).read_bytes() for path in store.walk("")}


def record(path: str, data: bytes = b"one") -> FileRecord:
    return digest_bytes(data, path)


def test_paths_and_file_urls_are_local(tmp_path: Path) -> None:
    for location in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        store = open_store(location)
        assert isinstance(store, LocalStore)
        assert store.root == tmp_path
        assert store.name == str(tmp_path)
        assert store.at("a/b") == f"{tmp_path}/a/b"
        assert store.exclusive


def test_what_is_read_is_what_was_written(store: LocalStore) -> None:
    data = bytes(range(256)) * 10
    store.create("deep/er/b", data)
    assert store.read("deep/er/b") == data
    assert store.size("deep/er/b") == 2560
    pieces = list(store.pieces("deep/er/b", chunk=1000))
    assert [len(piece) for piece in pieces] == [1000, 1000, 560]
    assert b"".join(pieces) == data
    store.create("empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0
    assert list(store.pieces("empty")) == []


@pytest.mark.parametrize(
    "act", [LocalStore.read, LocalStore.size, lambda s, p: list(s.pieces(p))], ids="abc"
)
@pytest.mark.parametrize("path", ["signals/b.json", "none/b", "signals/a.json/b"])
def test_what_is_not_there_is_not_found(
    store: LocalStore, act: Callable[[LocalStore, str], object], path: str
) -> None:
    with pytest.raises(FileNotFoundError):
        act(store, path)


def test_names_and_walk(store: LocalStore) -> None:
    for path in ("signals/c", "signals/b/x", ".status/s", "top"):
        store.create(path, b"")
    assert store.names("") == [".status", "signals", "top"]
    assert store.names("signals") == ["a.json", "b", "c"]
    assert store.names("none") == store.names("top") == []
    assert store.walk("signals") == ["signals/a.json", "signals/b/x", "signals/c"]
    assert store.walk("") == [".status/s", *store.walk("signals"), "top"]
    assert store.walk("none") == []


def test_create_never_replaces_and_replace_does(store: LocalStore) -> None:
    with pytest.raises(FileExistsError):
        store.create("signals/a.json", b"two")
    assert files(store) == {"signals/a.json": b"one"}
    store.replace("signals/a.json", b"two")
    store.replace(".status/new", b"three")
    assert files(store) == {"signals/a.json": b"two", ".status/new": b"three"}


def test_a_replaced_file_is_never_half(store: LocalStore, observed: Observed) -> None:
    for step in ("create", "write", "fsync", "rename"):
        observed.fail(step, OSError(errno.EIO, os.strerror(errno.EIO)))
        with pytest.raises(StorageError, match="Input/output error"):
            store.replace("signals/a.json", b"two")
        assert files(store) == {"signals/a.json": b"one"}


def test_files_are_named_by_what_was_written(store: LocalStore) -> None:
    def write(stream) -> str:
        stream.write(b"ab")
        stream.write(memoryview(b"c"))
        assert store.walk("data") == [f"data/.tmp-{os.getpid()}-hint"]
        return "data/abc"

    assert store.put_file("data/hint", write) == "data/abc"
    assert files(store) == {"signals/a.json": b"one", "data/abc": b"abc"}


def test_folders_are_named_by_what_was_written(store: LocalStore) -> None:
    def write(folder: Path) -> str:
        write_file(folder / "x", [memoryview(b"1")])
        write_file(folder / "deep/y", [memoryview(b"2"), memoryview(b"3")])
        return "data/group"

    for _ in range(2):
        assert store.put_folder("data/hint", write) == "data/group"
        assert files(store) == {
            "signals/a.json": b"one",
            "data/group/x": b"1",
            "data/group/deep/y": b"23",
        }


def test_a_writer_that_fails_leaves_nothing(store: LocalStore) -> None:
    def fail(target) -> str:
        if isinstance(target, Path):
            write_file(target / "x", [memoryview(b"1")])
        else:
            target.write(b"1")
        raise RuntimeError("halfway")

    for put in (store.put_file, store.put_folder):
        with pytest.raises(RuntimeError, match="halfway"):
            put("data/hint", fail)
    assert files(store) == {"signals/a.json": b"one"}


def test_remove(store: LocalStore) -> None:
    store.create("data/group/deep/y", b"2")
    store.create("data/group/x", b"1")
    store.remove("none")
    store.remove("data/group")
    assert files(store) == {"signals/a.json": b"one"}
    assert store.names("data") == []
    store.remove("signals/a.json")
    assert files(store) == {}


def test_an_open_file_can_be_mapped_and_outlives_its_name(store: LocalStore) -> None:
    with store.open(record("signals/a.json")) as stream:
        store.remove("signals/a.json")
        assert stream.read() == b"one"
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            assert data[:] == b"one"
    with pytest.raises(IntegrityError, match=r"cache/signals/a\.json: missing"):
        store.open(record("signals/a.json"))


def test_local_files_are_where_they_are(store: LocalStore) -> None:
    wanted = [record("signals/a.json")]
    assert store.folder(wanted) == store.root
    store.fetch(wanted)
    assert files(store) == {"signals/a.json": b"one"}


def linked_file(store: LocalStore) -> str:
    (store.root / "signals/b.json").symlink_to(store.root.parent / "outside")
    return "signals/b.json"


def linked_folder(store: LocalStore) -> str:
    (store.root / "data").symlink_to(store.root.parent)
    return "data/outside"


READS: dict[str, Callable[[LocalStore, str], object]] = {
    "read": LocalStore.read,
    "size": LocalStore.size,
    "pieces": lambda store, path: list(store.pieces(path)),
    "open": lambda store, path: store.open(record(path)),
    "folder": lambda store, path: store.folder([record("signals/a.json"), record(path)]),
}
WRITES: dict[str, Callable[[LocalStore, str], object]] = {
    "create": lambda store, path: store.create(path + "x", b"mine"),
    "replace": lambda store, path: store.replace(path, b"mine"),
    "put_file": lambda store, path: store.put_file(path, lambda stream: path),
    "put_folder": lambda store, path: store.put_folder(path, lambda folder: path),
    "remove": LocalStore.remove,
}


@pytest.mark.parametrize("link", [linked_file, linked_folder])
@pytest.mark.parametrize("act", READS.values(), ids=READS)
def test_a_link_that_leads_out_of_the_cache_is_not_read(
    store: LocalStore, act: Callable, link: Callable[[LocalStore], str]
) -> None:
    path = link(store)
    with pytest.raises(IntegrityError, match="a link that leads out of the cache") as caught:
        act(store, path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
def test_nothing_is_written_or_removed_through_a_link_that_leads_out(
    store: LocalStore, act: Callable
) -> None:
    path = linked_folder(store)
    before = sorted(os.listdir(store.root.parent))
    with pytest.raises(IntegrityError, match="a link that leads out of the cache"):
        act(store, path)
    assert sorted(os.listdir(store.root.parent)) == before
    assert (store.root.parent / "outside").read_bytes() == b"secret"


def test_a_link_itself_is_removed_and_not_what_it_names(store: LocalStore) -> None:
    store.remove(linked_file(store))
    linked_folder(store)
    store.remove("data")
    assert store.names("") == ["signals"]
    assert store.names("signals") == ["a.json"]
    assert (store.root.parent / "outside").read_bytes() == b"secret"


def test_links_inside_the_cache_and_to_it_are_followed(store: LocalStore, tmp_path: Path) -> None:
    (store.root / "signals/b.json").symlink_to("a.json")
    (tmp_path / "link").symlink_to(store.root)
    assert store.read("signals/b.json") == b"one"
    assert LocalStore(tmp_path / "link").read("signals/b.json") == b"one"


def test_a_neighbour_whose_name_begins_the_same_is_outside(store: LocalStore) -> None:
    (store.root.parent / "cache2").mkdir()
    (store.root.parent / "cache2" / "x").write_bytes(b"secret")
    (store.root / "x").symlink_to("../cache2/x")
    with pytest.raises(IntegrityError, match="leads out of the cache"):
        store.read("x")


def test_what_is_no_file_is_not_waited_for(store: LocalStore) -> None:
    os.mkfifo(store.root / "pipe")
    with pytest.raises(IntegrityError, match="pipe: not a file"):
        store.read("pipe")
    with pytest.raises((StorageError, IntegrityError), match="signals: "):
        store.read("signals")


def test_a_record_larger_than_any_is_not_read_whole(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SMALL_BYTES", 10)
    store.create("ten", bytes(10))
    store.create("eleven", bytes(11))
    assert store.read("ten") == bytes(10)
    with pytest.raises(IntegrityError, match="eleven: over 10 bytes"):
        store.read("eleven")


@pytest.mark.parametrize("path", ["signals/a.json/x", "signals/a.json/deep/x"])
def test_a_file_in_the_place_of_a_folder_is_one_line(store: LocalStore, path: str) -> None:
    acts = {**WRITES, "claim": lambda store, path: store.claim(f"../{path}")}
    del acts["remove"]
    for act in acts.values():
        with pytest.raises(StorageError, match="cannot be written: Not a directory") as caught:
            act(store, path)
        assert "\n" not in str(caught.value)
    assert files(store) == {"signals/a.json": b"one"}


@pytest.mark.parametrize("act", [LocalStore.read, LocalStore.size, LocalStore.names], ids="abc")
def test_what_cannot_be_read_is_one_line(
    store: LocalStore, act: Callable[[LocalStore, str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **more: object) -> object:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.os, "open", refuse)
    monkeypatch.setattr(module.os, "listdir", refuse)
    with pytest.raises(StorageError, match=r"cache/signals: cannot be read: Input/output error"):
        act(store, "signals")


def test_claims_exclude_and_say_what_died(store: LocalStore) -> None:
    first = store.claim("logits.00003")
    assert first is not None
    assert not first.stale
    assert LocalStore(store.root).claim("logits.00003") is None
    assert store.stale_claims() == ["logits.00003"]
    first.release()
    assert store.stale_claims() == []
    store.create(".locks/logits", b"")
    claim = store.claim("logits")
    assert claim is not None
    assert claim.stale
    claim.release()


def test_a_folder_is_made_and_discarded_where_nothing_is_in_it(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "a" / "cache")
    assert not store.exists()
    assert store.make()
    assert store.exists()
    assert not store.make()
    claim = store.claim("samples")
    assert claim is not None
    store.discard(root=True)
    assert store.stale_claims() == ["samples"]
    claim.release()
    store.discard(root=False)
    assert os.listdir(store.root) == []
    store.discard(root=True)
    assert not store.exists()
    store.make()
    store.create("mine", b"x")
    store.discard(root=True)
    assert files(store) == {"mine": b"x"}
    with pytest.raises(StorageError, match="output is a file, a cache is a directory"):
        LocalStore(store.root / "mine").make()
