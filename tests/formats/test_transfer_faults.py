"""Transfer under faults: processes killed, disks that fail, files that were damaged."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import FormatError, IntegrityError, KDCacheError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.record import encode_record, read_record
from kdcache.formats.stores import disk, transfer
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import open_store
from kdcache.formats.stores.transfer import compress_cache, expand_cache
from kdcache.formats.stores.transfer_store import CompressedFiles, compressed_path
from kdcache.formats.stores.zstd import compressed
from tests.formats.test_transfer import files_of


@pytest.fixture(autouse=True)
def _world(tmp_path, monkeypatch):
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", "1GB")


@pytest.fixture
def packed(tiny_cache, tmp_path) -> Path:
    """`tiny_cache`, compressed."""
    compress_cache(tiny_cache, tmp_path / "packed")
    return tmp_path / "packed"


def dies_at(step: int, work) -> bool:
    """Do some work in a child process that ends before a step of the disk; whether it did."""
    pid = os.fork()
    if pid == 0:
        steps = 0

        def observer(name, path):
            nonlocal steps
            steps += 1
            if steps > step:
                os._exit(9)

        disk.observer = observer
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


@pytest.mark.parametrize("way", ["compress", "expand"])
def test_killed_before_any_step_it_goes_on_to_the_same_bytes(
    packed, tiny_cache, tmp_path, way, monkeypatch
):
    monkeypatch.setattr(transfer, "THREADS", 1)
    call, source = (compress_cache, tiny_cache) if way == "compress" else (expand_cache, packed)
    expected = files_of(packed if way == "compress" else tiny_cache)
    step, out = 0, tmp_path / "out"
    while dies_at(step, lambda: call(source, out)):
        if not (out / "kdcache.json").exists():
            with pytest.raises(FormatError, match=r"nothing there|not a cache|unfinished"):
                open_cache(out)
        call(source, out)
        assert files_of(out) == expected, step
        assert not list(out.rglob(".*")), step
        shutil.rmtree(out)
        step += 1 if step < 10 else 5
    assert step > 80


@pytest.mark.parametrize("step", disk.STEPS)
@pytest.mark.parametrize("way", ["compress", "expand"])
def test_a_failing_disk_is_one_error_and_leaves_nothing_half(
    kinds, tmp_path, way, step, monkeypatch
):
    compress_cache(kinds.root, tmp_path / "packed")
    call, source = (
        (compress_cache, kinds.root) if way == "compress" else (expand_cache, tmp_path / "packed")
    )
    expected = files_of(tmp_path / "packed" if way == "compress" else kinds.root)
    left = 20

    def fail(name, path):
        nonlocal left
        left -= name == step
        if name == step and left == 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "observer", fail)
    with pytest.raises(StorageError, match=r"^[^\n]*: the disk is full[^\n]*$"):
        call(source, tmp_path / "out")
    monkeypatch.setattr(disk, "observer", None)
    call(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected
    assert not list((tmp_path / "out").rglob(".*"))


def damages(packed: Path):
    """Path and bytes of a damaged file: bits flipped, cut, lengthened, exchanged, gone."""
    draw = np.random.default_rng(1)
    files = files_of(packed)
    ours = sorted(path for path in files if path.endswith((".zst", ".zst.json", "transfer.json")))
    for path in ours:
        data = files[path]
        for _ in range(5):
            place = int(draw.integers(8 * len(data)))
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            yield path, bytes(flipped)
        yield path, data[: int(draw.integers(len(data)))]
        yield path, data + b"\0"
        other = files[ours[(ours.index(path) + 1) % len(ours)]]
        yield path, other
        if path != "transfer.json":
            yield path, None


def test_damage_is_found_by_verify_and_by_readers(packed, tiny_cache, tmp_path, monkeypatch):
    expected = labels(tiny_cache)
    count = 0
    for number, (path, data) in enumerate(damages(packed)):
        monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / f"copy-{number}"))
        standing = (packed / path).read_bytes()
        (packed / path).unlink()
        if data is not None:
            (packed / path).write_bytes(data)
        try:
            faults = verify_cache(packed).faults
        except KDCacheError as error:
            faults = [str(error)]
        shown = path.removesuffix(".zst")
        if not path.endswith(".zst.json"):
            assert any(shown in fault for fault in faults), (path, faults)
        assert faults, path
        with contextlib.suppress(KDCacheError):
            assert labels(packed) == expected, path  # of a damaged tokenizer, say
        (packed / path).write_bytes(standing)
        shutil.rmtree(tmp_path / f"copy-{number}", ignore_errors=True)
        count += 1
    assert count > 140
    assert verify_cache(packed).faults == []


def labels(root: Path) -> list[bytes]:
    cache = open_cache(root)
    found = []
    for n in range(cache.num_shards):
        found += [column.fields["id"].tobytes() for column in cache.samples(n).streams.values()]
        for _, _, columns in cache.signal_shard("logits", n).parts:
            found += [v.tobytes() for c in columns.values() for v in c.fields.values()]
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"xxh3": "0" * 16}, r"zst: xxh3 [0-9a-f]{16}, expected 0{16}"),
        ({"crc32c": "0" * 8}, r"zst: crc32c [0-9a-f]{8}, expected 0{8}"),
        ({"bytes": 5}, r"zst: \d+ bytes, expected 5"),
    ],
    ids=["xxh3", "crc32c", "bytes"],
)
def test_the_compressed_bytes_are_compared_too(packed, change, said):
    path = compressed_path("logits", 0)
    [file] = read_record(CompressedFiles, LocalStore(packed), path).files
    changed = CompressedFiles(files=[file.model_copy(update=change)])
    (packed / path).write_bytes(encode_record(changed))
    [fault] = verify_cache(packed).faults
    assert re.search(said, fault)
    store = open_store(packed)
    with pytest.raises(IntegrityError, match=said):
        list(store.pieces(file.path.removesuffix(".zst")))


def test_sizes_alone_tell_of_a_file_that_was_cut(packed):
    [file] = read_record(CompressedFiles, LocalStore(packed), compressed_path("logits", 0)).files
    os.truncate(packed / file.path, file.bytes - 1)
    with pytest.raises(IntegrityError, match=f"{file.bytes - 1} bytes, expected {file.bytes}"):
        open_store(packed).size(file.path.removesuffix(".zst"))


@pytest.mark.parametrize("change", [-8, 8, 1 << 40], ids=["less", "more", "vast"])
def test_a_record_that_lies_about_the_size_is_found(packed, change):
    path = compressed_path("logits", 0)
    record = read_record(CompressedFiles, LocalStore(packed), path)
    files = [f.model_copy(update={"expands_to": f.expands_to + change}) for f in record.files]
    (packed / path).write_bytes(encode_record(CompressedFiles(files=files)))
    [fault, *_] = verify_cache(packed).faults
    assert "logits/00000.0" in fault
    with pytest.raises(IntegrityError, match=r"expands to .*, expected"):
        open_cache(packed).signal_shard("logits", 0)


def test_a_bomb_is_cut_off(packed, monkeypatch):
    """A small file that expands to much more than its record says."""
    path = compressed_path("logits", 0)
    store = LocalStore(packed)
    [file] = read_record(CompressedFiles, store, path).files
    data = b"".join(compressed((bytes(1 << 20) for _ in range(64)), 3))
    (packed / file.path).write_bytes(data)
    forged = file.model_copy(update=digest_bytes(data, file.path).model_dump())
    (packed / path).write_bytes(encode_record(CompressedFiles(files=[forged])))
    taken = []
    with pytest.raises(IntegrityError, match="expands to more, expected"):
        taken += open_store(packed).pieces(file.path.removesuffix(".zst"))
    assert len(taken) <= 1


@pytest.mark.parametrize("way", ["compress", "expand"])
def test_damaged_files_are_not_copied(packed, tiny_cache, tmp_path, way):
    root = tiny_cache if way == "compress" else packed
    file = next(iter(sorted((root / "logits").iterdir())))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    call = compress_cache if way == "compress" else expand_cache
    with pytest.raises(IntegrityError, match=file.name.removesuffix(".zst")):
        call(root, tmp_path / "out")
    commits = {path.name for path in (tmp_path / "out/commits").iterdir()}
    assert "logits.00000.json" not in commits
    assert not (tmp_path / "out/kdcache.json").exists()
