"""Verification: every kind of damage is found, in every kind of file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kdcache.errors import FormatError, KDCacheError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import Codec, FullCodec, NucleusCodec, SampledCodec, TopKCodec
from kdcache.formats.integrity import digest_bytes
from kdcache.formats.manifest import CommitRecord, Manifest, part_path
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import ragged_batch, ragged_columns
from kdcache.formats.signals import LogitsRecord
from kdcache.formats.window import WindowReader
from tests.formats.labels import THRESHOLD, make_cache
from tests.formats.test_cache import CODECS, rewrite

KINDS = {
    "manifest": "kdcache.json",
    "signal": "signals/logits.json",
    "commit of samples": "commits/samples.00001.json",
    "commit of labels": "commits/logits.00001.json",
    "samples": "samples/00001.0-*.arrow",
    "logits": "logits/00001.0-*.arrow",
    "tokenizer": "tokenizers/teacher/vocab.json",
    "tokens": "tokenizers/teacher/tokens.json",
}


def find(root: Path, pattern: str) -> Path:
    (file,) = root.glob(pattern)
    return file


def read_everything(root: Path) -> None:
    cache = open_cache(root)
    cache.tokens("teacher")
    cache.tokenizer_dir("teacher")
    WindowReader(cache, list(range(cache.num_shards)), ["src", "tgt"], list(cache.signals))


def assert_caught(root: Path) -> None:
    """Both the reader and `verify` must see it, in one line each."""
    with pytest.raises(KDCacheError) as caught:
        read_everything(root)
    assert "\n" not in str(caught.value)
    report = verify_cache(root)
    # Of a commit that is gone nobody can say that it was there.
    assert report.faults or report.unfinished
    assert not any("\n" in fault for fault in [*report.faults, *report.unfinished])


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
def test_a_whole_cache_has_no_fault(tmp_path: Path, codec: Codec) -> None:
    root = make_cache(tmp_path / "cache", {"logits": codec}, part_bytes=600)
    report = verify_cache(root)
    assert report.faults == []
    assert report.leftovers == []
    files = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    assert report.files == len(files)
    assert report.bytes == sum(path.stat().st_size for path in files)
    read_everything(root)


@pytest.mark.parametrize("pattern", KINDS.values(), ids=KINDS.keys())
def test_one_flipped_bit_is_caught(tiny_cache: Path, pattern: str) -> None:
    file = find(tiny_cache, pattern)
    data = file.read_bytes()
    places = np.random.default_rng(0).integers(0, 8 * len(data), 5)
    for place in [0, *places.tolist(), 8 * len(data) - 1]:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(flipped))
        assert_caught(tiny_cache)
    file.write_bytes(data)
    assert verify_cache(tiny_cache).faults == []


@pytest.mark.parametrize("pattern", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("keep", [0, 0.5], ids=["emptied", "cut in half"])
def test_a_truncated_file_is_caught(tiny_cache: Path, pattern: str, keep: float) -> None:
    file = find(tiny_cache, pattern)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    assert_caught(tiny_cache)


@pytest.mark.parametrize(
    "pattern", [p for name, p in KINDS.items() if name not in ("manifest", "signal")]
)
def test_a_missing_file_is_caught(tiny_cache: Path, pattern: str) -> None:
    find(tiny_cache, pattern).unlink()
    assert_caught(tiny_cache)


def test_a_directory_without_a_manifest_is_no_cache_to_verify(tiny_cache: Path) -> None:
    (tiny_cache / "kdcache.json").unlink()
    with pytest.raises(FormatError, match="unfinished"):
        verify_cache(tiny_cache)
    with pytest.raises(FormatError, match="nothing there"):
        verify_cache(tiny_cache / "none")


def test_commits_without_their_signal_are_a_fault(tiny_cache: Path) -> None:
    (tiny_cache / "signals" / "logits.json").unlink()
    faults = verify_cache(tiny_cache).faults
    assert len(faults) == 3
    assert "a commit of 'logits', which has no record" in faults[0]


def test_data_of_a_damaged_commit_is_not_called_left_over(tiny_cache: Path) -> None:
    commit = tiny_cache / "commits/logits.00001.json"
    damaged = bytearray(commit.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    commit.write_bytes(damaged)
    report = verify_cache(tiny_cache)
    assert len(report.faults) == 1
    assert report.leftovers == []


def test_an_unfinished_signal_is_told_apart_and_its_data_is_a_leftover(tmp_path: Path) -> None:
    root = make_cache(tmp_path / "cache", skip_commits=[("logits", 1)])
    (root / "samples" / ".tmp-7-x").write_bytes(b"")
    report = verify_cache(root)
    assert report.faults == []
    assert [line.split(": ", 1)[1] for line in report.unfinished] == [
        "'logits' is unfinished: 1 of 3 shards are not committed (1); run the same "
        "`kdcache dump` again to finish"
    ]
    assert [path.split("-")[0] for path in report.leftovers] == [
        "logits/00001.0",
        "samples/.tmp",
    ]


@pytest.mark.parametrize(
    ("path", "kind", "keys", "message"),
    [
        ("kdcache.json", Manifest, ("corpus", "digest"), "corpus digest: "),
        ("kdcache.json", Manifest, ("streams", "tgt", "num_tokens"), "tokens of stream 'tgt': "),
        ("kdcache.json", Manifest, ("shards", 1, "tokens"), "tokens of shard 1: 19, expected"),
        ("kdcache.json", Manifest, ("tokenizers", "teacher", "digest"), "digest of stream 'src'"),
        ("commits/logits.00001.json", CommitRecord, ("tokens",), "tokens in the commit of"),
        ("commits/logits.00001.json", CommitRecord, ("entries", "exact"), "entries in the commit"),
        (
            "commits/samples.00001.json",
            CommitRecord,
            ("tokens",),
            "tokens in the commit of 'samples'",
        ),
        ("commits/samples.00001.json", CommitRecord, ("entries", "stream.src"), "entries in the"),
    ],
)
def test_a_record_that_says_something_else_is_caught(
    tiny_cache: Path, path: str, kind, keys: tuple, message: str
) -> None:
    def change(tree: dict) -> None:
        node = tree
        for key in keys[:-1]:
            node = node[key]
        value = node[keys[-1]]
        node[keys[-1]] = "0" * len(value) if isinstance(value, str) else value + 1

    rewrite(tiny_cache, path, kind, change)
    assert any(message in fault for fault in verify_cache(tiny_cache).faults)


def test_labels_for_other_tokens_are_caught(tiny_cache: Path) -> None:
    def change(tree: dict) -> None:
        tree["stream_digest"] = "0" * 32

    rewrite(tiny_cache, "signals/logits.json", LogitsRecord, change)
    assert_caught(tiny_cache)


def recommitted(root: Path, batch: pa.RecordBatch, signal: str = "logits") -> None:
    """Put another batch in place of shard 1's, with right checksums everywhere."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    recommitted_bytes(root, sink.getvalue().to_pybytes(), signal)


def recommitted_bytes(root: Path, data: bytes, signal: str = "logits") -> None:
    """Put other bytes in place of shard 1's file, with right checksums everywhere."""
    file = digest_bytes(data, "x")
    path = part_path(signal, 1, 0, [file])
    (root / path).write_bytes(data)

    def change(tree: dict) -> None:
        tree["parts"][0]["files"] = [file.model_copy(update={"path": path}).model_dump()]

    rewrite(root, f"commits/{signal}.00001.json", CommitRecord, change)


@pytest.mark.parametrize("signal", ["samples", "logits"])
@pytest.mark.parametrize("wrong", [-1, 1 << 30])
def test_offsets_that_lead_outside_are_refused_every_time(
    tiny_cache: Path, signal: str, wrong: int
) -> None:
    # A reader that trusts such an offset dies; the second time the checksum is known to be right.
    cache = open_cache(tiny_cache)
    column = cache.samples(1).streams["src"]
    if signal == "logits":
        column = cache.signal_shard("logits", 1).parts[0][2]["tokens"]
    offsets = column.offsets.astype(np.int32)
    broken = offsets.copy()
    broken[1] = wrong
    data = find(tiny_cache, f"{signal}/00001.0-*").read_bytes()
    assert data.count(offsets.tobytes()) >= 1
    recommitted_bytes(tiny_cache, data.replace(offsets.tobytes(), broken.tobytes()), signal)
    cache = open_cache(tiny_cache)
    for _ in range(2):
        with pytest.raises(FormatError, match="not an Arrow file of a cache"):
            cache.samples(1) if signal == "samples" else cache.signal_shard("logits", 1)
    faults = verify_cache(tiny_cache).faults
    assert any("not an Arrow file of a cache" in fault for fault in faults)


def edit(column: str, field: str, at: int, value: float) -> Callable[[dict[str, Ragged]], None]:
    def change(columns: dict[str, Ragged]) -> None:
        columns[column].fields[field][at] = value

    return change


def swap_first_ids(columns: dict[str, Ragged]) -> None:
    ids = columns["exact"].fields["id"]
    ids[[0, 1]] = ids[[1, 0]]


def drop_last_entry(columns: dict[str, Ragged]) -> None:
    exact = columns["exact"]
    exact.offsets[-1] -= 1
    for name in list(exact.fields):
        exact.fields[name] = exact.fields[name][:-1]


def draw_an_exact_id(columns: dict[str, Ragged]) -> None:
    columns["drawn"].fields["id"][0] = columns["exact"].fields["id"][0]


@pytest.mark.parametrize(
    ("codec", "change", "message"),
    [
        (THRESHOLD, edit("exact", "id", 0, 500), "exact: id 500, the vocabulary has 12"),
        (THRESHOLD, edit("drawn", "id", 0, 500), "drawn: id 500, the vocabulary has 12"),
        (THRESHOLD, swap_first_ids, "exact: ids do not ascend at position 0"),
        (THRESHOLD, draw_an_exact_id, "an id was kept exactly at the same position"),
        (THRESHOLD, edit("tokens", "num_exact", 0, 200), "200 entries at one position, at most 9"),
        (THRESHOLD, edit("tokens", "num_exact", 0, 0), "do not add up to num_exact"),
        (THRESHOLD, edit("tokens", "num_drawn", 0, 0), "do not add up to num_drawn"),
        (THRESHOLD, drop_last_entry, "do not add up to num_exact"),
        (THRESHOLD, edit("tokens", "tail_1", 0, np.nan), "tokens.tail_1: 1 values are NaN or"),
        (THRESHOLD, edit("tokens", "tail_1", 0, np.inf), "tokens.tail_1: 1 values are NaN or"),
        (TopKCodec(k=3, values="float16"), edit("exact", "code", 0, np.nan), "no log-probs"),
        (NucleusCodec(p=0.5, values="float32"), edit("exact", "code", 0, 1), "no log-probs"),
        (SampledCodec(n=5), edit("drawn", "code", 0, 4), "do not add up to 5"),
        (FullCodec(values="float16"), edit("exact", "code", 0, np.nan), "no log-probs"),
        (FullCodec(), drop_last_entry, "do not add up to num_exact"),
    ],
)
def test_a_broken_structure_is_caught_under_right_checksums(
    tmp_path: Path, codec: Codec, change: Callable[[dict[str, Ragged]], None], message: str
) -> None:
    root = make_cache(tmp_path / "cache", {"logits": codec})
    cache = open_cache(root)
    ((_, _, mapped),) = cache.signal_shard("logits", 1).parts
    columns = {
        name: Ragged(c.offsets.copy(), {key: v.copy() for key, v in c.fields.items()})
        for name, c in mapped.items()
    }
    change(columns)
    recommitted(root, ragged_batch(cache.signal_schema("logits"), columns))
    assert any(message in fault for fault in verify_cache(root).faults)


def test_a_raw_field_that_is_not_its_sample_id_is_caught(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    batch = cache.samples(1)._batch
    texts = pa.array(["xx", *batch.column("field.src").to_pylist()[1:]])
    at = batch.schema.get_field_index("field.src")
    recommitted(tiny_cache, batch.set_column(at, batch.schema.field(at), texts), "samples")
    faults = verify_cache(tiny_cache).faults
    assert any("sample 3: sample_id is not that of its fields" in fault for fault in faults)


def test_a_stream_with_an_id_beyond_its_vocabulary_is_caught(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    batch = cache.samples(1)._batch
    at = batch.schema.get_field_index("stream.src")
    column = batch.column(at)
    ids = ragged_columns(batch)["stream.src"].fields["id"].copy()
    ids[0] = 12
    values = pa.StructArray.from_arrays([pa.array(ids)], fields=list(column.type.value_type))
    broken = pa.ListArray.from_arrays(column.offsets, values, type=column.type)
    recommitted(tiny_cache, batch.set_column(at, batch.schema.field(at), broken), "samples")
    faults = verify_cache(tiny_cache).faults
    assert any("stream src: id 12, the vocabulary has 12" in fault for fault in faults)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (b'["a"]', "1 tokens, expected 12"),
        (b'{"a": 1}', "expected a list of strings"),
        (b'["\xff"]', "not JSON in UTF-8"),
    ],
)
def test_tokens_that_are_none_are_caught_under_right_checksums(
    tiny_cache: Path, tokens: bytes, message: str
) -> None:
    path = "tokenizers/teacher/tokens.json"
    (tiny_cache / path).write_bytes(tokens)

    def change(tree: dict) -> None:
        files = tree["tokenizers"]["teacher"]["files"]
        files[:] = [file for file in files if file["path"] != path]
        files.append(digest_bytes(tokens, path).model_dump())

    rewrite(tiny_cache, "kdcache.json", Manifest, change)
    (fault,) = verify_cache(tiny_cache).faults
    assert fault == f"{tiny_cache / path}: {message}"
