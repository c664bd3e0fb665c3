"""A disk that refuses: one clear line, nothing wrong stands, and the same command goes on.

`benchmarks/bench_faults.py` lets it refuse every step.
"""

import errno
import os
import random

import pytest

from kdcache.errors import StorageError
from kdcache.formats.stores import disk
from kdcache.formats.stores.claims import Claims
from kdcache.formats.stores.commit import create_file
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import CLAIMS
from kdcache.formats.writer import CacheWriter
from tests.dump.injection import Injection, Step
from tests.dump.verdicts import clear_refusal, step_kinds

ERRORS = ("ENOSPC", "EIO", "EACCES")


def chosen(ordeal, name: str, number: int) -> Step:
    steps = [step for step in step_kinds(ordeal.steps)[name] if not step.optional]
    return steps[random.Random(f"{name} refused {number}").randrange(len(steps))]


@pytest.mark.parametrize("name", disk.STEPS)
def test_one_refusal(name, ordeal):
    number = disk.STEPS.index(name)
    problems = ordeal.refused(Injection(chosen(ordeal, name, 0), ERRORS[number % 3]))
    assert not problems, str(problems)


@pytest.mark.parametrize(("name", "error"), [("write", "ENOSPC"), ("fsync", "EIO")])
def test_everything_is_refused_from_then_on(name, error, ordeal):
    step = chosen(ordeal, name, 1)
    problems = ordeal.refused(Injection(step, error, lasting=True, torn=name == "write"))
    assert not problems, str(problems)


def test_a_status_that_cannot_be_written_is_not_worth_a_dump(ordeal):
    step = next(step for step in ordeal.steps if step.optional and step.name == "fsync")
    problems = ordeal.refused(Injection(step, "ENOSPC"))
    assert not problems, str(problems)


@pytest.mark.parametrize(
    ("step", "name", "advice"),
    [
        (Step("write", "logits/.tmp-00001.0.arrow", 2), "ENOSPC", "the disk is full; free some"),
        (Step("create", ".locks/samples", 0), "EACCES", "no permission to write; choose another"),
        (Step("fsync", ".tmp-kdcache.json", 0), "EIO", "Input/output error; mend that and run the"),
    ],
)
def test_what_is_said(step, name, advice, ordeal):
    out = ordeal.new()
    ended = ordeal.run(out, injection=Injection(step, name))
    assert clear_refusal(ended, out, step)
    assert f"{step.path.replace('.tmp-', '')}: cannot be written: {advice}" in ended.messages[0]


@pytest.fixture
def refuse(monkeypatch):
    """Let a step refuse paths that end in something."""

    def start(name: str, end: str) -> None:
        def observe(step, path):
            if step == name and str(path).endswith(end):
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(disk, "observer", observe)

    return start


def test_a_record_is_not_written_into_through_its_other_name(tmp_path):
    """A process of the same number (in a container it is always 1) was killed after the link."""
    path = tmp_path / "commits" / "logits.00000.json"
    create_file(path, b"first")
    os.link(path, path.parent / f".tmp-{os.getpid()}-{path.name}")
    with pytest.raises(FileExistsError):
        create_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == [path.name]


def test_a_sweep_that_fails_is_done_by_the_next(tiny_cache, refuse, monkeypatch):
    left = tiny_cache / "logits" / "00001.0-0123456789abcdef.arrow"
    left.write_bytes(b"left over")
    (tiny_cache / CLAIMS).mkdir(exist_ok=True)
    (tiny_cache / CLAIMS / "logits.00001").touch()
    refuse("unlink", left.name)
    for _ in range(2):  # the second time the claim must be free, and known to be stale
        with pytest.raises(StorageError, match=r"abcdef.arrow: cannot be written: Input"):
            Claims(LocalStore(tiny_cache)).claim("logits", 1)
        with pytest.raises(StorageError, match=r"abcdef.arrow: cannot be written: Input"):
            CacheWriter(tiny_cache).__enter__()
    monkeypatch.setattr(disk, "observer", None)
    with CacheWriter(tiny_cache):
        assert not left.exists()
    assert os.listdir(tiny_cache / CLAIMS) == []


def test_a_temporary_that_cannot_be_removed_is_removed_later(tiny_cache, refuse, monkeypatch):
    """The commit stands, its other name could not be taken away: the shard is not clean."""
    path = tiny_cache / "commits" / "logits.00000.json"
    data = path.read_bytes()
    path.unlink()
    with CacheWriter(tiny_cache) as writer:
        refuse("unlink", "00000.json")
        with pytest.raises(StorageError), writer.claimed("logits", 0):
            writer.store.create("commits/logits.00000.json", data)
        monkeypatch.setattr(disk, "observer", None)
    assert len(list(path.parent.glob(".tmp-*"))) == 1
    with CacheWriter(tiny_cache):
        pass
    assert list(path.parent.glob(".tmp-*")) == []
    assert path.read_bytes() == data


def test_new_folders_are_made_durable(tmp_path, monkeypatch):
    """A file that was synced is lost all the same if its folder's own name is."""
    seen = []
    monkeypatch.setattr(disk, "observer", lambda step, path: seen.append((step, path)))
    create_file(tmp_path / "a" / "b" / "c", b"")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        made = seen.index(("mkdir", folder))
        assert ("sync_folder", folder.parent) in seen[made:]
