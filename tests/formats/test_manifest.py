"""Records as JSON: the checksum line, and hostile bytes that must stay one clear error."""

import json
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.codec import ThresholdCodec
from kdcache.formats.manifest import (
    CommitRecord,
    CorpusRecord,
    FileRecord,
    Manifest,
    PartRecord,
    StreamRecord,
    TokenizerRecord,
    part_path,
)
from kdcache.formats.record import Record, decode_record, encode_record, read_record
from kdcache.formats.signals import HiddenRecord, LogitsRecord, MasksRecord, signal_class
from kdcache.formats.stores.local import LocalStore
from tests.formats.labels import teacher_record

FILE = FileRecord(
    path="logits/00000.0-" + "0" * 16 + ".arrow", bytes=1, crc32c="0" * 8, xxh3="0" * 16
)
COMMIT = CommitRecord(
    signal="logits",
    shard=0,
    start=0,
    stop=2,
    tokens=5,
    entries={"tokens": 5},
    parts=[PartRecord(start=0, stop=2, files=[FILE])],
)
SIGNAL = LogitsRecord(
    name="logits",
    at="targets",
    stream="tgt",
    source="src",
    stream_digest="a" * 32,
    source_digest="b" * 32,
    vocab_size=9,
    codec=ThresholdCodec(),
    temperatures=(1.0, 2.0),
    seed=1,
    teacher=teacher_record(),
    recipe={"grüße": [1, None, {"x": 1.5}]},
    versions={},
)
HIDDEN = HiddenRecord(
    **{
        key: getattr(SIGNAL, key)
        for key in ("stream", "stream_digest", "seed", "teacher", "recipe", "versions")
    },
    name="hidden",
    side="encoder",
    layers=(0, 2),
    width=4,
    pool="none",
    values="int8",
)


def group(*names: str) -> CommitRecord:
    """A commit of one Zarr part with these files."""
    plain = [
        FILE.model_copy(update={"path": name, "xxh3": f"{i:016x}"}) for i, name in enumerate(names)
    ]
    path = part_path("hidden", 0, 0, plain)
    files = [file.model_copy(update={"path": f"{path}/{file.path}"}) for file in plain]
    part = PartRecord(start=0, stop=2, files=files)
    return COMMIT.model_copy(update={"signal": "hidden", "parts": [part]})


GROUP = group("values/c/0/0/0", "values/zarr.json", "zarr.json")
MANIFEST = Manifest(
    corpus=CorpusRecord(digest="a" * 32, num_samples=0, num_rows=0, dropped={}, fields=["src"]),
    tokenizers={
        "t": TokenizerRecord(
            digest="a" * 32, vocab_size=9, pad_id=0, eos_id=None, bos_id=None, unk_id=1, files=[]
        )
    },
    streams={
        "src": StreamRecord(
            field="src",
            tokenizer="t",
            target=False,
            digest="a" * 32,
            vocab_size=9,
            num_tokens=0,
            longest=0,
        )
    },
    shard_tokens=10,
    shards=[],
    recipe={},
    versions={},
)


def sealed(body: str) -> bytes:
    """A body (from its second line on) under a right checksum line."""
    rest = body.encode()
    return b'{"crc32c": "%08x",\n' % google_crc32c.value(rest) + rest


def resealed(record: Record, change) -> bytes:
    tree = record.model_dump(mode="json")
    change(tree)
    return sealed(json.dumps(tree)[1:] + "\n")


@pytest.mark.parametrize(
    "record",
    [COMMIT, GROUP, SIGNAL, HIDDEN, MANIFEST],
    ids=["commit", "commit of a group", "signal", "hidden", "manifest"],
)
def test_records_round_trip(record: Record) -> None:
    data = encode_record(record)
    assert decode_record(type(record), data, "x") == record
    assert encode_record(decode_record(type(record), data, "x")) == data
    tree = json.loads(data)
    covered = data.split(b"\n", 1)[1]
    assert tree.pop("crc32c") == f"{google_crc32c.value(covered):08x}"
    assert tree == json.loads(record.model_dump_json())
    assert data.endswith(b"\n}\n")


@pytest.mark.parametrize("record", [COMMIT, SIGNAL], ids=["commit", "signal"])
def test_every_flipped_bit_is_caught(record: Record) -> None:
    data = encode_record(record)
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(IntegrityError):
                decode_record(type(record), bytes(flipped), "x")


HOSTILE = {
    "empty": b"",
    "no checksum": b"{}\n",
    "not an object": sealed("1]"),
    "not UTF-8": b'{"crc32c": "%08x",\n' % google_crc32c.value(b'"\xff": 1}') + b'"\xff": 1}',
    "deep": sealed('"recipe": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "huge integer": sealed('"shard": ' + "9" * 6000 + "}"),
    "NaN": sealed('"shard": NaN}'),
    "repeated key": sealed('"shard": 1, "shard": 1}'),
    "lone surrogate": sealed('"signal": "\\ud800"}'),
    "nothing in it": sealed('"a": 1}'),
    "second checksum": sealed('"crc32c": "00000000"}'),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("kind", [Manifest, LogitsRecord, CommitRecord])
def test_hostile_bytes_are_a_format_error_of_one_line(kind: type[Record], data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        decode_record(kind, data, "kdcache.json")
    assert str(caught.value).startswith("kdcache.json: ")
    assert "\n" not in str(caught.value)


def put(*keys: str | int):
    """A change that sets the last of `keys` (path, value) in a tree."""
    *path, last, value = keys

    def change(tree) -> None:
        for key in path:
            tree = tree[key]
        tree[last] = value

    return change


@pytest.mark.parametrize(
    ("record", "change", "message"),
    [
        (COMMIT, put("parts", 0, "files", 0, "path", "../etc/passwd"), "stays inside the cache"),
        (COMMIT, put("parts", 0, "files", 0, "path", "/etc/passwd"), "stays inside the cache"),
        (COMMIT, put("parts", 0, "files", 0, "path", "logits\\a"), "stays inside the cache"),
        (COMMIT, put("parts", 0, "files", 0, "path", "logits/../../a"), "stays inside the cache"),
        (COMMIT, put("parts", 0, "files", 0, "path", "logits//a"), "stays inside the cache"),
        (COMMIT, put("parts", 0, "files", 0, "path", "logits/\x00"), "stays inside the cache"),
        (COMMIT, put("parts", 0, "files", 0, "path", "samples/a.arrow"), "expected logits/"),
        (COMMIT, put("parts", 0, "files", 0, "bytes", -1), "parts.0.files.0.bytes"),
        (COMMIT, put("parts", 0, "files", 0, "bytes", 1.5), "parts.0.files.0.bytes"),
        (COMMIT, put("parts", []), "parts end at sample 0, expected 2"),
        (COMMIT, put("parts", 0, "start", 1), "parts.0 starts at sample 1, expected 0"),
        (COMMIT, put("start", 2), "holds no samples"),
        (COMMIT, put("shard", True), "shard: "),
        (COMMIT, put("shard", 10**30), "shard: "),
        (COMMIT, put("signal", "../x"), "signal: "),
        (COMMIT, put("surprise", 1), "surprise: Extra inputs"),
        (SIGNAL, put("name", "samples"), "cannot name a signal"),
        (SIGNAL, put("codec", "name", "magic"), "codec: "),
        (SIGNAL, put("codec", "c", "1/0"), "codec"),
        (SIGNAL, put("codec", "c", "9" * 400 + "/1"), "codec|cannot be read"),
        (SIGNAL, put("codec", "c", 5e-324), "out of range"),
        (SIGNAL, put("codec", None), "codec: "),
        (SIGNAL, put("temperatures", [2.0, 1.0]), "do not ascend"),
        (SIGNAL, put("temperatures", [0.0]), "temperatures.0"),
        (SIGNAL, put("temperatures", [1.0 + i for i in range(65)]), "temperatures"),
        (SIGNAL, put("vocab_size", 1 << 25), "vocab_size"),
        (SIGNAL, put("at", "masked"), "at 'masked' with masks None"),
        (SIGNAL, put("masks", "masks"), "at 'targets' with masks 'masks'"),
        (
            SIGNAL.model_copy(update={"hypotheses": "beams"}),
            put("at", "positions"),
            "at 'positions' with hypotheses 'beams'",
        ),
        (HIDDEN, put("layers", [2, 0]), "layers .2, 0. do not ascend"),
        (HIDDEN, put("layers", [1, 1]), "layers .1, 1. do not ascend"),
        (HIDDEN, put("layers", []), "layers: "),
        (HIDDEN, put("width", 0), "width: "),
        (HIDDEN, put("hypotheses", "beams"), "hypotheses: 'beams', a hidden signal has none"),
        (GROUP, put("parts", 0, "files", 1, "path", "hidden/x"), "path hidden/x, expected one in"),
        (GROUP, put("parts", 0, "files", 1, "xxh3", "9" * 16), "expected one in hidden/00000.0-"),
        (group("b", "a"), put("tokens", 1), "its files are not in order of path"),
        (group("a", "a"), put("tokens", 1), "its files are not in order of path"),
        (MANIFEST, put("min_reader_version", 2), "this kdcache reads version 1"),
        (MANIFEST, put("min_reader_version", "1"), "this kdcache reads version 1"),
        (MANIFEST, put("corpus", "num_samples", 1), "shards end at sample 0, expected 1"),
        (MANIFEST, put("corpus", "fields", ["src", "src"]), "repeats a name"),
        (MANIFEST, put("streams", "src", "tokenizer", "none"), "no tokenizer 'none'"),
        (MANIFEST, put("corpus", "tasks", ["a", "a"]), "corpus.tasks repeats a name"),
        (MANIFEST, put("corpus", "label", "none"), "corpus.label: no field 'none'"),
        (MANIFEST, put("streams", "src", "field", "none"), "no field 'none'"),
        (MANIFEST, put("streams", "src", "pair", "none"), "no field 'none'"),
        (MANIFEST, put("streams", "src", "template", "jinja"), "streams.src.template"),
        (MANIFEST, put("tokenizers", {"../x": {}}), "tokenizers"),
        (
            MANIFEST,
            put("tokenizers", "t", "files", [FILE.model_dump()]),
            "tokenizers.t: logits/00000.0",
        ),
    ],
)
def test_a_wrong_record_says_where(record: Record, change, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        decode_record(type(record), resealed(record, change), "x.json")
    assert "\n" not in str(caught.value)


def test_the_kind_of_a_signal_names_its_class() -> None:
    assert decode_record(signal_class, encode_record(HIDDEN), "x") == HIDDEN
    assert decode_record(signal_class, encode_record(SIGNAL), "x") == SIGNAL
    for kind in ("magic", None, ["masks"]):
        with pytest.raises(FormatError, match=r"kind: .*, expected one of"):
            decode_record(signal_class, resealed(SIGNAL, put("kind", kind)), "x")
    with pytest.raises(FormatError, match="kind: Input should be 'masks'"):
        decode_record(MasksRecord, encode_record(SIGNAL), "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(st.sampled_from([COMMIT, GROUP, SIGNAL, HIDDEN, MANIFEST]), st.data())
@settings(max_examples=80, deadline=None)
def test_any_json_anywhere_is_a_record_or_a_format_error(record: Record, data) -> None:
    tree = record.model_dump(mode="json")
    node = tree
    while True:
        key = data.draw(
            st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
        )
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        node[key] = data.draw(JSON)
        break
    text = json.dumps(tree, ensure_ascii=True, allow_nan=True)[1:]
    said = ""
    try:
        decode_record(type(record), sealed(text), "x")
    except FormatError as error:
        said = str(error)
    assert "\n" not in said


def test_a_missing_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_record(Manifest, LocalStore(tmp_path), "kdcache.json")
