import errno
import gzip
import json
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import CorpusError, IdentityError, StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.schema import join_ids
from kdcache.formats.stores import disk
from kdcache.formats.stores.store import STATUS
from tests.dump.world import CODECS, FAMILIES, THRESHOLD, Killed, rows_of, tree


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_recipe_gives_the_same_bytes(family, make_recipe, tmp_path):
    recipe = make_recipe(family, THRESHOLD)
    dump(recipe, tmp_path / "a")
    dump(recipe, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in tree(tmp_path / "a")}
    again = dump(recipe, tmp_path / "a")["signals"]["logits"]
    assert again["shards_written"] == again["labels_written"] == 0
    assert {name: (tmp_path / "a" / name).stat().st_mtime_ns for name in before} == before
    assert set(tree(tmp_path / "a")) == set(before)


def fail_at(monkeypatch, number: int, error: BaseException) -> None:
    """Let the number-th time raise that a dump makes something durable."""
    calls = iter(range(10**6))

    def observe(step, path):
        durable = step in ("fsync", "sync_folder")
        # A dump goes on without its status.
        if durable and STATUS not in (path.name, path.parent.name) and next(calls) == number:
            raise error

    monkeypatch.setattr(disk, "observer", observe)


@pytest.mark.parametrize("number", [0, 3, 8, 13, 17, 20, 23, 26, 29, 34, 39])
@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_dump_that_stopped_is_finished_to_the_same_bytes(
    number, error, make_recipe, tmp_path, whole, monkeypatch
):
    recipe, expected = whole
    expects = StorageError if isinstance(error, OSError) else Killed
    with monkeypatch.context() as patch:
        fail_at(patch, number, error)
        with pytest.raises(expects) as caught:
            dump(recipe, tmp_path / "cache")
    if expects is StorageError:
        assert "the disk is full; free some space" in str(caught.value)
        assert "\n" not in str(caught.value)
    half = tree(tmp_path / "cache")
    assert not any(".tmp-" in name for name in half)
    assert all(expected[name] == data for name, data in half.items())
    dump(recipe, tmp_path / "cache")
    assert tree(tmp_path / "cache") == expected


VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kdcache.dump.runner import dump
from kdcache.formats.stores import disk
from kdcache.recipe import load_recipe

recipe, out, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def observe(step, path):  # the temporary is whole, but does not have its name yet
    global calls
    calls += step == "rename" and path.suffix == ".arrow"
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)

disk.observer = observe
dump(load_recipe(recipe), out)
"""


def test_a_killed_process_is_finished_to_the_same_bytes(whole, tmp_path):
    from kdcache.recipe import dump_recipe

    recipe, expected = whole
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        [*command, str(tmp_path / "cache"), "7"], capture_output=True, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    half = tree(tmp_path / "cache")
    assert any(".tmp-" in name for name in half)
    assert ".locks/logits.00002" in half
    assert "commits/logits.00001.json" in half
    assert "commits/logits.00002.json" not in half
    dump(recipe, tmp_path / "cache")
    assert tree(tmp_path / "cache") == expected


def test_every_corpus_format_gives_the_same_samples(world, make_recipe, tmp_path):
    src, tgt = world.src, world.tgt
    for side in ("src", "tgt"):
        data = (world.root / side).read_bytes()
        (tmp_path / f"{side}.gz").write_bytes(gzip.compress(data))
    rows = list(zip(src, tgt, strict=True))
    (tmp_path / "tsv").write_text("s\tt\n" + "".join(f"{s}\t{t}\n" for s, t in rows))
    (tmp_path / "jsonl").write_text("".join(json.dumps({"s": s, "t": t}) + "\n" for s, t in rows))
    pq.write_table(pa.table({"s": src, "t": tgt}), tmp_path / "parquet")
    named = {"src": "s", "tgt": "t"}
    corpora = {
        "text": None,
        "gz": {"fields": {side: str(tmp_path / f"{side}.gz") for side in ("src", "tgt")}},
    }
    for kind in ("tsv", "jsonl", "parquet"):
        corpora[kind] = {"format": kind, "path": str(tmp_path / kind), "fields": named}
    trees = []
    for kind, corpus in corpora.items():
        dump(make_recipe(corpus=corpus), tmp_path / f"cache-{kind}")
        files = tree(tmp_path / f"cache-{kind}")
        files["kdcache.json"] = json.dumps(
            open_cache(tmp_path / f"cache-{kind}").manifest.corpus.model_dump()
        ).encode()
        trees.append(files)
    assert all(files == trees[0] for files in trees)


def test_streams_side_by_side(world, make_recipe, tmp_path):
    streams = {
        "tgt": {"field": "tgt", "target": True},
        "src": {"field": "src"},
        "src_spm": {"field": "src", "tokenizer": "spm"},
        "a_tgt": {"field": "tgt", "tokenizer": "spm", "target": True},
    }
    tokenizers = {
        "teacher": {"kind": "pretrained"},
        "spm": {"kind": "sentencepiece", "vocab_size": 34},
    }
    recipe = make_recipe("t5", THRESHOLD, streams=streams, tokenizers=tokenizers)
    dump(recipe, tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").faults == []
    cache = open_cache(tmp_path / "cache")
    assert cache.manifest.streams["src_spm"].vocab_size == 34
    samples = cache.samples(1)
    for name, stream in streams.items():
        record = cache.manifest.streams[name]
        tokenizer = AutoTokenizer.from_pretrained(cache.tokenizer_dir(record.tokenizer))
        texts = samples.text(stream["field"]).to_pylist()
        side = "text_target" if stream.get("target") else "text"
        expected = [i for ids in tokenizer(**{side: texts})["input_ids"] for i in ids]
        assert join_ids(samples.streams[name].fields).tolist() == expected
    before = tree(tmp_path / "cache")
    dump(recipe, tmp_path / "cache")  # SentencePiece is not trained again
    assert tree(tmp_path / "cache") == before
    spm = {**tokenizers, "spm": {"kind": "sentencepiece", "vocab_size": 33}}
    with pytest.raises(IdentityError, match=r"spm.vocab_size: 34 in the cache, 33 given"):
        dump(make_recipe("t5", THRESHOLD, streams=streams, tokenizers=spm), tmp_path / "cache")


def test_a_signal_can_come_later(make_recipe, tmp_path, whole):
    recipe, expected = whole
    summary = dump(make_recipe(), tmp_path / "cache")
    assert summary["signals"] == {}
    bare = tree(tmp_path / "cache")
    assert not any("logits" in name for name in bare)
    dump(recipe, tmp_path / "cache")
    assert tree(tmp_path / "cache") == expected
    more = make_recipe(signals={"wide": {"codec": CODECS["topk"]}})
    assert dump(more, tmp_path / "cache")["signals"]["wide"]["shards_written"] == 4
    files = tree(tmp_path / "cache")
    assert {name: files[name] for name in expected} == expected
    assert sorted(open_cache(tmp_path / "cache").signals) == ["logits", "wide"]


def test_no_teacher_at_all(world, make_recipe, tmp_path):
    tokenizers = {"teacher": {"kind": "sentencepiece", "vocab_size": 34}}
    summary = dump(make_recipe(None, tokenizers=tokenizers), tmp_path / "a")
    assert summary["samples"] == 60
    assert verify_cache(tmp_path / "a").faults == []
    tokenizers = {"teacher": {"kind": "pretrained", "path": str(world.root / "bart")}}
    recipe = make_recipe(None, tokenizers=tokenizers)
    dump(recipe, tmp_path / "b")
    assert open_cache(tmp_path / "b").manifest.recipe["dump"]["max_tokens"] == 64


def test_empty_and_long_samples(world, make_recipe, tmp_path):
    src, tgt = list(world.src), list(world.tgt)
    src[3], tgt[5] = "", " \t"
    src[7] = "cat " * 100
    for name, lines in (("s", src), ("t", tgt)):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    corpus = {"fields": {"src": str(tmp_path / "s"), "tgt": str(tmp_path / "t")}}
    summary = dump(make_recipe("bart", THRESHOLD, corpus=corpus), tmp_path / "drop")
    assert summary["dropped"] == {"empty": 2, "no_tokens": 0, "too_long": 1}
    assert (summary["rows"], summary["samples"]) == (60, 57)
    assert rows_of(tmp_path / "drop") == [r for r in range(60) if r not in (3, 5, 7)]
    assert verify_cache(tmp_path / "drop").faults == []
    dump(make_recipe("bart", THRESHOLD, corpus=corpus), tmp_path / "drop")

    keep = {**corpus, "empty": "keep"}
    summary = dump(make_recipe("bart", THRESHOLD, corpus=keep, max_tokens=40), tmp_path / "keep")
    assert summary["dropped"] == {"empty": 0, "no_tokens": 0, "too_long": 1}
    error = {**corpus, "empty": "error"}
    with pytest.raises(CorpusError, match=r"row 3 .from 0. of field 'src' is empty"):
        dump(make_recipe("bart", THRESHOLD, corpus=error), tmp_path / "error")
    assert not (tmp_path / "error").exists()
    with pytest.raises(CorpusError, match=r"row 7 .* 'src' has 102 tokens, at most 48 are taken"):
        dump(make_recipe("bart", THRESHOLD, corpus=corpus, too_long="error"), tmp_path / "long")
    assert tree(tmp_path / "long") == {}
    with pytest.raises(CorpusError, match="no sample is left of 60 rows"):
        dump(make_recipe("bart", corpus=corpus, max_tokens=2), tmp_path / "none")
    assert tree(tmp_path / "none") == {}
