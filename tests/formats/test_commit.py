"""Files that appear whole or not at all; the lock."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.errors import StorageError
from kdcache.formats import commit
from kdcache.formats.commit import Lock, create_file, is_temporary, write_data


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_create_file_creates_once(tmp_path: Path) -> None:
    target = tmp_path / "deeper" / "a.json"
    create_file(target, b"one")
    with pytest.raises(FileExistsError):
        create_file(target, b"two")
    assert target.read_bytes() == b"one"
    assert names(target.parent) == ["a.json"]


RACER = """
import sys, pathlib
from kdcache.formats.commit import create_file
go, target = map(pathlib.Path, sys.argv[1:3])
while not go.exists():
    pass
try:
    create_file(target, sys.argv[3].encode() * 1000)
    print("won")
except FileExistsError:
    print("lost")
"""


def test_of_racing_processes_one_wins_and_the_file_is_whole(tmp_path: Path) -> None:
    go, target = tmp_path / "go", tmp_path / "records" / "a.json"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(go), str(target), letter],
            stdout=subprocess.PIPE,
            text=True,
        )
        for letter in "abc"
    ]
    go.touch()
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    winner = "abc"[said.index("won")]
    assert sorted(said) == ["lost", "lost", "won"]
    assert target.read_text() == winner * 1000
    assert names(target.parent) == ["a.json"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(commit.os, "fsync", refuse)
    target = tmp_path / "a.json"
    with pytest.raises(StorageError, match=message) as caught:
        create_file(target, b"one")
    assert "\n" not in str(caught.value)
    assert str(target) in str(caught.value)
    with pytest.raises(StorageError, match=message):
        write_data(target, lambda stream: (stream.write(b"x"), target)[1])
    assert names(tmp_path) == []


def test_write_data_takes_its_name_from_what_was_written(tmp_path: Path) -> None:
    def write(stream) -> Path:
        stream.write(b"abc")
        assert all(is_temporary(name) for name in names(tmp_path))
        return tmp_path / "named-by-content"

    assert write_data(tmp_path / "a", write) == tmp_path / "named-by-content"
    assert names(tmp_path) == ["named-by-content"]


def test_write_data_removes_its_temporary_when_the_writer_fails(tmp_path: Path) -> None:
    def write(stream) -> Path:
        stream.write(b"abc")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_data(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_lock_is_exclusive_and_given_back(tmp_path: Path) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    with pytest.raises(StorageError, match="another dump is writing here"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    second.release()


def test_a_lock_whose_file_was_taken_away_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path)
    first.acquire()
    real = commit.fcntl.flock

    def leave_first(handle: int, how: int) -> None:
        first.remove()
        first.release()
        real(handle, how)

    monkeypatch.setattr(commit.fcntl, "flock", leave_first)
    with pytest.raises(StorageError, match="has just left here"):
        second.acquire()
    monkeypatch.undo()
    second.acquire()
    second.release()
