"""Reading: what was written comes back, and every lack is one clear error."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import kdcache
from kdcache.errors import FormatError, IntegrityError, KDCacheError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import Codec, FullCodec, NucleusCodec, SampledCodec, TopKCodec
from kdcache.formats.identity import sample_id
from kdcache.formats.manifest import CommitRecord, Manifest
from kdcache.formats.ragged import concat
from kdcache.formats.record import Record, encode_record
from kdcache.formats.schema import join_ids
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.window import WindowReader
from tests.formats.labels import (
    SENTENCES,
    THRESHOLD,
    VOCAB,
    code_labels,
    encode,
    make_cache,
    ragged_ids,
    teacher_log_probs,
)

CODECS: dict[str, Codec] = {
    "threshold": THRESHOLD,
    "topk": TopKCodec(k=3, values="float16"),
    "nucleus": NucleusCodec(p=0.9, k_max=5, values="float32"),
    "drawn": SampledCodec(n=5),
    "full": FullCodec(values="float32"),
}


def test_samples_come_back(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    assert (cache.num_samples, cache.num_shards) == (8, 3)
    shards = [cache.samples(number) for number in range(3)]
    for name, texts in SENTENCES.items():
        assert [text for shard in shards for text in shard.text(name).to_pylist()] == texts
        stream = concat([shard.streams[name] for shard in shards])
        expected = [i for text in texts for i in encode(text, name == "tgt")]
        assert join_ids(stream.fields).tolist() == expected
    ids = np.concatenate([shard.sample_id for shard in shards])
    assert [row.tobytes() for row in ids] == [
        sample_id(pair) for pair in zip(*SENTENCES.values(), strict=True)
    ]
    assert np.concatenate([shard.row for shard in shards]).tolist() == list(range(0, 16, 2))
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 3), (3, 6), (6, 8)]


@pytest.mark.parametrize("part_bytes", [1 << 20, 600], ids=["one part", "many parts"])
def test_windows_gather_what_was_coded(tmp_path: Path, part_bytes: int) -> None:
    root = make_cache(tmp_path / "cache", CODECS, part_bytes=part_bytes)
    cache = open_cache(root)
    window = WindowReader(cache, [2, 0], ["src", "tgt"], list(CODECS))
    order = [6, 7, 0, 1, 2]  # samples of the window, over the corpus
    rows = np.array([4, 0, 3, 3, 1])
    picked = np.array(order)[rows]
    assert window.num_samples == 5
    assert window.row.tolist() == [2 * m for m in order]
    targets = [encode(SENTENCES["tgt"][m], True) for m in order]
    assert window.lengths("tgt").tolist() == [len(ids) for ids in targets]
    taken = window.take_stream("tgt", rows)
    assert join_ids(taken.fields).tolist() == [i for row in rows for i in targets[row]]
    stream = ragged_ids([encode(text, True) for text in SENTENCES["tgt"]], VOCAB)
    log_probs = teacher_log_probs(int(stream.offsets[-1]), VOCAB)
    for name, codec in CODECS.items():
        gold = join_ids(stream.fields)
        coded = code_labels(log_probs, gold, stream.lengths, codec, (0.5, 1.0, 2.0))
        found = window.take_signal(name, rows)
        assert set(found) == set(coded)
        for column, expected in coded.items():
            wanted = expected.take(picked)
            assert found[column].offsets.tolist() == wanted.offsets.tolist()
            for key, values in wanted.fields.items():
                np.testing.assert_array_equal(found[column].fields[key], values)
    if part_bytes == 600:
        assert len(cache.commit_record("threshold", 0).parts) > 1


def test_a_vocabulary_of_three_byte_ids(tmp_path: Path) -> None:
    cache = open_cache(
        make_cache(tmp_path / "cache", {"logits": TopKCodec(k=2)}, vocab_size=70_000)
    )
    exact = cache.signal_shard("logits", 0).parts[0][2]["exact"]
    assert set(exact.fields) == {"id", "id_high", "code"}
    assert join_ids(exact.fields).max() > 65_536


def test_an_empty_window(tiny_cache: Path) -> None:
    window = WindowReader(open_cache(tiny_cache), [], ["tgt"], ["logits"])
    assert window.num_samples == 0
    assert window.lengths("tgt").tolist() == []
    assert window.take_signal("logits", np.array([], dtype=np.int64)) == {}


def test_tokens_and_tokenizer(tiny_cache: Path) -> None:
    cache = kdcache.open_cache(str(tiny_cache))
    assert cache.tokens("teacher")[2:6] == ["</s>", "<x>", "a", "b"]
    assert (cache.tokenizer_dir("teacher") / "vocab.json").is_file()
    assert cache.tokenizer("teacher").eos_id == 2


def test_a_cache_of_samples_alone(tmp_path: Path) -> None:
    cache = open_cache(make_cache(tmp_path / "cache", codecs={}))
    assert cache.signals == {}
    assert cache.complete("samples")


def test_files_are_checked_once_per_cache(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.formats import cache as module

    seen = []
    real = module.check_opened
    monkeypatch.setattr(module, "check_opened", lambda *given: seen.append(real(*given)))
    cache = open_cache(tiny_cache)
    for _ in range(3):
        cache.samples(0)
        cache.signal_shard("logits", 1)
    assert len(seen) == 2


def test_a_file_is_mapped_once_while_somebody_reads_it(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    first = WindowReader(cache, [1, 0], ["tgt"], ["logits"])
    files = len(cache._maps)
    held = cache.samples(0).sample_id
    again = WindowReader(cache, [0, 1], ["tgt"], ["logits"])
    assert len(cache._maps) == files == 4  # samples and labels of two shards
    assert np.shares_memory(cache.samples(0).sample_id, held)
    del first
    assert again.num_samples == sum(s.stop - s.start for s in cache.manifest.shards[:2])
    del again, held
    gc.collect()
    assert not cache._maps


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: c.signal("x"), r"cache has no signal 'x'; it has \['logits'\]"),
        (lambda c: c.stream("x"), r"cache has no stream 'x'; it has \['src', 'tgt'\]"),
        (lambda c: c.tokenizer_dir("x"), r"cache has no tokenizer 'x'; it has \['teacher'\]"),
        (lambda c: c.samples(3), "no shard 3; the cache has 3"),
        (lambda c: WindowReader(c, [0], ["x"], []), "no stream 'x'"),
        (lambda c: WindowReader(c, [0], [], ["x"]), "no signal 'x'"),
    ],
    ids=["signal", "stream", "tokenizer", "shard", "window stream", "window signal"],
)
def test_what_is_not_there(tiny_cache: Path, act: Callable[[Cache], object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        act(open_cache(tiny_cache))


def test_an_unfinished_signal_says_how_far_it_came(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", skip_commits=[("logits", 1), ("logits", 2)])
    cache = open_cache(root)
    assert not cache.complete("logits")
    assert cache.committed("logits") == {0}
    with pytest.raises(FormatError, match="1 of 3 shards of 'logits' are committed; run the same"):
        cache.require_complete("logits")
    with pytest.raises(IntegrityError, match="shard 1 of 'logits' is not committed"):
        cache.signal_shard("logits", 1)
    make_cache(root)
    cache.require_complete("logits")
    cache.signal_shard("logits", 1)


def test_what_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match="none: nothing there; a cache is what `kdcache dump` made"
    ):
        open_cache(tmp_path / "none")
    with pytest.raises(FormatError, match=r"not a cache: it has no kdcache\.json"):
        open_cache(tmp_path)
    root = make_cache(tmp_path / "cache")
    (root / "kdcache.json").unlink()
    with pytest.raises(FormatError, match="dump is unfinished: 3 shards of 'samples'"):
        open_cache(root)


def rewrite(root: Path, path: str, kind: type[Record], change: Callable[[dict], None]) -> None:
    """A record of a cache with other contents under a right checksum."""
    from kdcache.formats.record import read_record

    tree = read_record(kind, LocalStore(root), path).model_dump(mode="json")
    change(tree)
    (root / path).write_bytes(encode_record(kind.model_validate(tree)))


def test_labels_of_other_tokens_are_refused(tiny_cache: Path) -> None:
    def other(tree: dict) -> None:
        tree["streams"]["tgt"]["digest"] = "0" * 32

    rewrite(tiny_cache, "kdcache.json", Manifest, other)
    with pytest.raises(IntegrityError, match="its labels belong to other tokens"):
        open_cache(tiny_cache)


def test_labels_that_slid_are_refused(tiny_cache: Path, tmp_path: Path) -> None:
    # Labels of sentences of other lengths under the digests of this corpus.
    texts = {"src": SENTENCES["src"], "tgt": [*SENTENCES["tgt"][:5], "ab", "abca", "cab"]}
    other = make_cache(tmp_path / "other", sentences=texts, shard_tokens=1000)
    mine = make_cache(tmp_path / "mine", shard_tokens=1000)
    record = open_cache(mine).signal("logits").digest
    for path in [*(other / "logits").iterdir(), other / "commits" / "logits.00000.json"]:
        path.replace(mine / path.relative_to(other))
    path = "commits/logits.00000.json"
    rewrite(mine, path, CommitRecord, lambda tree: tree.update(record=record))
    with pytest.raises(IntegrityError, match="2 samples have another number of labels"):
        WindowReader(open_cache(mine), [0], ["tgt"], ["logits"])


def test_a_commit_under_the_name_of_another_is_refused(tiny_cache: Path) -> None:
    commits = tiny_cache / "commits"
    (commits / "logits.00001.json").write_bytes((commits / "logits.00000.json").read_bytes())
    with pytest.raises(FormatError, match="the commit of 'logits' shard 0, expected"):
        open_cache(tiny_cache).signal_shard("logits", 1)


def replaced(root: Path, batch: pa.RecordBatch | list[pa.RecordBatch]) -> None:
    """Commit other Arrow bytes for the first logits shard, checksums and all."""
    from kdcache.formats.integrity import digest_bytes
    from kdcache.formats.manifest import part_path

    batches = batch if isinstance(batch, list) else [batch]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for item in batches:
            writer.write_batch(item)
    data = sink.getvalue().to_pybytes()
    file = digest_bytes(data, "x")
    path = part_path("logits", 0, 0, [file])
    (root / path).write_bytes(data)

    def change(tree: dict) -> None:
        tree["parts"][0]["files"] = [file.model_copy(update={"path": path}).model_dump()]

    rewrite(root, "commits/logits.00000.json", CommitRecord, change)


def first_batch(root: Path) -> pa.RecordBatch:
    file = next((root / "logits").glob("00000.0-*"))
    with pa.ipc.open_file(file.read_bytes()) as reader:
        return reader.get_batch(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.slice(1), "2 rows, expected 3"),
        (lambda b: [b, b], "2 record batches, expected 1"),
        (lambda b: b.drop_columns(["drawn"]), "no column 'drawn'"),
        (lambda b: b.rename_columns(["exact", "tokens", "drawn"]), "column 'tokens' is"),
        (lambda b: b.select(["drawn", "exact", "tokens"]), "columns"),
    ],
    ids=["rows", "batches", "column missing", "types", "order"],
)
def test_an_arrow_file_of_another_shape_is_refused(tiny_cache: Path, change, message: str) -> None:
    replaced(tiny_cache, change(first_batch(tiny_cache)))
    with pytest.raises(FormatError, match=message) as caught:
        open_cache(tiny_cache).signal_shard("logits", 0)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_arrow_file_are_refused(tiny_cache: Path) -> None:
    commit = open_cache(tiny_cache).commit_record("logits", 0)
    from kdcache.formats.integrity import digest_bytes
    from kdcache.formats.manifest import part_path

    for data in (b"", b"ARROW1\0\0nonsense", first_batch(tiny_cache).serialize().to_pybytes()):
        file = digest_bytes(data, "x")
        path = part_path("logits", 0, 0, [file])
        (tiny_cache / path).write_bytes(data)
        part = commit.parts[0].model_copy(
            update={"files": [file.model_copy(update={"path": path})]}
        )
        record = commit.model_copy(update={"parts": [part]})
        (tiny_cache / "commits" / "logits.00000.json").write_bytes(encode_record(record))
        with pytest.raises(KDCacheError) as caught:
            open_cache(tiny_cache).signal_shard("logits", 0)
        assert "\n" not in str(caught.value)
