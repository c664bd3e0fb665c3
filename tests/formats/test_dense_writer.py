"""Writing Zarr parts: whole or not at all, named by content, swept when no commit names them."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import IdentityError, IntegrityError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.manifest import part_path
from kdcache.formats.stores import disk
from kdcache.formats.writer import CacheWriter
from tests.formats.kinds import Kinds, make_kinds
from tests.formats.test_dense import record
from tests.formats.test_writer import commit_of, tree


def values(fill: float, rows: int = 700) -> np.ndarray:
    return np.full((rows, 2, 3), fill, dtype=np.float16)


def test_a_group_is_named_by_its_content(tmp_path: Path) -> None:
    scale = np.ones((700, 2), dtype=np.float32)
    with CacheWriter(tmp_path / "cache") as writer:
        part = writer.write_dense_part("hidden", 3, 1, 5, 7, values(1).astype(np.int8), scale)
        folder = part_path("hidden", 3, 1, part.files)
        assert folder.startswith("hidden/00003.1-")
        assert folder.endswith(".zarr")
        assert [file.path.removeprefix(folder + "/") for file in part.files] == [
            "scale/c/0/0",
            "scale/zarr.json",
            "values/c/0/0/0",
            "values/zarr.json",
            "zarr.json",
        ]
        for file in part.files:
            assert (tmp_path / "cache" / file.path).stat().st_size == file.bytes
        assert sorted(os.listdir(tmp_path / "cache/hidden")) == [folder.split("/")[1]]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_group_has_two_files_or_more(tmp_path: Path, rows: int) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        part = writer.write_dense_part("hidden", 0, 0, 0, 1, values(1, rows))
    assert len(part.files) == 2 + rows


def test_a_part_may_be_written_twice_before_its_commit(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        writer.write_signal(record())
        first = writer.write_dense_part("hidden", 0, 0, 0, 2, values(1))
        assert writer.write_dense_part("hidden", 0, 0, 0, 2, values(1)) == first
        writer.commit(commit_of(first, signal="hidden"))


def test_a_committed_group_must_be_given_the_same_again(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        writer.write_signal(record())
        part = writer.write_dense_part("hidden", 0, 0, 0, 2, values(1))
        writer.commit(commit_of(part, signal="hidden"))
        before = tree(tmp_path)
        assert writer.write_dense_part("hidden", 0, 0, 0, 2, values(1)) == part
        with pytest.raises(IdentityError, match="hidden shard 0 part 0 holds xxh3"):
            writer.write_dense_part("hidden", 0, 0, 0, 2, values(2))
        with pytest.raises(IdentityError, match="no such part"):
            writer.write_dense_part("hidden", 0, 1, 2, 3, values(1))
        assert tree(tmp_path) == before


def test_a_commit_needs_every_file_of_its_groups(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        writer.write_signal(record())
        part = writer.write_dense_part("hidden", 0, 0, 0, 2, values(1))
        for file in part.files:
            path = tmp_path / "cache" / file.path
            data = path.read_bytes()
            path.unlink()
            with pytest.raises(IntegrityError, match="missing"):
                writer.commit(commit_of(part, signal="hidden"))
            path.write_bytes(data)
        writer.commit(commit_of(part, signal="hidden"))


def test_sweep_removes_groups_that_no_commit_names(tiny_cache: Path) -> None:
    root = tiny_cache
    with CacheWriter(root) as writer:
        writer.write_signal(record())
        kept = writer.write_dense_part("hidden", 0, 0, 0, 2, values(1))
        writer.commit(commit_of(kept, signal="hidden"))
        loose = writer.write_dense_part("hidden", 1, 0, 2, 3, values(2))
        other = writer.write_dense_part("hidden", 2, 0, 3, 4, values(2))
    for number in (1, 2):
        temporary = root / f"hidden/.tmp-7-0000{number}.0.zarr"
        (temporary / "values").mkdir(parents=True)
        (temporary / "values/zarr.json").write_text("{")
    (root / "hidden/notes").mkdir()
    (root / "hidden/notes/mine.txt").write_text("the user's own")
    with CacheWriter(root) as writer, writer.claimed("hidden", 1):
        pass
    stands = {part_path("hidden", *at) for at in ((0, 0, kept.files), (2, 0, other.files))}
    assert {f"hidden/{name}" for name in os.listdir(root / "hidden")} == stands | {
        "hidden/notes",
        "hidden/.tmp-7-00002.0.zarr",
    }
    assert (root / "hidden/notes/mine.txt").is_file()
    assert not (root / part_path("hidden", 1, 0, loose.files)).exists()
    for file in kept.files:
        assert (root / file.path).is_file()


def test_a_link_to_a_folder_is_unlinked_not_emptied(tiny_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.txt").write_text("x")
    link = tiny_cache / "logits/00001.0-0123456789abcdef.zarr"
    link.symlink_to(tmp_path / "elsewhere")
    (tiny_cache / ".locks/logits.00001").touch()
    with CacheWriter(tiny_cache):
        pass
    assert not link.is_symlink()
    assert (tmp_path / "elsewhere/mine.txt").exists()


@pytest.mark.parametrize("after", range(8))
def test_a_disk_that_fails_in_mid_group_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    left = [after]

    def full(step: str, path: Path) -> None:
        left[0] -= step in ("fsync", "sync_folder")
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with CacheWriter(tmp_path / "cache") as writer:
        writer.write_signal(record())
        monkeypatch.setattr(disk, "observer", full)
        with pytest.raises(StorageError, match="the disk is full") as caught:
            writer.write_dense_part("hidden", 0, 0, 0, 2, values(1))
        monkeypatch.undo()
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "cache/hidden").glob(".tmp*"))
        if after < 7:  # the eighth makes the name durable, after the folder got it
            assert os.listdir(tmp_path / "cache/hidden") == []
        part = writer.write_dense_part("hidden", 0, 0, 0, 2, values(1))
        writer.commit(commit_of(part, signal="hidden"))


def test_the_same_signals_are_the_same_bytes(tmp_path: Path, kinds: Kinds) -> None:
    assert tree(make_kinds(tmp_path / "again").root) == tree(kinds.root)


ONE = ("hidden_int8",)
KILLED = f"""
import os, signal, sys
from pathlib import Path
from kdcache.formats.stores import disk
from tests.formats.kinds import Kinds, make_kinds
step, name = sys.argv[2:]

def observe(found, path):
    if found == step and "hidden_int8" in path.parts and path.name.endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)

disk.observer = observe
make_kinds(Path(sys.argv[1]), only={ONE})
"""


@pytest.mark.parametrize(
    ("step", "name"),
    [
        ("mkdir", "-00001.1.zarr"),
        ("create", "zarr.json"),
        ("write", "0"),
        ("fsync", "0"),
        ("sync_folder", "values"),
        ("rename", ".zarr"),
        ("sync_folder", "hidden_int8"),
    ],
)
def test_a_group_killed_in_mid_write_is_resumed_to_the_same_bytes(
    tmp_path: Path, int8_kinds: Kinds, step: str, name: str
) -> None:
    killed = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(killed), step, name], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((killed / "hidden_int8").iterdir())
    assert not list((killed / "commits").glob("hidden_int8.00001.*"))
    make_kinds(killed, only=ONE)
    assert tree(killed) == tree(int8_kinds.root)


def test_old_signals_stay_as_they_are_when_one_is_added(own_kinds: Kinds, kinds: Kinds) -> None:
    root = own_kinds.root
    for path in [*(root / "commits").glob("hidden.*"), root / "signals/hidden.json"]:
        path.unlink()
    before = {path: data for path, data in tree(root).items() if not path.startswith("hidden/")}
    make_kinds(root)
    after = tree(root)
    assert {path: after[path] for path in before} == before
    assert after == tree(kinds.root)
    open_cache(root).dense_shard("hidden", 0)
