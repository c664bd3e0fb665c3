"""Several tasks in one corpus, and columns of messages."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import CorpusError, RecipeError
from kdcache.recipe import CorpusSection, parse_recipe
from kdcache.text import corpus as corpus_module
from kdcache.text.corpus import read_corpus

POLAR = [("good film", "1"), ("", "0"), ("bad film", "0"), ("fine", "1"), ("so so", "0")]
ENTAIL = [("a b", "a", "yes"), ("a", " ", "no"), ("c", "b", "no")]
TEXT = ["one line", "two lines", "", "four"]


@pytest.fixture
def tasks(tmp_path):
    """Three tasks of three formats that share some of their fields."""
    lines = ["sentence\tlabel", *("\t".join(row) for row in POLAR)]
    (tmp_path / "polar.tsv").write_text("\n".join(lines) + "\n")
    columns = dict(zip(("premise", "hypothesis", "gold"), zip(*ENTAIL, strict=True), strict=True))
    pq.write_table(
        pa.table({key: list(value) for key, value in columns.items()}), tmp_path / "e.parquet"
    )
    (tmp_path / "text").write_text("".join(line + "\n" for line in TEXT))
    return {
        "polar": {
            "format": "tsv",
            "path": str(tmp_path / "polar.tsv"),
            "fields": {"text": "sentence", "label": "label"},
            "limit": 4,
        },
        "entail": {
            "format": "parquet",
            "path": str(tmp_path / "e.parquet"),
            "fields": {"text": "premise", "pair": "hypothesis", "label": "gold"},
        },
        "raw": {"fields": {"text": str(tmp_path / "text")}},
    }


def read(section):
    """Task, row, and texts of every sample; rows read and rows dropped."""
    samples, counts = [], np.zeros(2, dtype=int)
    for batch in read_corpus(section):
        assert list(batch.fields) == section.field_names
        samples += [
            (batch.task, int(row), *texts)
            for row, *texts in zip(batch.rows, *batch.fields.values(), strict=True)
        ]
        counts += batch.num_read, batch.dropped
    return samples, counts.tolist()


@pytest.mark.parametrize("batch_rows", [1, 2, 4096])
def test_tasks_follow_one_another(tasks, batch_rows, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_ROWS", batch_rows)
    section = CorpusSection(tasks=tasks, label="label")
    assert section.field_names == ["text", "label", "pair"]
    samples, counts = read(section)
    assert samples == [
        ("polar", 0, "good film", "1", ""),
        ("polar", 2, "bad film", "0", ""),
        ("polar", 3, "fine", "1", ""),
        ("entail", 4, "a b", "yes", "a"),
        ("entail", 6, "c", "no", "b"),
        ("raw", 7, "one line", "", ""),
        ("raw", 8, "two lines", "", ""),
        ("raw", 10, "four", "", ""),
    ]
    assert counts == [11, 3]


@pytest.mark.parametrize("batch_rows", [1, 4096])
def test_empty_texts_of_its_own_fields_alone_count(tasks, batch_rows, monkeypatch):
    monkeypatch.setattr(corpus_module, "BATCH_ROWS", batch_rows)
    samples, counts = read(CorpusSection(tasks=tasks, empty="keep"))
    assert [row for _, row, *_ in samples] == list(range(11))
    assert counts == [11, 0]
    with pytest.raises(CorpusError, match=r"polar.tsv: row 1 \(from 0\) of field 'text' is empty"):
        read(CorpusSection(tasks=tasks, empty="error"))
    with pytest.raises(CorpusError, match=r"e.parquet: row 1 \(from 0\) of field 'pair' is empty"):
        read(CorpusSection(tasks={k: tasks[k] for k in ("entail", "raw")}, empty="error"))


def test_places_are_those_of_the_tasks_own_file(tasks):
    batches = {batch.task: batch for batch in read_corpus(CorpusSection(tasks=tasks))}
    assert batches["entail"].place(1) == "row 2 (from 0) of task 'entail'"
    alone = next(read_corpus(CorpusSection(**tasks["polar"])))
    assert alone.place(1) == "row 2 (from 0)"


def spoiled(tasks, root, name, key, text):
    """The tasks with another file for one of them."""
    (root / "spoiled").write_bytes(text)
    changed = {**tasks[name], "limit": None}
    if key == "path":
        changed["path"] = str(root / "spoiled")
    else:
        changed["fields"] = {key: str(root / "spoiled")}
    return {**tasks, name: changed}


FAULTS = {
    "missing": (
        lambda t, r: {**t, "raw": {"fields": {"text": str(r / "none")}}},
        "none: found no such file",
    ),
    "column": (
        lambda t, r: {**t, "entail": {**t["entail"], "fields": {"text": "premises"}}},
        r"e.parquet: found no column 'premises'",
    ),
    "width": (
        lambda t, r: spoiled(t, r, "polar", "path", b"sentence\tlabel\na\tb\tc\n"),
        "spoiled: line 2 has 3 columns",
    ),
    "utf8": (
        lambda t, r: spoiled(t, r, "raw", "text", b"x\n\xff\n"),
        "spoiled: line 2, byte 1: 0xff is not UTF-8",
    ),
    "nothing": (lambda t, r: spoiled(t, r, "raw", "text", b""), "spoiled: found no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_the_tasks_file(fault, tasks, tmp_path):
    change, message = FAULTS[fault]
    with pytest.raises(CorpusError, match=message) as error:
        read(CorpusSection(tasks=change(tasks, tmp_path)))
    assert "\n" not in str(error.value)


def test_a_missing_file_of_the_last_task_is_found_first(tasks, tmp_path):
    section = CorpusSection(tasks={**tasks, "raw": {"fields": {"text": str(tmp_path / "none")}}})
    with pytest.raises(CorpusError, match="none: found no such file"):
        next(read_corpus(section))


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        ({"fields": {"a": "x"}, "tasks": {"t": {"fields": {"a": "x"}}}}, "has its own fields"),
        ({"format": "tsv", "path": "p", "tasks": {"t": {"fields": {"a": "x"}}}}, "its own format"),
        ({"limit": 3, "tasks": {"t": {"fields": {"a": "x"}}}}, "its own limit"),
        ({}, "corpus: give fields, or tasks"),
        ({"fields": {}}, "corpus: give fields, or tasks"),
        ({"tasks": {"t": {"fields": {}}}}, "corpus.tasks.t.fields: .* at least 1"),
        ({"tasks": {"t": {}}}, "corpus.tasks.t.fields: missing"),
        ({"tasks": {"T": {"fields": {"a": "x"}}}}, "corpus.tasks.T: 'T' is no name"),
        ({"tasks": {"t": {"format": "tsv", "fields": {"a": "x"}}}}, "a tsv corpus needs path"),
        ({"tasks": {"t": {"fields": {"a": "x"}, "empty": "drop"}}}, "t.empty: unknown key"),
        ({"fields": {"a": "x"}, "label": "b"}, r"label is 'b'; the fields are \['a'\]"),
        ({"tasks": {"t": {"fields": {"a": "x"}}}, "label": "b"}, "label is 'b'; the fields"),
    ],
)
def test_sections_that_do_not_fit(corpus, expected):
    with pytest.raises(RecipeError, match=expected) as error:
        parse_recipe({"name": "test", "corpus": corpus})
    assert "\n" not in str(error.value)


def test_a_resolved_recipe_reads_again(tasks):
    recipe = parse_recipe({"name": "test", "corpus": {"tasks": tasks, "label": "label"}})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


CHAT = [{"role": "user", "content": "Grüß dich"}, {"role": "assistant", "content": "Hi", "x": [1]}]


def jsonl(root, *values, column="messages"):
    lines = [json.dumps({"n": 1, column: value}) for value in values]
    (root / "chat.jsonl").write_text("\n".join(lines) + "\n")
    return CorpusSection(format="jsonl", path=str(root / "chat.jsonl"), fields={"chat": "messages"})


def test_messages_are_read_as_canonical_json(tmp_path):
    text = '[{"content":"Grüß dich","role":"user"},{"content":"Hi","role":"assistant","x":[1]}]'
    reordered = [dict(reversed(message.items())) for message in CHAT]
    section = jsonl(tmp_path, CHAT, reordered, text, [], None)
    samples, counts = read(section)
    assert samples == [("", 0, text), ("", 1, text), ("", 2, text)]
    assert counts == [5, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([CHAT[0], "Hi"], r"line 2, 'messages': message 1 \(from 0\) is text, expected an object"),
        ([{"content": "Hi"}], "line 2, 'messages': message 0 .* has no 'role'"),
        ([{"role": 1, "content": "Hi"}], "line 2, 'messages': 'role' of message 0"),
        ({"role": "user", "content": "Hi"}, "line 2: 'messages' should be text, found dict"),
        ([{"role": "user", "content": "\ud800"}], "line 2: 'messages' holds a lone surrogate"),
        ([{"role": "user", "content": "", "x": float("inf")}], "line 2, 'messages': .*compliant"),
    ],
)
def test_messages_that_are_none(value, message, tmp_path):
    with pytest.raises(CorpusError, match="chat.jsonl: " + message) as error:
        read(jsonl(tmp_path, CHAT, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"messages": ' + "9" * 5000 + "}"])
def test_json_that_python_does_not_take(line, tmp_path):
    (tmp_path / "c").write_text(line + "\n")
    section = CorpusSection(format="jsonl", path=str(tmp_path / "c"), fields={"chat": "messages"})
    with pytest.raises(CorpusError, match="c: line 1 is not JSON: a value is too large"):
        read(section)
