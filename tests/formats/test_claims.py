"""Claims of writers: who writes what, and that only what a dead one left is removed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.errors import FormatError, IdentityError, IntegrityError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.listing import read_signal
from kdcache.formats.stores import claims
from kdcache.formats.stores.commit import take_claim
from kdcache.formats.writer import CacheWriter
from tests.formats.labels import make_cache
from tests.formats.observing import Observed
from tests.formats.test_writer import batch, commit_of, declare, tree

LOCKS = ".locks"


def litter(root: Path, shard: int, pid: int = 7) -> set[str]:
    """What a writer of a shard may leave behind that was killed at any step."""
    left = {
        f"logits/{shard:05d}.0-{'a' * 16}.arrow",
        f"logits/{shard:05d}.1-{'b' * 16}.arrow",
        f"logits/.tmp-{pid}-{shard:05d}.2.arrow",
        f"logits/.tmp-{pid}-{shard:05d}.0.zarr/values/zarr.json",
        f"commits/.tmp-{pid}-logits.{shard:05d}.json",
    }
    for path in left:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"half")
    return left


def test_two_writers_share_a_cache_and_no_shard(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as first, CacheWriter(tmp_path / "cache") as second:
        declare(first)
        declare(second)
        with first.claimed("logits", 0) as mine, second.claimed("logits", 0) as theirs:
            assert (mine, theirs) == (True, False)
            with second.claimed("logits", 1) as other, first.claimed("logits") as whole:
                assert (other, whole) == (True, True)
                parts = [
                    writer.write_part("logits", number, 0, number, number + 1, batch(number))
                    for number, writer in enumerate((first, second))
                ]
                for number, writer in enumerate((first, second)):
                    writer.commit(commit_of(parts[number], shard=number))
        with second.claimed("logits", 0) as theirs:
            assert theirs
            assert second.is_committed("logits", 0)
        assert first.committed("logits") == second.committed("logits") == {0, 1}
    assert os.listdir(tmp_path / "cache" / LOCKS) == []


def write_badly(writer: CacheWriter) -> None:
    """Begin a shard, and fail in its second part."""
    with writer.claimed("logits", 2):
        writer.write_part("logits", 2, 0, 3, 4, batch(4))
        writer.write_part("logits", 2, 1, 4, 5, batch(4, 5))


def test_what_is_not_committed_under_a_claim_goes_with_it(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        with writer.claimed("logits", 0):
            kept = writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))
            writer.commit(commit_of(kept))
        with writer.claimed("logits", 1):
            writer.write_part("logits", 1, 0, 2, 3, batch(3))
        with pytest.raises(FormatError, match="2 rows"):
            write_badly(writer)
        assert os.listdir(root / "logits") == [Path(kept.files[0].path).name]
        assert writer.commit_record("logits", 0).parts == [kept]


def test_a_claim_sweeps_its_own_shard_alone(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        kept = writer.write_part("logits", 1, 0, 0, 2, batch(1, 2))
        writer.commit(commit_of(kept, shard=1))
    before = tree(root)
    # 10001: a name that ends as another's does; 1: what its commit names stays.
    left = {number: litter(root, number) for number in (0, 1, 2, 10001)}
    (root / "logits" / "notes.txt").write_bytes(b"the user's own")
    with CacheWriter(root) as writer:
        pass
    everything = set(tree(root))
    assert everything == {*before, "logits/notes.txt", *set().union(*left.values())}
    (root / LOCKS / "logits.00001").touch()
    with CacheWriter(root) as writer:
        assert set(tree(root)) == everything - left[1]
        with writer.claimed("logits", 2):
            pass
        assert set(tree(root)) == everything - left[1] - left[2]
    assert {path: data for path, data in tree(root).items() if path in before} == before


def test_who_takes_a_dead_ones_claim_sweeps_before_it_writes(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        alone, dead = litter(root, 0), litter(root, 1)
        (root / LOCKS / "logits.00001").touch()  # it died after we came
        with writer.claimed("logits", 1) as mine:
            assert mine
            assert not dead & set(tree(root))
        with writer.claimed("logits", 0) as mine:
            assert mine
            assert alone < set(tree(root))  # its claim was given back, so nobody died
        assert not alone & set(tree(root))


@pytest.mark.parametrize("signal_name", ["logits", "logit", "other"])
def test_a_signals_claim_sweeps_its_own_record_alone(tmp_path: Path, signal_name: str) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        # Another process is between writing its record and giving it its name.
        alive = root / "signals" / ".tmp-7-logits.json"
        alive.write_bytes(b"whole")
        with writer.claimed(signal_name):
            pass
        assert alive.exists() == (signal_name != "logits")


def test_the_claim_of_a_live_writer_is_not_swept(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        with writer.claimed("logits", 3):
            loose = writer.write_part("logits", 3, 0, 0, 1, batch(1))
            left = litter(root, 3)
            with CacheWriter(root) as other, other.claimed("logits", 3) as mine:
                assert not mine
            assert left < set(tree(root))
            assert (root / loose.files[0].path).exists()
        assert not left & set(tree(root))


DYING = """
import os, signal, sys
from pathlib import Path
from kdcache.formats.stores import disk
from kdcache.formats.listing import read_signal
from kdcache.formats.writer import CacheWriter
from tests.formats.test_writer import batch, commit_of, declare

root, step, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def observe(found, path):
    if found == step and path.relative_to(root).as_posix().endswith(name):
        os.kill(os.getpid(), signal.SIGKILL)

with CacheWriter(root) as writer:
    declare(writer)
    with writer.claimed("logits", 0):
        writer.commit(commit_of(writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))))
    disk.observer = observe
    with writer.claimed("logits", 1):
        part = writer.write_part("logits", 1, 0, 2, 3, batch(3))
        writer.commit(commit_of(part, shard=1))
"""
CLAIM, HALF = ".locks/logits.00001", "logits/.tmp-00001.0.arrow"
DATA, RECORD = "logits/00001.0.arrow", "commits/logits.00001.json"
HALF_RECORD = "commits/.tmp-logits.00001.json"


def of_shard_one(root: Path) -> set[str]:
    """Files of shard 1, without what changes from run to run."""
    found = [path for path in tree(root) if "00001" in path and "samples" not in path]
    return {re.sub(r"(tmp-)\d+-|-[0-9a-f]{16}", r"\1", path) for path in found}


@pytest.mark.parametrize(
    ("step", "name", "left"),
    [
        ("create", CLAIM, []),
        ("sync_folder", ".locks", [CLAIM]),
        ("create", "-00001.0.arrow", [CLAIM]),
        ("write", "-00001.0.arrow", [CLAIM, HALF]),
        ("rename", ".arrow", [CLAIM, HALF]),
        ("sync_folder", "logits", [CLAIM, DATA]),
        ("create", "-logits.00001.json", [CLAIM, DATA]),
        ("link", RECORD, [CLAIM, DATA, HALF_RECORD]),
        ("unlink", "-logits.00001.json", [CLAIM, DATA, HALF_RECORD, RECORD]),
        ("unlink", CLAIM, [CLAIM, DATA, RECORD]),
    ],
)
def test_what_a_killed_writer_left_is_swept_by_the_next(
    tmp_path: Path, step: str, name: str, left: list[str]
) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    done = subprocess.run([sys.executable, "-c", DYING, str(root), step, name], check=False)
    assert done.returncode == -signal.SIGKILL
    assert of_shard_one(root) == set(left)
    others = {path: data for path, data in tree(root).items() if "00001" not in path}
    with CacheWriter(root) as writer:
        assert writer.is_committed("logits", 1) == (RECORD in left)
    assert of_shard_one(root) == ({DATA, RECORD} if RECORD in left else set())
    assert {path: data for path, data in tree(root).items() if "00001" not in path} == others


def test_a_damaged_commit_stops_the_sweep_of_its_shard(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        writer.commit(commit_of(writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))))
    commit = root / "commits" / "logits.00000.json"
    commit.write_bytes(commit.read_bytes()[:-1])
    (root / LOCKS / "logits.00000").touch()
    before = tree(root)
    with pytest.raises(IntegrityError, match=r"logits\.00000\.json"):
        CacheWriter(root).__enter__()
    # Nothing was removed that the commit may have named, and nobody holds the claim.
    assert {**tree(root), f"{LOCKS}/logits.00000": b""} == before
    claim = take_claim(root / LOCKS / "logits.00000")
    assert claim is not None
    claim.release()


def test_a_sweep_that_the_disk_refuses_gives_the_claim_back(
    tmp_path: Path, observed: Observed
) -> None:
    root = make_cache(tmp_path / "cache", codecs={})
    with CacheWriter(root) as writer:
        declare(writer)
        left = litter(root, 0)
        observed.fail("unlink", OSError(5, "Input/output error"))
        with pytest.raises(StorageError, match="cannot be written"), writer.claimed("logits", 0):
            pass
        with writer.claimed("logits", 0) as mine:
            assert mine
        assert not left & set(tree(root))


def test_whoever_commits_first_has_made_the_shard(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with CacheWriter(root) as first, CacheWriter(root) as second:
        declare(first)
        mine = first.write_part("logits", 0, 0, 0, 2, batch(1, 2))
        same = first.write_part("logits", 0, 1, 2, 3, batch(3))
        theirs = second.write_part("logits", 0, 0, 0, 2, batch(1, 7))
        rest = second.write_part("logits", 0, 1, 2, 3, batch(3))
        assert same == rest
        standing = first.commit(commit_of(mine, stop=3, parts=[mine, same], entries={"tokens": 5}))
        found = second.commit(
            commit_of(theirs, stop=3, parts=[theirs, rest], entries={"tokens": 6})
        )
        assert found == standing
        assert second.commit_record("logits", 0) == standing
    assert sorted(os.listdir(root / "logits")) == sorted(
        Path(part.files[0].path).name for part in (mine, same)
    )


def test_samples_may_not_differ(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with CacheWriter(root) as first, CacheWriter(root) as second:
        mine = first.write_part("samples", 0, 0, 0, 2, batch(1, 2))
        theirs = second.write_part("samples", 0, 0, 0, 2, batch(1, 7))
        first.commit(commit_of(mine, signal="samples"))
        with pytest.raises(IdentityError, match=r"samples\.00000\.json: parts\.0\.files\.0\.path"):
            second.commit(commit_of(theirs, signal="samples"))
        assert second.commit_record("samples", 0).parts == [mine]


def test_a_commit_says_which_record_it_was_made_under(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        part = writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))
        with pytest.raises(FormatError, match="no signal 'logits' in the cache"):
            writer.commit(commit_of(part))
        declare(writer)
        found = writer.commit(commit_of(part)).record
        assert found == read_signal(writer.store, "logits").digest


def test_a_wait_ends_when_the_holder_gives_the_claim_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.001)
    with CacheWriter(tmp_path / "cache") as first, CacheWriter(tmp_path / "cache") as second:
        claim = first.claim("samples")
        assert claim is not None
        looks: list[int] = []

        def waiting() -> None:
            looks.append(1)
            if len(looks) == 3:
                first.release(claim, "samples")

        got = second.wait("samples", waiting)
        assert got is not None
        assert len(looks) == 3
        assert first.wait("samples", until=lambda: True) is None
        second.release(got, "samples")
        free = first.wait("samples", until=lambda: True)
        assert free is not None
        first.release(free, "samples")


def test_the_manifest_of_another_process_is_found(tiny_cache: Path, tmp_path: Path) -> None:
    manifest = open_cache(tiny_cache).manifest
    with CacheWriter(tmp_path / "x") as first, CacheWriter(tmp_path / "x") as second:
        assert second.reread() is None
        first.write_manifest(manifest)
        assert second.manifest is None
        assert second.reread() == manifest
