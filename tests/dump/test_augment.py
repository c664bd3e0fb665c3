"""Masked copies of rows: which words, in which samples, and what a dump makes of them."""

import json

import numpy as np
import pytest

from kdcache.compile import CompileOptions, compile_caches
from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, IdentityError, ModelError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.recipe import CorpusSection, parse_recipe
from kdcache.text import corpus as corpus_module
from kdcache.text.corpus import read_corpus
from tests.dump.descriptions import NOISE
from tests.dump.test_classes import Oracle, stored
from tests.dump.world import make_lines

LINES = [*make_lines(30)[0], "  odd \t white  space "]


def write(path, lines, pairs=False):
    rows = [{"text": t, "label": "01"[n % 2]} for n, t in enumerate(lines)]
    for row in rows if pairs else ():
        row["pair"] = row["text"].upper()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"text": "text", "label": "label"} | ({"pair": "pair"} if pairs else {})
    return {"format": "jsonl", "path": str(path), "fields": fields}


@pytest.fixture
def tasks(tmp_path):
    return {
        "one": write(tmp_path / "one", LINES) | {"copies": 40},
        "two": write(tmp_path / "two", [*LINES[:5], ""], pairs=True),
        "none": write(tmp_path / "none", LINES[:3]) | {"copies": 0},
    }


def read(section):
    found, place, rows = [], [], 0
    for batch in read_corpus(section):
        assert batch.num_read == len(batch.rows) + batch.dropped <= corpus_module.BATCH_ROWS + 41
        assert ((rows <= batch.rows) & (batch.rows < rows + batch.num_read)).all()
        rows += batch.num_read
        found += [
            {"task": batch.task, "row": int(row), **dict(zip(batch.fields, texts, strict=True))}
            for row, *texts in zip(batch.rows, *batch.fields.values(), strict=True)
        ]
        place += [batch.place(n) for n in range(len(batch.rows))]
    return found, place, rows


def masked(text, original):
    """How many words are masked, after holding all else against the original."""
    words, own = text.split(), original.split()
    assert len(words) == len(own)
    assert all(word in (of, "[MASK]") for word, of in zip(words, own, strict=True))
    assert [c for c in text if c.isspace()] == [c for c in original if c.isspace()]
    return words.count("[MASK]")


def test_copies_follow_their_rows_with_some_words_masked(tasks, monkeypatch):
    section = CorpusSection(tasks=tasks, label="label", augment={"copies": 10, "mark": "copy"})
    assert section.field_names == ["text", "label", "pair", "copy"]
    found, place, rows = read(section)
    plain, _, _ = read(section.without_copies)
    assert rows == 41 * len(LINES) + 11 * 6 + 3
    at, words, hits, texts = 0, 0, 0, []
    for row in plain:
        copies = {"one": 40, "two": 10, "none": 0}[row["task"]]
        mine = found[at : at + copies + 1]
        assert {k: v for k, v in mine[0].items() if k not in ("row", "copy")} == {
            k: v for k, v in row.items() if k != "row"
        }
        for copy, one in enumerate(mine):
            assert (one["copy"], one["task"]) == (str(copy), row["task"])
            assert one["label"] == row["label"]
            assert one["row"] == mine[0]["row"] + copy
            count = [masked(one[name], row[name]) for name in ("text", "pair")]
            hits += sum(count)
            words += len((one["text"] + one["pair"]).split()) if copy else 0
            texts.append(one["text"])
        at += copies + 1
    assert at == len(found)
    # Binomial: every word by itself with a tenth.
    assert abs(hits - 0.1 * words) < 4 * (0.09 * words) ** 0.5
    assert len(set(texts)) > 5 * len(plain)
    assert place[3] == "row 0 (from 0) of task 'one', copy 3"
    assert place[41 * len(LINES) + 11] == "row 1 (from 0) of task 'two'"
    for batch_rows in (1, 7):  # batches change nothing
        monkeypatch.setattr(corpus_module, "BATCH_ROWS", batch_rows)
        assert read(section)[0] == found
    monkeypatch.undo()
    # Another seed masks others; a copy more, a task less or a row more changes no copy.
    other = CorpusSection(tasks=tasks, label="label", augment={"seed": 2})
    assert read(other)[0] != found
    fewer = tasks | {"one": tasks["one"] | {"copies": 3, "limit": 4}}
    again = read(CorpusSection(tasks=fewer, label="label", augment={}))[0]
    by_key = {(one["task"], one["copy"], one["row"]): one for one in found}
    for number, one in enumerate(again[:16]):
        row, copy = divmod(number, 4)
        assert one["text"] == by_key["one", str(copy), 41 * row + copy]["text"]
    assert [one["text"] for one in again[16:]] == [o["text"] for o in found if o["task"] != "one"]
    with pytest.raises(CorpusError, match=r"two: row 5 \(from 0\) of field 'text' is empty"):
        read(CorpusSection(tasks=tasks, empty="error", augment={}))


def test_one_field_alone_and_every_word(tmp_path):
    part = write(tmp_path / "rows", LINES[:2], pairs=True)
    section = CorpusSection(**part, augment={"copies": 1, "fields": ["pair"], "probability": 1.0})
    found, _, _ = read(section)
    assert [one["text"] for one in found] == [LINES[n] for n in (0, 0, 1, 1)]
    assert set(found[1]["pair"].split()) == {"[MASK]"}
    assert found[0]["pair"] == LINES[0].upper()


REFUSED = [
    ({"copies": 3}, "copies is a task's own"),
    ({"augment": {"mark": "text"}}, "augment.mark is 'text', a field of the corpus"),
    ({"augment": {"fields": ["label"]}}, r"has 'label'; words can be masked in \['text'\]"),
    ({"augment": {"copies": 0}}, "augment.copies"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(keys, message, tmp_path):
    part = write(tmp_path / "rows", LINES[:2])
    tree = {"name": "t", "corpus": part | {"label": "label"} | keys}
    with pytest.raises(RecipeError, match=message):
        parse_recipe(tree)


def test_copies_of_a_task_need_to_be_told_how(tasks):
    with pytest.raises(RecipeError, match=r"tasks\.one\.copies needs augment"):
        parse_recipe({"name": "t", "corpus": {"tasks": tasks}})


def recipe(directory, part, **augment):
    tree = {
        "name": "test",
        "corpus": part | {"label": "label", "augment": {"copies": 4, "probability": 0.3} | augment},
        "dump": {
            "teacher": {"path": str(directory), "device": "cpu"},
            "streams": {"text": {"field": "text"}},
            "shard_tokens": 400,
            "signals": {"scores": {"kind": "classes"}},
        },
    }
    return parse_recipe(tree)


def test_a_teacher_labels_copies_as_other_samples(zoo, tmp_path):
    directory = zoo("bert", "classifier")
    part = write(tmp_path / "rows", LINES[:20])
    made = recipe(directory, part)
    dump(made, tmp_path / "cache")
    cache, oracle = open_cache(tmp_path / "cache"), Oracle(directory)
    assert cache.manifest.corpus.fields == ["text", "label", "copy"]
    assert cache.num_shards > 1
    assert not verify_cache(tmp_path / "cache").faults
    rows = {one["row"]: one for one in read(made.corpus)[0]}
    scores = stored(tmp_path / "cache", "scores")
    assert len(scores) == 100 == len(rows)
    for row, values in scores.items():
        np.testing.assert_allclose(values, oracle.scores(rows[row]["text"]), atol=NOISE)
    ids = {m.tobytes() for n in range(cache.num_shards) for m in cache.samples(n).sample_id}
    assert len(ids) == 100
    # The same recipe finds its own samples there; other copies are another corpus.
    dump(made, tmp_path / "cache")
    for other, message in (
        (recipe(directory, part, copies=5), "corpus.augment.copies: 4 in the cache, 5 given"),
        (recipe(directory, part, seed=2), "corpus.augment.seed"),
    ):
        with pytest.raises(IdentityError, match=message):
            dump(other, tmp_path / "cache")
    # Rows or copies alone, from the cache.
    for condition, count in (("copy.number == 0", 20), ("copy.number > 2", 40)):
        out = tmp_path / condition[-1]
        compile_caches([tmp_path / "cache"], out, CompileOptions(filters=[condition]))
        assert open_cache(out).manifest.corpus.num_samples == count
    kept = stored(tmp_path / "0", "scores")
    for row, values in kept.items():
        assert rows[5 * row]["copy"] == "0"  # they are numbered anew
        np.testing.assert_array_equal(values, scores[5 * row])
    options = CompileOptions(filters=["copies.number == 0"])
    message = r"no field 'copies'; there are \['copy', 'label', 'text'"
    with pytest.raises(RecipeError, match=message):
        compile_caches([tmp_path / "cache"], tmp_path / "none", options)


def test_the_mask_is_the_tokenizers(zoo, tmp_path):
    part = write(tmp_path / "rows", LINES[:4])
    message = r"stream 'text': augment.mask is '<mask>', the mask token of its .* is '\[MASK\]'"
    with pytest.raises(ModelError, match=message):
        dump(recipe(zoo("bert", "classifier"), part, mask="<mask>"), tmp_path / "cache")
    with pytest.raises(ModelError, match="is none; give that one, or a tokenizer that has one"):
        dump(recipe(zoo("llama", "classifier"), part), tmp_path / "other")
    assert not list(tmp_path.glob("*/signals"))
