"""Files that appear whole or not at all; claims that one process holds at a time."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.errors import StorageError
from kdcache.formats.stores import commit, disk
from kdcache.formats.stores.commit import (
    create_file,
    is_temporary,
    take_claim,
    temporary_of,
    write_data,
    write_directory,
    write_file,
)
from tests.formats.observing import Observed


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
from kdcache.formats.stores.commit import create_file
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


def test_write_directory_replaces_what_stands_and_keeps_no_temporary(tmp_path: Path) -> None:
    def fill(folder: Path, data: bytes) -> Path:
        assert is_temporary(folder.name)
        write_file(folder / "deep" / "a", [memoryview(data)])
        return tmp_path / "named"

    for data in (b"one", b"two"):
        assert (
            write_directory(tmp_path / "hint", lambda f, d=data: fill(f, d)) == tmp_path / "named"
        )
    assert (tmp_path / "named" / "deep" / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["named"]

    def fail(folder: Path) -> Path:
        write_file(folder / "b", [memoryview(b"half")])
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_directory(tmp_path / "hint", fail)
    assert names(tmp_path) == ["named"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (".tmp-12-00003.0.arrow", "00003.0.arrow"),
        (".tmp-12-a-b", "a-b"),
        (".tmp-x-a", None),
        ("00003.0.arrow", None),
        ("a.tmp-1-b", None),
    ],
)
def test_what_a_temporary_stands_for(name: str, expected: str | None) -> None:
    assert temporary_of(name) == expected


def test_a_claim_is_exclusive_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "logits.00003"
    first = take_claim(path)
    assert first is not None
    assert not first.stale
    assert take_claim(path) is None
    other = take_claim(path.with_name("logits.00004"))
    assert other is not None
    first.release()
    assert names(path.parent) == ["logits.00004"]
    again = take_claim(path)
    assert again is not None
    assert not again.stale
    again.release()
    other.release()
    assert names(path.parent) == []


def test_the_file_of_a_dead_holder_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    claim = take_claim(path)
    assert claim is not None
    assert claim.stale
    claim.release()
    claim = take_claim(path)
    assert claim is not None
    assert not claim.stale
    claim.release()


def test_a_claim_may_be_given_back_with_its_work_undone(tmp_path: Path) -> None:
    claim = take_claim(tmp_path / "a")
    assert claim is not None
    claim.release(tidy=False)
    claim = take_claim(tmp_path / "a")
    assert claim is not None
    assert claim.stale
    claim.release()


def test_a_claim_whose_file_was_taken_away_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    first = take_claim(path)
    assert first is not None
    real, calls = commit.fcntl.flock, []

    def leave_first(handle: int, how: int) -> None:
        calls.append(handle)
        if len(calls) == 1:
            first.release()  # after we have opened its file
        real(handle, how)

    monkeypatch.setattr(commit.fcntl, "flock", leave_first)
    second = take_claim(path)
    assert second is not None
    assert len(calls) == 2
    assert path.exists()
    assert take_claim(path) is None
    second.release()


def test_a_claim_that_the_disk_does_not_keep_is_none(tmp_path: Path, observed: Observed) -> None:
    observed.fail("sync_folder", OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(StorageError, match=r"a: cannot be written: Input/output error"):
        take_claim(tmp_path / "a")
    assert names(tmp_path) == []
    claim = take_claim(tmp_path / "a")
    assert claim is not None
    assert not claim.stale
    claim.release()


def test_a_claim_whose_file_stays_is_given_back_and_stale(
    tmp_path: Path, observed: Observed
) -> None:
    claim = take_claim(tmp_path / "a")
    assert claim is not None
    observed.fail("unlink", OSError(errno.EACCES, os.strerror(errno.EACCES)))
    with pytest.raises(StorageError, match="no permission to write"):
        claim.release()
    claim = take_claim(tmp_path / "a")
    assert claim is not None
    assert claim.stale
    claim.release()


@pytest.mark.parametrize("target", ["nowhere", "somewhere"])
def test_a_link_is_no_claim(tmp_path: Path, target: str) -> None:
    (tmp_path / "somewhere").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(target)
    with pytest.raises(StorageError, match="a: cannot be written"):
        take_claim(tmp_path / "a")
    assert (tmp_path / "somewhere").read_bytes() == b"mine"


HOLDER = """
import sys, pathlib, time
from kdcache.formats.stores.commit import take_claim
claim = take_claim(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_process_that_is_killed_holds_nothing_and_leaves_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert take_claim(path) is None
        holder.kill()
    claim = take_claim(path)
    assert claim is not None
    assert claim.stale
    claim.release()


ROUNDS = 50
CLAIMANT = """
import sys, pathlib, time
from kdcache.formats.stores.commit import take_claim
root, me, rounds = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for number in range(rounds):
    go = root / f"go-{number}"
    while not go.exists():
        pass
    claim = take_claim(root / "claims" / f"shard.{number % 2}")
    print("lost" if claim is None else f"won {claim.stale}", flush=True)
    if sys.stdin.readline() == "die\\n" and claim is not None:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    if claim is not None:
        claim.release()
"""


def test_of_two_processes_that_claim_the_same_exactly_one_wins(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMANT, str(tmp_path), name, str(ROUNDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    wins = [0, 0]
    assert [racer.stdout.readline() for racer in racers if racer.stdout] == ["ready\n"] * 2
    for number in range(ROUNDS):
        (tmp_path / f"go-{number}").touch()
        said = [racer.stdout.readline().split() for racer in racers if racer.stdout]
        assert sorted(words[0] for words in said) == ["lost", "won"], number
        wins[0 if said[0][0] == "won" else 1] += 1
        last = number == ROUNDS - 1
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("die\n" if last else "go\n")
            racer.stdin.flush()
    codes = sorted(racer.wait(timeout=60) for racer in racers)
    assert codes == [-signal.SIGKILL, 0]
    assert sum(wins) == ROUNDS
    for racer in racers:
        racer.communicate()
    # Only what the killed one held is left, and it is stale to the next.
    (left,) = names(tmp_path / "claims")
    claim = take_claim(tmp_path / "claims" / left)
    assert claim is not None
    assert claim.stale
    claim.release()


def test_every_step_of_a_write_is_told_before_it_is_done(
    tmp_path: Path, observed: Observed
) -> None:
    create_file(tmp_path / "new" / "a", b"x")
    temporary = f".tmp-{os.getpid()}-a"
    assert observed.steps(tmp_path) == [
        ("mkdir", "new"),
        ("sync_folder", "."),
        ("create", f"new/{temporary}"),
        ("write", f"new/{temporary}"),
        ("fsync", f"new/{temporary}"),
        ("link", "new/a"),
        ("unlink", f"new/{temporary}"),
        ("sync_folder", "new"),
    ]
    assert {step for step, _ in observed.seen} <= set(disk.STEPS)


def test_the_steps_of_a_file_a_folder_a_claim_and_a_removal(
    tmp_path: Path, observed: Observed
) -> None:
    write_data(tmp_path / "a", lambda stream: (stream.write(b"x"), tmp_path / "b")[1])
    temporary = f".tmp-{os.getpid()}-a"
    assert observed.steps(tmp_path) == [
        ("create", temporary),
        ("write", temporary),
        ("fsync", temporary),
        ("rename", "b"),
        ("sync_folder", "."),
    ]
    observed.seen.clear()

    def fill(folder: Path) -> Path:
        write_file(folder / "deep" / "x", [memoryview(b"1"), memoryview(b"2")])
        return tmp_path / "group"

    write_directory(tmp_path / "a", fill)
    assert observed.steps(tmp_path) == [
        ("unlink", temporary),
        ("mkdir", temporary),
        ("mkdir", f"{temporary}/deep"),
        ("create", f"{temporary}/deep/x"),
        ("write", f"{temporary}/deep/x"),
        ("write", f"{temporary}/deep/x"),
        ("fsync", f"{temporary}/deep/x"),
        ("sync_folder", f"{temporary}/deep"),
        ("sync_folder", temporary),
        ("rename", "group"),
        ("sync_folder", "."),
    ]
    observed.seen.clear()
    claim = take_claim(tmp_path / "claims" / "a")
    assert claim is not None
    claim.release()
    assert observed.steps(tmp_path) == [
        ("mkdir", "claims"),
        ("sync_folder", "."),
        ("create", "claims/a"),
        ("sync_folder", "claims"),
        ("unlink", "claims/a"),
    ]
    observed.seen.clear()
    disk.remove(tmp_path / "group")
    assert observed.steps(tmp_path) == [
        ("unlink", "group/deep/x"),
        ("unlink", "group/deep"),
        ("unlink", "group"),
    ]
    assert names(tmp_path) == ["b", "claims"]


@pytest.mark.parametrize("step", ["create", "write", "fsync", "rename", "sync_folder"])
def test_a_step_that_fails_is_one_error_and_leaves_no_temporary(
    tmp_path: Path, observed: Observed, step: str
) -> None:
    observed.fail(step, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(StorageError, match="the disk is full") as caught:
        write_data(tmp_path / "a", lambda stream: (stream.write(b"x"), tmp_path / "b")[1])
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == (["b"] if step == "sync_folder" else [])
