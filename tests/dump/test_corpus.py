import bz2
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import CorpusError
from kdcache.recipe import CorpusSection
from kdcache.text import corpus as corpus_module
from kdcache.text.corpus import read_corpus

SRC = ["eins zwei", "Ärger 12", "  ", "vier \u2028 noch vier", "", "sechs"]
TGT = ["one two", "trouble 12", "blank", "four \u2028 still four", "nothing", "six"]


def write_text(root, src=SRC, tgt=TGT, suffix="", compress=lambda data: data, newline="\n"):
    for name, lines in (("src", src), ("tgt", tgt)):
        data = "".join(line + newline for line in lines).encode()
        (root / f"{name}{suffix}").write_bytes(compress(data))
    return CorpusSection(fields={n: str(root / f"{n}{suffix}") for n in ("src", "tgt")})


def write_tsv(root):
    lines = [
        "id\tde\ten",
        *(f"{i}\t{s}\t{t}" for i, (s, t) in enumerate(zip(SRC, TGT, strict=True))),
    ]
    (root / "c.tsv").write_text("\n".join(lines) + "\n")
    return CorpusSection(format="tsv", path=str(root / "c.tsv"), fields={"src": "de", "tgt": "en"})


def write_jsonl(root):
    lines = [json.dumps({"de": s or None, "en": t, "n": 1}) for s, t in zip(SRC, TGT, strict=True)]
    (root / "c.jsonl").write_text("\n".join(lines))
    return CorpusSection(
        format="jsonl", path=str(root / "c.jsonl"), fields={"src": "de", "tgt": "en"}
    )


def write_parquet(root):
    table = pa.table({"de": [s or None for s in SRC], "en": pa.array(TGT).dictionary_encode()})
    pq.write_table(table, root / "c.parquet", row_group_size=4)
    return CorpusSection(
        format="parquet", path=str(root / "c.parquet"), fields={"src": "de", "tgt": "en"}
    )


WRITERS = {
    "text": write_text,
    "gz": lambda root: write_text(root, suffix=".gz", compress=gzip.compress),
    "bz2": lambda root: write_text(root, suffix=".bz2", compress=bz2.compress),
    "crlf": lambda root: write_text(root, newline="\r\n"),
    "bom": lambda root: write_text(root, src=["\ufeff" + SRC[0], *SRC[1:]]),
    "tsv": write_tsv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def read(section):
    batches = list(read_corpus(section))
    rows = np.concatenate([batch.rows for batch in batches]).tolist()
    fields = {
        name: [text for batch in batches for text in batch.fields[name]] for name in section.fields
    }
    read, dropped = (sum(getattr(b, k) for b in batches) for k in ("num_read", "dropped"))
    return rows, fields, read, dropped


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_every_format_gives_the_same_rows(kind, block, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", max(block, 3))
    monkeypatch.setattr(corpus_module, "BATCH_ROWS", 2 if block == 3 else 4096)
    rows, fields, num_read, dropped = read(WRITERS[kind](tmp_path))
    assert rows == [0, 1, 3, 5]
    assert fields == {"src": [SRC[i] for i in rows], "tgt": [TGT[i] for i in rows]}
    assert (num_read, dropped) == (6, 2)


@pytest.mark.parametrize("kind", WRITERS)
def test_limit_and_empty_keep(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_ROWS", 2)
    section = WRITERS[kind](tmp_path).model_copy(update={"limit": 5, "empty": "keep"})
    rows, fields, num_read, dropped = read(section)
    assert rows == [0, 1, 2, 3, 4]
    assert fields["src"] == SRC[:5]
    assert (num_read, dropped) == (5, 0)


def test_last_line_needs_no_newline(tmp_path):
    (tmp_path / "a").write_bytes(b"x\ny")
    (tmp_path / "b").write_bytes(b"x\ny\n")
    section = CorpusSection(fields={"src": str(tmp_path / "a"), "tgt": str(tmp_path / "b")})
    assert read(section)[1] == {"src": ["x", "y"], "tgt": ["x", "y"]}


def test_limit_does_not_mind_a_longer_file(tmp_path):
    section = write_text(tmp_path, tgt=[*TGT, "more"])
    assert read(section.model_copy(update={"limit": 6}))[2] == 6


def jsonl(root, text):
    (root / "c").write_text(text)
    return CorpusSection(format="jsonl", path=str(root / "c"), fields={"src": "de"})


def tsv(root, text):
    (root / "c").write_text(text)
    return CorpusSection(format="tsv", path=str(root / "c"), fields={"src": "de"})


def raw(root, data, suffix=""):
    (root / f"c{suffix}").write_bytes(data)
    return CorpusSection(fields={"src": str(root / f"c{suffix}")})


def parquet(root, column):
    pq.write_table(pa.table({"de": column}), root / "c")
    return CorpusSection(format="parquet", path=str(root / "c"), fields={"src": "de"})


BROKEN = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(np.array([0, 2, 4], "<i4")), pa.py_buffer(b"ok\xffx")]
)
FAULTS = {
    "missing": (
        lambda r: CorpusSection(fields={"src": str(r / "none")}),
        r"none: found no such file",
    ),
    "missing_parquet": (
        lambda r: CorpusSection(format="parquet", path=str(r / "none"), fields={"src": "de"}),
        r"none: found no such file",
    ),
    "unequal": (
        lambda r: write_text(r, tgt=[*TGT, "more", "and more"]),
        r"same number of lines: .*src has 6; .*tgt has 8",
    ),
    "unequal_in_limit": (
        lambda r: write_text(r, src=SRC[:2]).model_copy(update={"limit": 4}),
        r"src has 2; .*tgt has 6",
    ),
    "empty_error": (
        lambda r: write_text(r).model_copy(update={"empty": "error"}),
        r"row 2 \(from 0\) of field 'src' is empty",
    ),
    "nothing": (lambda r: raw(r, b""), "found no rows"),
    "utf8": (lambda r: raw(r, b"gut\nso \xe4\nx\n"), r"c: line 2, byte 4: 0xe4 is not UTF-8"),
    "utf8_end": (lambda r: raw(r, b"gut\nso \xc3"), r"c: line 2, byte 4: 0xc3 is not UTF-8"),
    "gzip": (lambda r: raw(r, b"no gzip", ".gz"), r"c.gz: cannot be read"),
    "gzip_cut": (lambda r: raw(r, gzip.compress(b"a\n" * 9)[:-9], ".gz"), "cannot be read"),
    "tsv_column": (lambda r: tsv(r, "a\tb\n1\t2\n"), r"no column 'de'; it has \['a', 'b'\]"),
    "tsv_width": (lambda r: tsv(r, "de\tb\n1\t2\n1\n"), "line 3 has 1 columns, the header has 2"),
    "json": (lambda r: jsonl(r, '{"de": "x"}\n{"de": \n'), "line 2 is not JSON"),
    "json_list": (lambda r: jsonl(r, "[1]\n"), "line 1: expected an object, found list"),
    "json_key": (lambda r: jsonl(r, '{"en": "x"}\n'), r"line 1: found no column 'de'.*\['en'\]"),
    "json_type": (lambda r: jsonl(r, '{"de": 3}\n'), "'de' should be text, found int"),
    "json_surrogate": (lambda r: jsonl(r, '{"de": "\\ud800"}\n'), "lone surrogate"),
    "parquet": (
        lambda r: raw(r, b"x").model_copy(update={"format": "parquet", "path": str(r / "c")}),
        "cannot be read as Parquet",
    ),
    "parquet_column": (
        lambda r: parquet(r, ["x"]).model_copy(update={"fields": {"src": "fr"}}),
        r"no column 'fr'; it has \['de'\]",
    ),
    "parquet_type": (lambda r: parquet(r, [1]), "should be text, found int64"),
    "parquet_utf8": (lambda r: parquet(r, BROKEN), r"row 1 .* byte 1: 0xff is not UTF-8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_clear_line(fault, tmp_path):
    make, message = FAULTS[fault]
    with pytest.raises(CorpusError, match=message) as error:
        read(make(tmp_path))
    assert "\n" not in str(error.value)
