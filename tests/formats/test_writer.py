"""CacheWriter: what is committed stands, what is not is swept, identity is enforced."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdcache.errors import FormatError, IdentityError, IntegrityError, StorageError
from kdcache.formats import data_files
from kdcache.formats.cache import open_cache
from kdcache.formats.codec import TopKCodec
from kdcache.formats.manifest import CommitRecord, Manifest, PartRecord
from kdcache.formats.signals import LogitsRecord
from kdcache.formats.stores.commit import take_claim
from kdcache.formats.writer import CacheWriter
from tests.formats.labels import SENTENCES, make_cache, teacher_record, tokenizer_files

SCHEMA = pa.schema([pa.field("x", pa.int64(), nullable=False)])


def batch(*values: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(values, type=pa.int64())], schema=SCHEMA)


def commit_of(part: PartRecord, **changes: object) -> CommitRecord:
    fields = {
        "signal": "logits",
        "shard": 0,
        "start": part.start,
        "stop": part.stop,
        "tokens": 1,
        "entries": {},
        "parts": [part],
    }
    return CommitRecord.model_validate(fields | changes)


def declare(writer: CacheWriter, name: str = "logits") -> None:
    """Write the record of a signal, which its commits need."""
    writer.write_signal(
        LogitsRecord(
            name=name,
            at="targets",
            stream="tgt",
            source="src",
            stream_digest="0" * 32,
            source_digest="1" * 32,
            vocab_size=12,
            codec=TopKCodec(k=3),
            temperatures=(1.0,),
            seed=1,
            teacher=teacher_record(),
            recipe={},
            versions={},
        )
    )


def tree(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_the_same_cache_is_the_same_bytes_and_writing_it_again_changes_nothing(
    tmp_path: Path,
) -> None:
    first, second = make_cache(tmp_path / "a"), make_cache(tmp_path / "b")
    assert tree(first) == tree(second)
    make_cache(first)
    assert tree(first) == tree(second)


def test_a_killed_and_resumed_dump_equals_one_that_was_not(tmp_path: Path) -> None:
    whole = make_cache(tmp_path / "whole")
    resumed = make_cache(tmp_path / "resumed", skip_commits=[("logits", 1), ("samples", 2)])
    assert tree(resumed) != tree(whole)
    make_cache(resumed)
    assert tree(resumed) == tree(whole)


def begin_and_die(root: Path, commit: bool) -> None:
    with CacheWriter(root) as writer, writer.claimed("samples") as mine:
        assert mine
        writer.put_tokenizer("teacher", tokenizer_files(5))
        if commit:
            writer.commit(
                commit_of(writer.write_part("samples", 0, 0, 0, 1, batch(1)), signal="samples")
            )
        writer.write_part("samples", 1, 0, 1, 3, batch(2, 3))
        raise RuntimeError("teacher died")


def test_leaving_by_an_exception_commits_nothing_and_removes_what_is_not_committed(
    tmp_path: Path,
) -> None:
    root = tmp_path / "cache"
    with pytest.raises(RuntimeError, match="teacher died"):
        begin_and_die(root, commit=True)
    assert os.listdir(root / "commits") == ["samples.00000.json"]
    (kept,) = os.listdir(root / "samples")
    assert kept.startswith("00000.0-")
    assert os.listdir(root / ".locks") == []


def test_the_next_sweeps_what_a_dead_writer_left_of_the_samples(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with CacheWriter(root) as writer:
        kept = writer.write_part("samples", 0, 0, 0, 1, batch(1))
        writer.commit(commit_of(kept, signal="samples"))
        loose = writer.write_part("samples", 1, 0, 1, 3, batch(2, 3))
    (root / "samples" / ".tmp-1-x").write_bytes(b"half")
    (root / "commits" / ".tmp-1-samples.00001.json").write_bytes(b"half")
    (root / ".tmp-1-kdcache.json").write_bytes(b"half")
    (root / "samples" / "notes.txt").write_bytes(b"the user's own")
    (root / ".locks").mkdir()
    with CacheWriter(root):
        assert (root / loose.files[0].path).exists()  # nobody says that its writer died
    (root / ".locks" / "samples").touch()
    with CacheWriter(root) as writer:
        assert writer.committed("samples") == {0}
        assert sorted(tree(root)) == sorted(
            ["commits/samples.00000.json", kept.files[0].path, "samples/notes.txt"]
        )


@pytest.mark.parametrize("made", [False, True], ids=["made by us", "there before"])
def test_a_dump_that_committed_nothing_leaves_nothing(tmp_path: Path, made: bool) -> None:
    root = tmp_path / "cache"
    if made:
        root.mkdir()
    with pytest.raises(RuntimeError, match="teacher died"):
        begin_and_die(root, commit=False)
    assert os.listdir(tmp_path) == (["cache"] if made else [])
    assert not made or os.listdir(root) == []


def test_the_status_of_a_dump_that_committed_nothing_goes_with_it(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        writer.store.replace(".status/00000-of-00001.json", b"{}")
    assert os.listdir(tmp_path) == []


def test_nothing_is_taken_away_while_another_writer_is_at_work(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as first:
        with CacheWriter(tmp_path / "cache") as second, second.claimed("samples"):
            first.__exit__(None, None, None)
            assert os.listdir(tmp_path / "cache") == [".locks"]
            assert second.store.claim("samples") is None
        assert os.listdir(tmp_path / "cache") == []  # the second did not make the folder


def test_a_committed_part_must_be_given_the_same_again(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        declare(writer)
        part = writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))
        writer.commit(commit_of(part))
        before = tree(tmp_path)
        assert writer.write_part("logits", 0, 0, 0, 2, batch(1, 2)) == part
        with pytest.raises(IdentityError, match="shard 0 part 0 holds xxh3"):
            writer.write_part("logits", 0, 0, 0, 2, batch(1, 3))
        with pytest.raises(IdentityError, match="no such part"):
            writer.write_part("logits", 0, 1, 2, 3, batch(1))
        assert tree(tmp_path) == before


def test_commits_are_create_only(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        declare(writer)
        part = writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))
        record = writer.commit(commit_of(part))
        assert writer.commit(record) == record
        with pytest.raises(IdentityError, match="tokens: 1 in the cache, 9 given"):
            writer.commit(commit_of(part, tokens=9))
        assert writer.commit_record("logits", 0) == record
        with pytest.raises(IntegrityError, match="shard 7 of 'logits' is not committed"):
            writer.commit_record("logits", 7)


def test_a_commit_needs_its_files(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        declare(writer)
        part = writer.write_part("logits", 0, 0, 0, 2, batch(1, 2))
        (tmp_path / "cache" / part.files[0].path).unlink()
        with pytest.raises(IntegrityError, match="missing"):
            writer.commit(commit_of(part))
        assert writer.committed("logits") == set()


def test_a_part_has_the_rows_it_says(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer, pytest.raises(FormatError, match="2 rows"):
        writer.write_part("logits", 0, 0, 0, 3, batch(1, 2))


@pytest.mark.parametrize("other", ["notes.txt", "samples"])
def test_a_directory_of_other_things_is_refused_and_left_alone(tmp_path: Path, other: str) -> None:
    (tmp_path / other).mkdir()
    with pytest.raises(StorageError, match=rf"already holds other files \({other}\)"):
        CacheWriter(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [other]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(StorageError, match="output is a file"):
        CacheWriter(tmp_path / "out").__enter__()


def test_a_damaged_manifest_stops_the_writer(tiny_cache: Path) -> None:
    (tiny_cache / "kdcache.json").write_bytes(b"{}")
    (tiny_cache / ".locks" / "logits.00001").touch()
    before = tree(tiny_cache)
    with pytest.raises(IntegrityError, match=r"kdcache\.json"):
        CacheWriter(tiny_cache).__enter__()
    assert tree(tiny_cache) == before
    claim = take_claim(tiny_cache / ".locks" / "logits.00001")
    assert claim is not None
    claim.release()


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EIO, "error")],
)
def test_a_disk_that_fails_in_mid_shard_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    class FullDisk(data_files.DigestingSink):
        def write(self, data: object) -> int:
            if self.digester.bytes > 300:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    with CacheWriter(tmp_path / "cache") as writer:
        monkeypatch.setattr(data_files, "DigestingSink", FullDisk)
        with pytest.raises(StorageError, match=message) as caught:
            writer.write_part("logits", 0, 0, 0, 2000, batch(*range(2000)))
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache" / "logits").iterdir()) == []
        monkeypatch.undo()
        writer.write_part("logits", 0, 0, 0, 2000, batch(*range(2000)))


def test_an_output_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="read-only; choose another output"):
        CacheWriter(tmp_path / "cache").__enter__()


def changed(record: LogitsRecord, **changes: object) -> LogitsRecord:
    return record.model_copy(update=changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: changed(r, codec=TopKCodec(k=3)),
            "codec.name: 'threshold' in the cache, 'topk'",
        ),
        (
            lambda r: changed(r, teacher=teacher_record("12" * 16)),
            "teacher.digest: 'cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd' in the cache, '1212",
        ),
        (lambda r: changed(r, stream_digest="9" * 32), "stream_digest: "),
        (lambda r: changed(r, seed=2), "seed: 1 in the cache, 2 given"),
        (lambda r: changed(r, temperatures=(1.0,)), "temperatures.0: 0.5 in the cache, 1.0 given"),
    ],
    ids=["codec", "teacher", "stream", "seed", "temperatures"],
)
def test_a_signal_of_another_identity_shows_both_sides(
    tiny_cache: Path, change: Callable[[LogitsRecord], LogitsRecord], message: str
) -> None:
    standing = open_cache(tiny_cache).signals["logits"]
    before = tree(tiny_cache)
    with CacheWriter(tiny_cache) as writer, pytest.raises(IdentityError, match=message):
        writer.write_signal(change(standing))
    assert tree(tiny_cache) == before


def test_what_does_not_identify_may_differ_and_the_first_stands(tiny_cache: Path) -> None:
    standing = open_cache(tiny_cache).signals["logits"]
    moved = standing.teacher.model_copy(update={"path": "elsewhere", "revision": "main"})
    given = changed(standing, teacher=moved, versions={"torch": "9"}, recipe={"batch": 2})
    with CacheWriter(tiny_cache) as writer:
        assert writer.write_signal(given) == standing


def test_another_corpus_or_tokenizer_is_refused(tiny_cache: Path) -> None:
    standing = open_cache(tiny_cache).manifest
    tokenizer = standing.tokenizers["teacher"].model_copy(update={"digest": "0" * 32})
    other = standing.model_copy(update={"tokenizers": {"teacher": tokenizer}})
    with CacheWriter(tiny_cache) as writer:
        assert writer.manifest == standing
        with pytest.raises(IdentityError, match=r"tokenizers\.teacher\.digest: 'abab"):
            writer.write_manifest(other)
        given = standing.model_copy(update={"versions": {"numpy": "9"}, "recipe": {"a": 1}})
        assert writer.write_manifest(given) == standing
        with pytest.raises(IdentityError, match="not 'other'"):
            writer.put_tokenizer("other", {})
        assert writer.put_tokenizer("teacher", {}) == standing.tokenizers["teacher"].files
    texts = {"src": SENTENCES["src"], "tgt": [*SENTENCES["tgt"][:-1], "cc"]}
    with pytest.raises(IdentityError, match="samples shard 2 part 0"):
        make_cache(tiny_cache, sentences=texts)


def test_tokenizer_files_of_a_dump_that_died_are_replaced(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        writer.put_tokenizer("teacher", {"old/deep.txt": b"x", "tokens.json": b"old"})
        records = writer.put_tokenizer("teacher", tokenizer_files(5))
        with pytest.raises(FormatError, match="stays inside the cache"):
            writer.put_tokenizer("teacher", {"../../x": b""})
    assert [record.path for record in records] == [
        "tokenizers/teacher/tokens.json",
        "tokenizers/teacher/vocab.json",
    ]


def test_data_files_are_named_by_their_content(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "cache") as writer:
        part = writer.write_part("logits", 3, 1, 5, 7, batch(1, 2))
        file = tmp_path / "cache" / part.files[0].path
        assert part.files[0].path == f"logits/00003.1-{part.files[0].xxh3}.arrow"
        assert part.files[0].bytes == file.stat().st_size
        with pa.ipc.open_file(file.read_bytes()) as reader:
            assert reader.get_batch(0) == batch(1, 2)


def test_a_manifest_is_kept_after_its_shards(tmp_path: Path) -> None:
    source = make_cache(tmp_path / "a", codecs={})
    copy = tmp_path / "b"
    shutil.copytree(source, copy)
    (copy / "kdcache.json").unlink()
    manifest: Manifest = open_cache(source).manifest
    with CacheWriter(copy) as writer:
        assert writer.manifest is None
        assert writer.committed("samples") == set(range(len(manifest.shards)))
        writer.write_manifest(manifest)
    assert np.array_equal(open_cache(copy).samples(0).row, open_cache(source).samples(0).row)


KILLED = """
import os, signal, sys
from pathlib import Path
from kdcache.formats.stores import disk
from tests.formats.labels import make_cache
left = int(sys.argv[2])

def observe(step, path):
    global left
    if step in ("fsync", "sync_folder"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

disk.observer = observe
make_cache(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("at", [6, 15, 17, 31])
def test_a_dump_killed_in_mid_write_is_resumed_to_the_same_bytes(tmp_path: Path, at: int) -> None:
    whole, killed = make_cache(tmp_path / "whole"), tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(killed), str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert tree(killed) != tree(whole)
    with pytest.raises(FormatError):
        open_cache(killed).require_complete("logits")
    make_cache(killed)
    assert tree(killed) == tree(whole)


def test_a_copy_of_an_unfinished_cache_without_its_claims_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    make_cache(root, codecs={})
    (root / "kdcache.json").unlink()
    shutil.rmtree(root / ".locks")
    with CacheWriter(root) as writer:
        assert writer.committed("samples") == {0, 1, 2}
