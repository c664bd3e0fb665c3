"""Corpora of every make: tasks and gold labels, pairs, chats, ids of three bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kdcache.compile import CompileOptions, compile_caches
from kdcache.dump.runner import dump
from kdcache.errors import IdentityError, RecipeError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import FullCodec, ThresholdCodec, TopKCodec
from kdcache.formats.record import encode_record
from kdcache.formats.schema import join_ids
from kdcache.formats.signals import BeamsRecord
from kdcache.recipe import parse_recipe
from tests.compile.written import about
from tests.dump.world import make_lines
from tests.dump.zoo import TOKENIZERS
from tests.formats.labels import make_cache

SRC, TGT = make_lines(12)
WORDS = sorted({word for line in [*SRC, *TGT] for word in line.split()})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    for name in ("bert", "llama"):
        TOKENIZERS[name](WORDS).save_pretrained(root / name)
    for number, rows in enumerate((range(7), range(5, 12))):
        lines = ["text\tpair\tlabel", *(f"{SRC[m]}\t{TGT[m]}\tgold{m}" for m in rows)]
        (root / f"{number}.tsv").write_text("".join(line + "\n" for line in lines))
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(SRC, TGT, strict=True)
    ]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (root / "chat.jsonl").write_text("".join(line + "\n" for line in lines))
    return root


def dumped(root, out, corpus, stream, tokenizer):
    section = {
        "shard_tokens": 90,
        "tokenizers": {"own": {"kind": "pretrained", "path": str(root / tokenizer)}},
        "streams": {"text": {"tokenizer": "own", **stream}},
        "signals": {},
    }
    dump(parse_recipe({"name": "test", "corpus": corpus, "dump": section}), out)
    return out


def with_tasks(root, out, tasks: dict[str, int]):
    fields = {"text": "text", "pair": "pair", "label": "label"}
    parts = {
        name: {"format": "tsv", "path": str(root / f"{number}.tsv"), "fields": fields}
        for name, number in tasks.items()
    }
    corpus = {"tasks": parts, "label": "label"}
    return dumped(root, out, corpus, {"field": "text", "pair": "pair"}, "bert")


def chats(root, out):
    corpus = {"format": "jsonl", "path": str(root / "chat.jsonl"), "fields": {"chat": "messages"}}
    return dumped(root, out, corpus, {"field": "chat", "template": "chat"}, "llama")


def rows(path) -> list[tuple]:
    """Everything of every sample but its row."""
    cache, found = open_cache(path), []
    for n in range(cache.num_shards):
        shard = cache.samples(n)
        tasks = shard.tasks()
        for m in range(len(shard.row)):
            one = shard.streams["text"].take(np.array([m]))
            beside = {k: v.tolist() for k, v in one.fields.items() if not k.startswith("id")}
            texts = [shard.text(field)[m].as_py() for field in cache.manifest.corpus.fields]
            task = tasks[m].as_py() if tasks is not None else None
            ids = join_ids(one.fields).tolist()
            found.append((shard.sample_id[m].tobytes(), task, texts, ids, beside))
    return found


def test_tasks_are_joined_and_every_sample_keeps_its_own(root, tmp_path):
    a = with_tasks(root, tmp_path / "a", {"one": 0, "two": 0})
    b = with_tasks(root, tmp_path / "b", {"two": 1, "three": 1})
    compile_caches([a, b], tmp_path / "out")
    first, second = rows(a), rows(b)
    # The task is in the id, so only what both have in task two stands there once.
    assert len({row[0] for row in first} & {row[0] for row in second}) == 2
    assert rows(tmp_path / "out") == [*first, *(row for row in second if row not in first)]
    corpus = open_cache(tmp_path / "out").manifest.corpus
    assert (corpus.tasks, corpus.label) == (["one", "two", "three"], "label")
    assert verify_cache(tmp_path / "out").faults == []


def test_chats_keep_what_the_assistant_says(root, tmp_path):
    a = chats(root, tmp_path / "a")
    compile_caches([a], tmp_path / "out", CompileOptions(fraction=0.5))
    found, every = rows(tmp_path / "out"), rows(a)
    assert 0 < len(found) < len(every)
    assert found == [row for row in every if row in found]
    assert all(set(row[4]) == {"loss"} for row in found)
    assert verify_cache(tmp_path / "out").faults == []


def test_corpora_of_other_makes_do_not_mix(root, tmp_path):
    a = with_tasks(root, tmp_path / "a", {"one": 0})
    with pytest.raises(IdentityError, match="fields"):
        compile_caches([a, chats(root, tmp_path / "b")], tmp_path / "out")


@pytest.mark.parametrize("make", ["pair", "chat"])
def test_hypotheses_replace_no_pairs_and_no_chats(root, tmp_path, make):
    path = tmp_path / "a"
    _ = chats(root, path) if make == "chat" else with_tasks(root, path, {"one": 0})
    cache = open_cache(path)
    record = BeamsRecord(
        **about(cache, "beams", "text"),
        source="text",
        source_digest=cache.stream("text").digest,
        vocab_size=99,
        num_hypotheses=1,
        decoding={},
    )
    (path / "signals").mkdir(exist_ok=True)
    (path / "signals" / "beams.json").write_bytes(encode_record(record))
    words = "a pair of fields" if make == "pair" else "a chat"
    with pytest.raises(RecipeError, match=f"stream 'text' is made of {words}, which"):
        compile_caches([path], tmp_path / "out", CompileOptions(targets="beams=best", signals=[]))


def test_ids_of_three_bytes(tmp_path):
    codecs = {"drawn": ThresholdCodec(c=1 / 8), "top": TopKCodec(k=3, values="float16")}
    texts = {"src": ["ab", "abc", "c", "ba"], "tgt": ["ba", "c", "cba", "bb"]}
    halves = {side: (lines[:3], lines[1:]) for side, lines in texts.items()}
    for number, name in enumerate(("a", "b")):
        sentences = {side: both[number] for side, both in halves.items()}
        make_cache(tmp_path / name, codecs, sentences, vocab_size=70_000)
    options = CompileOptions(mix=[1, 1], shard_tokens=11)
    compile_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "out", options)
    assert verify_cache(tmp_path / "out").faults == []
    for name in codecs:
        sources = [labels(tmp_path / one, name) for one in ("a", "b")]
        assert "id_high" in sources[0][0]["exact"]
        assert labels(tmp_path / "out", name) == [*sources[0], *sources[1]]


def labels(path, name) -> list[dict]:
    """Columns of every sample, as they are stored."""
    cache = open_cache(path)
    return [
        {
            key: {f: v.tolist() for f, v in column.take(np.array([m])).fields.items()}
            for key, column in columns.items()
        }
        for n in range(cache.num_shards)
        for start, stop, columns in cache.signal_shard(name, n).parts
        for m in range(stop - start)
    ]


def test_nothing_of_a_full_vocabulary_is_lost(tmp_path):
    make_cache(tmp_path / "a", {"all": FullCodec(values="float16")})
    compile_caches([tmp_path / "a"], tmp_path / "out", CompileOptions(shard_tokens=7))
    assert labels(tmp_path / "out", "all") == labels(tmp_path / "a", "all")
