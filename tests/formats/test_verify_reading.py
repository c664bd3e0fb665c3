"""Verification reads every byte once, keeps little in memory, and says what it did not read."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from kdcache.errors import IntegrityError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks import verify_flight, verify_reading
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.checks.verify_flight import Flight
from kdcache.formats.checks.verify_reading import Buffers, read_checked
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import Store, open_store
from tests.formats.kinds import Kinds, make_kinds
from tests.formats.labels import make_cache


class Counting(LocalStore):
    """A local store that counts the bytes that are read of every file."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read_bytes: Counter[str] = Counter()

    def pieces(self, path: str, chunk: int = 1 << 20) -> Iterator[bytes]:
        for piece in super().pieces(path, chunk):
            self.read_bytes[path] += len(piece)
            yield piece

    def open(self, file) -> BinaryIO:
        stream, counts = super().open(file), self.read_bytes

        class Counted:
            def readinto(self, buffer: memoryview) -> int:
                count = stream.readinto(buffer)
                counts[file.path] += count
                return count

            def fileno(self) -> int:
                return stream.fileno()

            def __enter__(self):
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

        return Counted()


class Far(Counting):
    """The same, taken for a store that is far: its local copy must not be asked."""

    def open(self, file) -> BinaryIO:
        raise AssertionError("the local copy was asked for")

    fetch = folder = open


@pytest.fixture(params=[Counting, Far])
def counted(request, kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> Counting:
    store = request.param(kinds.root)
    monkeypatch.setattr("kdcache.formats.cache.open_store", lambda location: store)
    if request.param is Far:
        monkeypatch.setattr(verify_flight, "LocalStore", type("NoStore", (), {}))
        monkeypatch.setattr(verify_reading, "LocalStore", type("NoStore", (), {}))
    return store


def data_files(root: Path) -> dict[str, int]:
    """Path to size of all files that are no JSON records."""
    paths = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    return {
        path: file.stat().st_size
        for path, file in paths.items()
        if path != "kdcache.json" and path.split("/")[0] not in ("commits", "signals", ".locks")
    }


def test_every_data_file_is_read_once(counted: Counting) -> None:
    assert verify_cache(counted.root).faults == []
    expected = data_files(counted.root)
    assert len(expected) > 100
    assert {path: counted.read_bytes[path] for path in expected} == expected


def test_quick_reads_no_data_and_sees_sizes(counted: Counting) -> None:
    report = verify_cache(counted.root, quick=True)
    full = verify_cache(counted.root)
    assert (report.faults, report.leftovers) == ([], [])
    assert (report.files, report.bytes) == (full.files, full.bytes)
    counted.read_bytes.clear()
    verify_cache(counted.root, quick=True)
    assert not set(counted.read_bytes) & set(data_files(counted.root))


@pytest.mark.parametrize(
    "pattern",
    ["samples/00001.*", "hidden/00001.0*/values/c/0/0/0", "tokenizers/teacher/vocab.json"],
)
@pytest.mark.parametrize("damage", ["short", "gone", "flipped"])
def test_quick_names_what_has_another_size(own_kinds: Kinds, pattern: str, damage: str) -> None:
    (file,) = own_kinds.root.glob(pattern)
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "short" else data[:-1] + bytes([data[-1] ^ 1]))
    faults = verify_cache(own_kinds.root, quick=True).faults
    if damage == "flipped":
        assert faults == []  # the size is right
        faults = verify_cache(own_kinds.root).faults
    (fault,) = faults
    assert fault.startswith(f"{file}: ")
    assert "names it)" in fault


def test_quick_reads_every_commit(own_kinds: Kinds) -> None:
    commit = own_kinds.root / "commits/beams.00001.json"
    commit.write_bytes(commit.read_bytes().replace(b"beams", b"beans"))
    faults = verify_cache(own_kinds.root, quick=True).faults
    assert faults[0].startswith(f"{commit}: crc32c")


def test_a_samples_commit_that_is_gone_is_a_fault(tmp_path: Path) -> None:
    # The manifest was written after all of them; a signal's may still be to come.
    root = make_cache(tmp_path / "cache")
    commit = root / "commits/samples.00001.json"
    commit.unlink()
    report = verify_cache(root)
    assert report.faults[0] == f"{commit}: missing: it was there once"
    assert report.unfinished == []
    assert report.leftovers == []


def test_faults_come_in_the_order_of_signals_and_shards(own_kinds: Kinds) -> None:
    files = [
        next(own_kinds.root.glob(pattern))
        for pattern in (
            "samples/00002.0-*",
            "at_masked/00000.0-*",
            "at_masked/00002.0-*",
            "classes/00000.0-*",
            "masks/00001.0-*",
        )
    ]
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    faults = verify_cache(own_kinds.root).faults
    assert [fault.split(": ")[0] for fault in faults] == [str(file) for file in files]


def test_few_parts_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_kinds(tmp_path / "cache", part_samples=1).root
    cache = open_cache(root)
    sizes = {
        name: [
            [sum(file.bytes for file in part.files) for part in cache.commit_record(name, n).parts]
            for n in range(cache.num_shards)
        ]
        for name in ["samples", *cache.signals]
    }
    largest = max(size for shards in sizes.values() for parts in shards for size in parts)
    kept = max(
        sum(sum(sizes[name][n]) for name in ("samples", "masks", "beams"))
        for n in range(cache.num_shards)
    )
    monkeypatch.setattr(verify_flight, "MOST_BYTES", largest)
    monkeypatch.setattr(verify_flight, "PART_BYTES", largest)
    held, most = 0, 0
    reserve, release = Flight.reserve, Flight.release

    def reserving(self: Flight, num_bytes: int, own: int) -> None:
        nonlocal held, most
        reserve(self, num_bytes, own)
        with self._changed:
            held += num_bytes
            most = max(most, held)

    def releasing(self: Flight, num_bytes: int) -> None:
        nonlocal held
        with self._changed:
            held -= num_bytes
        release(self, num_bytes)

    monkeypatch.setattr(Flight, "reserve", reserving)
    monkeypatch.setattr(Flight, "release", releasing)
    assert verify_cache(root).faults == []
    assert held == 0
    assert largest < most <= 2 * largest + kept


def test_an_error_in_a_thread_ends_it(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[str]:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("kdcache.formats.checks.verify_shard.ragged_faults", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        verify_cache(kinds.root)
    assert not [t for t in threading.enumerate() if t.name.startswith("verify-")]


class Changing(LocalStore):
    """A store whose file is another when it is read than when its size was asked for."""

    data, step = b"", 3

    def pieces(self, path: str, chunk: int = 1 << 20) -> Iterator[bytes]:
        starts = range(0, len(self.data), self.step)
        yield from (self.data[at : at + self.step] for at in starts)


@pytest.mark.parametrize(("near", "step"), [(True, 0), (False, 3), (False, 4)])
@pytest.mark.parametrize("data", [b"abcdefgh", b"abcdefghi", b"abcdefg", b"abcdefgx", b""])
def test_bytes_are_those_of_the_record(
    tmp_path: Path, near: bool, step: int, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = digest_bytes(b"abcdefgh", "x/y")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/y").write_bytes(data if near else b"abcdefgh")
    store: Store = LocalStore(tmp_path)
    if not near:
        store = Changing(tmp_path)
        store.data, store.step = data, step
        monkeypatch.setattr(verify_reading, "LocalStore", type("NoStore", (), {}))
    told: list[int] = []
    if data == b"abcdefgh":
        assert bytes(read_checked(store, record, Buffers(100), told.append)) == data
        assert sum(told) == len(data)
    else:
        with pytest.raises(IntegrityError, match=r"x/y: .*expected"):
            read_checked(store, record, Buffers(100), told.append)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    record = digest_bytes(np.zeros(4096, np.uint8).tobytes(), "x")
    with pytest.raises((IntegrityError, StorageError), match=f"{tmp_path}/x: "):
        read_checked(open_store(tmp_path), record, Buffers(100))
    with pytest.raises(IntegrityError, match="y: missing"):
        read_checked(open_store(tmp_path), digest_bytes(b"", "y"), Buffers(100))
