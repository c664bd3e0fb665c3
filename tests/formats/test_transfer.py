"""A cache compressed for the wire: read as it is, expanded to the same bytes, never mistaken."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kdcache.cli import main
from kdcache.errors import (
    FormatError,
    IdentityError,
    RecipeError,
    StorageError,
)
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import SampledCodec, ThresholdCodec
from kdcache.formats.record import read_record
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import open_store
from kdcache.formats.stores.transfer import compress_cache, expand_cache
from kdcache.formats.stores.transfer_store import CompressedFiles, TransferStore
from kdcache.formats.writer import CacheWriter
from tests.formats.damage import read_all
from tests.formats.kinds import Kinds, make_kinds
from tests.formats.labels import make_cache

URL = "memory://bucket/packed"


@pytest.fixture(autouse=True)
def _world(tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", "1GB")


@pytest.fixture
def packed(tiny_cache, tmp_path) -> Path:
    """`tiny_cache`, compressed."""
    compress_cache(tiny_cache, tmp_path / "packed")
    return tmp_path / "packed"


def files_of(root: Path) -> dict[str, bytes]:
    """Path to bytes of all that belongs to a cache."""
    found = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
    return {path: file.read_bytes() for path, file in found.items() if path[0] != "."}


@pytest.mark.parametrize("places", ["local", "remote"])
def test_every_kind_comes_back_bit_for_bit(kinds: Kinds, tmp_path, places):
    where = str(tmp_path / "packed") if places == "local" else URL
    said = compress_cache(kinds.root, where)
    back = expand_cache(where, tmp_path / "again")
    expected = files_of(kinds.root)
    assert files_of(tmp_path / "again") == expected
    records = [path for path in expected if path.split("/")[0] in ("commits", "signals")]
    data = len(expected) - len(records) - 1
    assert said["files"] == back["files"] == data
    assert (
        said["bytes"]
        == back["bytes"]
        == sum(map(len, expected.values()))
        - sum(len(expected[path]) for path in [*records, "kdcache.json"])
    )
    assert said["ratio"] == said["bytes"] / said["compressed_bytes"] > 2


def test_records_stay_and_data_are_listed(kinds: Kinds, tmp_path):
    compress_cache(kinds.root, tmp_path / "packed", level=1)
    expected, found = files_of(kinds.root), files_of(tmp_path / "packed")
    for path, data in expected.items():
        if path.endswith(".json") and path.split("/")[0] in ("commits", "signals", "kdcache.json"):
            assert found.pop(path) == data
    listed = {"transfer.json"}
    for path in [p for p in found if p.endswith(".zst.json")]:
        listed.add(path)
        for file in read_record(CompressedFiles, LocalStore(tmp_path / "packed"), path).files:
            assert len(found[file.path]) == file.bytes
            assert len(expected[file.path.removesuffix(".zst")]) == file.expands_to
            listed.add(file.path)
    assert set(found) == listed
    tree = json.loads((tmp_path / "packed/transfer.json").read_text())
    assert (tree["codec"], tree["level"]) == ("zstd", 1)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_it_is_read_like_the_cache_it_was_made_from(tmp_path, where):
    codecs = {"logits": ThresholdCodec(c=1 / 8), "drawn": SampledCodec(n=5)}
    root = make_kinds(tmp_path / "cache", codecs=codecs).root
    place = str(tmp_path / "packed") if where == "local" else URL
    compress_cache(root, place)
    assert read_all(place) == read_all(root)
    cache, packed = open_cache(root), open_cache(place)
    directories = [each.tokenizer_dir("teacher") for each in (packed, cache)]
    assert files_of(directories[0]) == files_of(directories[1])
    for folder in ("", "samples", "commits", "tokenizers/teacher", "hidden", "nothing"):
        shown = [name for name in cache.store.names(folder) if name != ".locks"]
        assert packed.store.names(folder) == shown
        walked = [path for path in cache.store.walk(folder) if not path.startswith(".locks")]
        assert packed.store.walk(folder) == walked
    for path in packed.store.walk(""):
        assert packed.store.size(path) == cache.store.size(path)
        assert packed.store.read(path) == cache.store.read(path)


def test_verify_reads_it(packed, tiny_cache):
    found, plain = verify_cache(packed), verify_cache(tiny_cache)
    assert (found.faults, found.leftovers, found.files) == ([], [], plain.files)


def test_a_file_is_expanded_once(packed, tmp_path, monkeypatch):
    taken = []
    pieces = LocalStore.pieces

    def counted(self, path, *chunk):
        taken.append(path)
        return pieces(self, path, *chunk)

    monkeypatch.setattr(LocalStore, "pieces", counted)
    for _ in range(2):
        cache = open_cache(packed)
        files = [
            f for n in range(3) for p in cache.commit_record("logits", n).parts for f in p.files
        ]
        cache.store.fetch(files)
        for n in range(3):
            cache.signal_shard("logits", n)
    assert sorted(path for path in taken if path.endswith(".arrow.zst")) == sorted(
        f"{file.path}.zst" for file in files
    )


def test_a_local_copy_smaller_than_the_cache_will_do(tmp_path, monkeypatch):
    sentences = {"src": ["abcab" * 40] * 24, "tgt": ["cabcb" * 30] * 24}
    root = make_cache(tmp_path / "cache", sentences=sentences, shard_tokens=800)
    compress_cache(root, tmp_path / "packed")
    sizes = {f.stat().st_size for f in root.rglob("*.arrow")}
    total = sum(f.stat().st_size for f in root.rglob("*.arrow"))
    monkeypatch.setenv("KDCACHE_LOCAL_COPY_BYTES", str(3 * max(sizes)))
    assert total > 4 * max(sizes)
    cache = open_cache(tmp_path / "packed")
    files = [
        f for n in range(cache.num_shards) for f in cache.commit_record("logits", n).parts[0].files
    ]
    cache.store.fetch(files)  # ahead of need, and no more than half of what fits
    assert 0 < held_bytes(tmp_path / "copy") <= 1.5 * max(sizes)
    plain = open_cache(root)
    for n in range(cache.num_shards):
        for one, other in zip(
            cache.signal_shard("logits", n).parts,
            plain.signal_shard("logits", n).parts,
            strict=True,
        ):
            assert (
                one[2]["exact"].fields["code"].tobytes()
                == other[2]["exact"].fields["code"].tobytes()
            )
    assert 0 < held_bytes(tmp_path / "copy") <= 3 * max(sizes)


def held_bytes(copy: Path) -> int:
    return sum(file.stat().st_size for file in copy.rglob("*.arrow"))


def test_a_path_is_expanded_once_whatever_it_is_called(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for location in (packed, "packed", "./x/../packed", f"file://{packed}"):
        (tmp_path / "x").mkdir(exist_ok=True)
        open_cache(location).samples(0)
    assert len(list((tmp_path / "copy").rglob("*.arrow"))) == 1


def test_the_store_travels_to_other_processes(packed):
    store = pickle.loads(pickle.dumps(open_store(packed)))
    assert isinstance(store, TransferStore)
    assert open_cache(packed).manifest.corpus.num_samples == 8


# ---- going on ----


def test_a_second_run_finds_all_there(packed, tiny_cache, tmp_path):
    before = {p: (packed / p).stat().st_mtime_ns for p in files_of(packed)}
    again = compress_cache(tiny_cache, packed)
    assert (again["shards_written"], again["shards_skipped"]) == (0, 6)
    assert {p: (packed / p).stat().st_mtime_ns for p in files_of(packed)} == before
    expand_cache(packed, tmp_path / "again")
    back = expand_cache(packed, tmp_path / "again")
    assert (back["shards_written"], back["shards_skipped"]) == (0, 6)
    assert again["bytes"] == back["bytes"]


def test_shards_that_are_committed_later_join(tmp_path):
    root = make_cache(tmp_path / "cache", skip_commits=[("logits", 1)])
    first = compress_cache(root, tmp_path / "packed")
    assert first["shards_written"] == 5
    shutil.rmtree(root)
    make_cache(root)
    second = compress_cache(root, tmp_path / "packed")
    assert (second["shards_written"], second["shards_skipped"]) == (1, 5)
    expand_cache(tmp_path / "packed", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(root)


# ---- refusals ----


def test_writers_refuse_it(packed):
    with pytest.raises(StorageError, match=r"compressed for transfer, .*--expand") as error:
        CacheWriter(packed).__enter__()
    assert "\n" not in str(error.value)
    store = open_store(packed)
    file = open_cache(packed).commit_record("samples", 0).parts[0].files[0]
    for call in (
        lambda: store.create("x", b""),
        lambda: store.replace("x", b""),
        lambda: store.put_file("x", lambda stream: "x"),
        lambda: store.put_folder("x", lambda folder: "x"),
        lambda: store.remove(file.path),
        lambda: store.claim("samples"),
    ):
        with pytest.raises(StorageError, match="expand it first"):
            call()
    assert verify_cache(packed).faults == []


def test_what_cannot_be_meant_is_refused(packed, tiny_cache, tmp_path):
    other = make_cache(tmp_path / "other", sentences={"src": ["ab"], "tgt": ["c"]})
    for error, message, call in [
        (RecipeError, "compressed already", lambda: compress_cache(packed, tmp_path / "x")),
        (RecipeError, "level 23, expected 1 to 22", lambda: compress_cache(other, tmp_path, 23)),
        (RecipeError, "not compressed", lambda: expand_cache(tiny_cache, tmp_path / "x")),
        (StorageError, "not a compressed cache", lambda: compress_cache(tiny_cache, other)),
        (StorageError, "not a compressed cache", lambda: compress_cache(tiny_cache, tiny_cache)),
        (StorageError, "a compressed cache; choose", lambda: expand_cache(packed, packed)),
        (IdentityError, "level: 3 in the cache, 4", lambda: compress_cache(tiny_cache, packed, 4)),
        (IdentityError, "corpus: .* in the cache", lambda: compress_cache(other, packed)),
        (IdentityError, "begun from another cache", lambda: expand_cache(packed, other)),
        (FormatError, "nothing there", lambda: compress_cache(tmp_path / "none", tmp_path / "x")),
    ]:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for call, source in ((compress_cache, tiny_cache), (expand_cache, packed)):
        with pytest.raises(StorageError, match=r"it holds notes\.txt"):
            call(source, tmp_path / "mine")
    assert not (tmp_path / "x").exists()


def test_two_at_once_do_not_write_the_same(tiny_cache, tmp_path):
    claim = LocalStore(tmp_path / "out").claim("transfer")
    with pytest.raises(StorageError, match="another process writes it"):
        compress_cache(tiny_cache, tmp_path / "out")
    claim.release()
    compress_cache(tiny_cache, tmp_path / "out")


def test_an_unfinished_one_says_so(packed):
    (packed / "kdcache.json").unlink()
    with pytest.raises(FormatError, match=r"compression is unfinished: .*--compress` again"):
        open_cache(packed)


# ---- the command ----


def test_the_command(tiny_cache, tmp_path, capsys):
    packed, again = str(tmp_path / "packed"), str(tmp_path / "again")
    assert main(["compile", str(tiny_cache), "--out", packed, "--compress", "--level", "9"]) == 0
    assert main(["compile", packed, "--out", again, "--expand", "--json"]) == 0
    out = capsys.readouterr().out
    assert "compressed bytes" in out
    assert files_of(tmp_path / "again") == files_of(tiny_cache)
    assert main(["inspect", packed]) == 0
    assert main(["verify", packed]) == 0
    for words, message in [
        (["--compress", "--count", "3"], "nothing else"),
        (["--expand", "--signals", "logits"], "nothing else"),
        (["--level", "9"], "--compress"),
    ]:
        assert main(["compile", str(tiny_cache), "--out", str(tmp_path / "x"), *words]) == 1
        assert message in capsys.readouterr().err
    assert main(["compile", packed, packed, "--out", str(tmp_path / "x"), "--expand"]) == 1
    assert "one cache" in capsys.readouterr().err
