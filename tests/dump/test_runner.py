import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from kdcache.dump.runner import dump
from kdcache.errors import (
    CorpusError,
    IdentityError,
    ModelError,
    RecipeError,
    StorageError,
)
from kdcache.formats import plan, writer
from kdcache.formats.cache import open_cache
from kdcache.formats.codes import entropy_nats, exact_log_probs, gold_log_probs
from kdcache.formats.schema import join_ids
from kdcache.formats.verify import verify_cache

FAMILIES = ["marian", "t5", "bart"]
CODECS = {
    "threshold": {"name": "threshold", "c": "1/8"},
    "topk": {"name": "topk", "k": 4, "values": "float32"},
    "nucleus": {"name": "nucleus", "p": 0.7, "k_max": 6, "values": "float16"},
    "sampled": {"name": "sampled", "n": 20},
    "full": {"name": "full", "values": "float32"},
}
THRESHOLD = CODECS["threshold"]


def tree(root: Path) -> dict[str, bytes]:
    """Every file of a cache but its lock."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def positions(cache, name="logits"):
    """Per sample: corpus row, target ids and, per column, the fields of its positions."""
    for shard in range(cache.num_shards):
        samples = cache.samples(shard)
        target = samples.streams["tgt"]
        for start, stop, columns in cache.signal_shard(name, shard).parts:
            for m in range(stop - start):
                at = start - samples.start + m
                begin, end = target.offsets[at : at + 2]
                fields = {
                    column: {
                        field: values[ragged.offsets[m] : ragged.offsets[m + 1]]
                        for field, values in ragged.fields.items()
                    }
                    for column, ragged in columns.items()
                }
                yield samples.row[at], join_ids(target.fields)[begin:end], fields


def brute_force(directory, src: str, tgt: str) -> np.ndarray:
    """[T, V] float64 log-probs of one sample by a plain forward."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([tokenizer(src)["input_ids"]]),
            labels=torch.tensor([tokenizer(text_target=tgt)["input_ids"]]),
        ).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


@pytest.fixture(scope="session")
def oracle(world):
    """Family to row to log-probs, each computed once and sample by sample."""
    known: dict[tuple[str, int], np.ndarray] = {}

    def ask(family: str, row: int) -> np.ndarray:
        if (family, row) not in known:
            known[family, row] = brute_force(world.root / family, world.src[row], world.tgt[row])
        return known[family, row]

    return ask


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_those_of_a_forward_per_sample(
    family, codec, make_recipe, oracle, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan.plan_parts, "__defaults__", (5000,))  # several parts a shard
    recipe = make_recipe(family, CODECS[codec])
    summary = dump(recipe, tmp_path / "cache")
    report = verify_cache(tmp_path / "cache")
    assert report.faults == []
    cache = open_cache(tmp_path / "cache")
    record = cache.signals["logits"]
    rows = []
    for row, gold, columns in positions(cache):
        rows.append(row)
        if row % 6 == 1:
            check_sample(record, oracle(family, int(row)), gold, columns)
    assert rows == list(range(60))
    assert summary["shards"] == cache.num_shards > 1
    assert max(len(cache.signal_shard("logits", s).parts) for s in range(cache.num_shards)) > 1
    assert summary["tokens"]["tgt"] == summary["signals"]["logits"]["tokens"]
    assert summary["bytes"] == sum(p.stat().st_size for p in tmp_path.rglob("*.arrow"))


def check_sample(record, log_probs, gold, columns) -> None:
    """All columns of one sample against [T, V] log-probs."""
    probs, (length, vocab_size) = np.exp(log_probs), log_probs.shape
    tokens, codec = columns["tokens"], record.codec
    assert vocab_size == record.vocab_size
    gold_nats = log_probs[np.arange(length), gold]
    np.testing.assert_allclose(gold_log_probs(tokens["gold"]), gold_nats, atol=0.3)
    entropy = -(probs * log_probs).sum(-1)
    found = entropy_nats(tokens["entropy"], vocab_size)
    np.testing.assert_allclose(found, entropy, atol=np.log(vocab_size) / 255 + 1e-4)
    if codec.has_exact:
        num_exact = tokens.get("num_exact", np.full(length, vocab_size))
        ids = (
            np.tile(np.arange(vocab_size), length)
            if codec.name == "full"
            else join_ids(columns["exact"])
        )
        values = exact_log_probs(codec, columns["exact"]["code"])
        atol = {"uint8": 0.05, "float16": 0.01, "float32": 1e-4}[codec.values]
        head = np.zeros((length, vocab_size), dtype=bool)
        at = np.repeat(np.arange(length), num_exact)
        head[at, ids] = True
        np.testing.assert_allclose(values, log_probs[at, ids], atol=atol)
        np.testing.assert_array_equal(head, expected_head(codec, probs))
        if codec.has_tail:
            for knot, temperature in enumerate(record.temperatures):
                outside = np.where(head, 0, np.exp(log_probs / temperature)).sum(-1)
                np.testing.assert_allclose(
                    np.exp(tokens[f"tail_{knot}"].astype(float)), outside, rtol=0.01, atol=1e-4
                )
    if codec.name == "threshold":
        mass = np.where(probs >= codec.c, 0, probs).sum(-1) / codec.c
        assert (np.abs(tokens["num_drawn"] - mass) < 1).all()
    if codec.name == "sampled":
        at = np.repeat(np.arange(length), tokens["num_drawn"])
        counts = np.bincount(at, columns["drawn"]["code"], minlength=length)
        assert (counts == codec.n).all()


def expected_head(codec, probs) -> np.ndarray:
    """[T, V] bool, what the codec should keep exactly."""
    if codec.name == "threshold":
        return probs >= codec.c
    rank = np.argsort(np.argsort(-probs, axis=-1), axis=-1)
    if codec.name == "full":
        return rank >= 0
    if codec.name == "topk":
        return rank < codec.k
    before = np.cumsum(-np.sort(-probs, axis=-1), axis=-1) - -np.sort(-probs, axis=-1)
    return (rank < codec.k_max) & (np.take_along_axis(before, rank, -1) < codec.p)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_recipe_gives_the_same_bytes(family, make_recipe, tmp_path):
    recipe = make_recipe(family, THRESHOLD)
    dump(recipe, tmp_path / "a")
    dump(recipe, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*")}
    again = dump(recipe, tmp_path / "a")["signals"]["logits"]
    assert again["shards_written"] == again["tokens_written"] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*")} == before


class Killed(BaseException):
    """Stands for the end of the process."""


def fail_at(monkeypatch, number: int, error: BaseException) -> None:
    """Let the number-th fsync of a dump raise."""
    calls = iter(range(10**6))
    real = os.fsync

    def fsync(handle):
        if next(calls) == number:
            raise error
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


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


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """A recipe and the files of its dump."""
    from kdcache.recipe import parse_recipe

    fields = {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}
    recipe = parse_recipe(
        {
            "name": "test",
            "corpus": {"fields": fields},
            "dump": {
                "shard_tokens": 500,
                "batch_tokens": 120,
                "teacher": {"path": str(world.root / "marian"), "device": "cpu"},
                "signals": {"logits": {"codec": THRESHOLD}},
            },
        }
    )
    out = tmp_path_factory.mktemp("whole") / "cache"
    dump(recipe, out)
    return recipe, tree(out)


VICTIM = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kdcache.dump.runner import dump
from kdcache.formats import commit, writer
from kdcache.recipe import load_recipe

recipe, out, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0
real = Path.replace

def replace(self, target):  # the temporary is whole, but does not have its name yet
    global calls
    calls += 1
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)

Path.replace = replace
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


def rows_of(path) -> list[int]:
    cache = open_cache(path)
    return [int(r) for shard in range(cache.num_shards) for r in cache.samples(shard).row]


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


def changed_corpus(world, root, change):
    src, tgt = change(list(world.src), list(world.tgt))
    for name, lines in (("s", src), ("t", tgt)):
        (root / name).write_text("".join(line + "\n" for line in lines))
    return {"fields": {"src": str(root / "s"), "tgt": str(root / "t")}}


def other_teacher(world, root):
    """The Marian teacher with one weight changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(world.root / "marian", root / "other")
    weights = load_file(root / "other" / "model.safetensors")
    weights["model.shared.weight"][5, 3] += 0.1
    save_file(weights, root / "other" / "model.safetensors", {"format": "pt"})
    return root / "other"


def other_tokenizer(world, root):
    """The Marian teacher with its vocabulary turned round."""
    shutil.copytree(world.root / "marian", root / "turned")
    vocab = json.loads((root / "turned" / "vocab.json").read_text())
    turned = {piece: i if i < 4 else 39 - i for piece, i in vocab.items()}
    (root / "turned" / "vocab.json").write_text(json.dumps(turned))
    return root / "turned"


def teacher_at(path):
    return {"teacher": {"path": str(path), "device": "cpu"}}


OTHERS = {
    "teacher": (
        lambda make, world, root: make(codec=THRESHOLD, **teacher_at(other_teacher(world, root))),
        r"teacher.digest: '[0-9a-f]{32}' in the cache, '[0-9a-f]{32}' given",
    ),
    "dtype": (
        lambda make, world, root: make(
            codec=THRESHOLD,
            teacher={"path": str(world.root / "marian"), "device": "cpu", "dtype": "bfloat16"},
        ),
        "teacher.dtype: 'float32' in the cache, 'bfloat16' given",
    ),
    "tokenizer": (
        lambda make, world, root: make(codec=THRESHOLD, **teacher_at(other_tokenizer(world, root))),
        "tokenizer 'teacher' is [0-9a-f]{32} in the cache, .* is [0-9a-f]{32}",
    ),
    "corpus": (
        lambda make, world, root: make(
            codec=THRESHOLD,
            corpus=changed_corpus(world, root, lambda s, t: ([*s[:9], "cat", *s[10:]], t)),
        ),
        "another corpus: digest: '[0-9a-f]{32}' in the cache, '[0-9a-f]{32}' given",
    ),
    "longer_corpus": (
        lambda make, world, root: make(
            codec=THRESHOLD,
            corpus=changed_corpus(world, root, lambda s, t: ([*s, "cat"], [*t, "cat"])),
        ),
        "another corpus: rows: 60 in the cache, 61 given",
    ),
    "fields": (
        lambda make, world, root: make(
            corpus={"fields": {"tgt": str(world.root / "tgt"), "src": str(world.root / "src")}}
        ),
        r"corpus.fields: \['src', 'tgt'\] in the cache, \['tgt', 'src'\] given",
    ),
    "codec": (
        lambda make, world, root: make(codec={"name": "threshold", "c": "1/9"}),
        "codec.c: 0.125 in the cache, 0.1111",
    ),
    "seed": (
        lambda make, world, root: make(codec=THRESHOLD, seed=2),
        "seed: 1 in the cache, 2 given",
    ),
    "shard_tokens": (
        lambda make, world, root: make(codec=THRESHOLD, shard_tokens=600),
        "dump.shard_tokens: 500 in the cache, 600 given",
    ),
    "max_tokens": (
        lambda make, world, root: make(codec=THRESHOLD, max_tokens=50),
        "dump.max_tokens: 64 in the cache, 50 given",
    ),
    "streams": (
        lambda make, world, root: make(streams={"src": {"field": "src"}}),
        "dump.streams.tgt",
    ),
}


@pytest.fixture
def standing(whole, tmp_path):
    """A copy of the whole dump."""
    for name, data in whole[1].items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "cache"


@pytest.mark.parametrize("what", OTHERS)
def test_another_thing_on_an_existing_cache(what, make_recipe, world, whole, standing, tmp_path):
    make, message = OTHERS[what]
    with pytest.raises(IdentityError, match=message) as error:
        dump(make(make_recipe, world, tmp_path), standing)
    assert "\n" not in str(error.value)
    assert "choose another output" in str(error.value)
    assert tree(standing) == whole[1]


def test_moved_files_are_the_same(make_recipe, world, whole, standing, tmp_path):
    shutil.copytree(world.root / "marian", tmp_path / "moved")
    corpus = changed_corpus(world, tmp_path, lambda s, t: (s, t))
    dump(make_recipe(codec=THRESHOLD, corpus=corpus, **teacher_at(tmp_path / "moved")), standing)
    assert tree(standing) == whole[1]


def test_an_unfinished_signal_keeps_its_batch_plan(make_recipe, whole, standing):
    dump(make_recipe(codec=THRESHOLD, batch_tokens=200), standing)  # finished: nothing to do
    (standing / "commits" / "logits.00002.json").unlink()
    with pytest.raises(IdentityError, match="batch_tokens 120, 200 given"):
        dump(make_recipe(codec=THRESHOLD, batch_tokens=200), standing)
    dump(whole[0], standing)
    assert tree(standing) == whole[1]


def test_another_corpus_on_an_unfinished_cache(make_recipe, world, tmp_path, monkeypatch):
    real = writer.CacheWriter.commit

    def commit(self, record):
        if record.shard == 2:
            raise Killed
        return real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(writer.CacheWriter, "commit", commit)
        with pytest.raises(Killed):
            dump(make_recipe(), tmp_path / "cache")
    for change in (lambda s, t: (["cat", *s[1:]], t), lambda s, t: (s[:5], t[:5])):
        corpus = changed_corpus(world, tmp_path, change)
        with pytest.raises(IdentityError, match="samples shard"):
            dump(make_recipe(corpus=corpus), tmp_path / "cache")
    dump(make_recipe(), tmp_path / "cache")
    assert verify_cache(tmp_path / "cache").faults == []


def test_a_teacher_that_takes_less_than_the_cache_has(make_recipe, world, tmp_path):
    src, tgt = ["cat " * 50, "cat"], ["dog", "dog"]
    corpus = changed_corpus(world, tmp_path, lambda s, t: (src, tgt))
    dump(make_recipe("bart", corpus=corpus, max_tokens=48), tmp_path / "a")
    assert rows_of(tmp_path / "a") == [1]
    tokenizers = {"teacher": {"kind": "pretrained", "path": str(world.root / "bart")}}
    dump(make_recipe(None, corpus=corpus, tokenizers=tokenizers), tmp_path / "b")
    with pytest.raises(ModelError, match=r"row 0 has 52 tokens in stream 'src', .* takes 48"):
        dump(make_recipe("bart", THRESHOLD, corpus=corpus), tmp_path / "b")
    with pytest.raises(RecipeError, match="max_tokens is 100, the teacher takes at most 48"):
        dump(make_recipe("bart", corpus=corpus, max_tokens=100), tmp_path / "c")


FAULTS = {
    "no_corpus": (
        lambda make, world, root: make().model_copy(update={"corpus": None}),
        RecipeError,
        "a dump needs a corpus",
    ),
    "stream_field": (
        lambda make, world, root: make(streams={"x": {"field": "fr"}}),
        RecipeError,
        r"streams.x.field is 'fr'; corpus.fields has \['src', 'tgt'\]",
    ),
    "spm_field": (
        lambda make, world, root: make(
            tokenizers={"teacher": {"kind": "sentencepiece", "fields": ["fr"]}}
        ),
        RecipeError,
        "tokenizers.teacher.fields has 'fr'",
    ),
    "no_teacher": (
        lambda make, world, root: make(None, THRESHOLD),
        RecipeError,
        "signals need a teacher: set dump.teacher.path",
    ),
    "no_tokenizer": (
        lambda make, world, root: make(None),
        RecipeError,
        "tokenizer 'teacher' is the teacher's, and there is no teacher",
    ),
    "trained_tokenizer": (
        lambda make, world, root: make(
            "t5", THRESHOLD, tokenizers={"teacher": {"kind": "sentencepiece", "vocab_size": 20}}
        ),
        RecipeError,
        "the teacher needs its own tokenizer",
    ),
    "other_tokenizer": (
        lambda make, world, root: make(
            "marian",
            THRESHOLD,
            tokenizers={"teacher": {"kind": "pretrained", "path": str(world.root / "bart")}},
        ),
        IdentityError,
        r"\([0-9a-f]{32}\), the teacher has its own \([0-9a-f]{32}\)",
    ),
    "small_teacher": (
        lambda make, world, root: make(
            "bart",
            THRESHOLD,
            tokenizers={"teacher": {"kind": "pretrained", "path": str(world.root / "marian")}},
        ),
        ModelError,
        "its output has 19 ids, the tokenizer .* has 36",
    ),
    "missing_teacher": (
        lambda make, world, root: make(codec=THRESHOLD, **teacher_at(root / "none")),
        ModelError,
        "none: found no such directory",
    ),
    "missing_file": (
        lambda make, world, root: make(
            corpus={"fields": {"src": str(root / "none"), "tgt": str(world.root / "tgt")}}
        ),
        CorpusError,
        "none: found no such file",
    ),
    "unequal": (
        lambda make, world, root: make(
            corpus=changed_corpus(world, root, lambda s, t: (s, t[:-1]))
        ),
        CorpusError,
        "s has 60; .*t has 59",
    ),
    "vocab_too_large": (
        lambda make, world, root: make(None, tokenizers={"teacher": {"kind": "sentencepiece"}}),
        ModelError,
        "cannot train 8000 pieces: Vocabulary size too high",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_writes_nothing(fault, make_recipe, world, tmp_path):
    make, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message) as error:
        dump(make(make_recipe, world, tmp_path), tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


def test_broken_utf8_late_in_the_corpus(make_recipe, world, tmp_path):
    corpus = changed_corpus(world, tmp_path, lambda s, t: (s, t))
    with (tmp_path / "s").open("ab") as file:
        file.write(b"caf\xe9\n")
    with (tmp_path / "t").open("ab") as file:
        file.write(b"cat\n")
    with pytest.raises(CorpusError, match="s: line 61, byte 4: 0xe9 is not UTF-8"):
        dump(make_recipe(corpus=corpus), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_output_that_holds_something_else(make_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match=r"already holds other files .thesis.tex."):
        dump(make_recipe(), tmp_path / "out")
    with pytest.raises(StorageError, match="output is a file"):
        dump(make_recipe(), tmp_path / "out" / "thesis.tex")
    assert tree(tmp_path / "out") == {"thesis.tex": b"x"}


def test_a_read_only_output(make_recipe, tmp_path, monkeypatch):
    def mkdir(self, *args, **keys):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(StorageError, match=r"cache: cannot be written: .*read-only") as error:
        dump(make_recipe(), tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_logits_that_are_not_finite(make_recipe, world, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(world.root / "marian", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["final_logits_bias"][0, 5] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    recipe = make_recipe(codec=THRESHOLD, **teacher_at(tmp_path / "nan"))
    with pytest.raises(ModelError, match=r"signal 'logits', corpus rows .* NaN") as error:
        dump(recipe, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert open_cache(tmp_path / "cache").committed("logits") == set()
