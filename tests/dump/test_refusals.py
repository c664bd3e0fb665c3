import errno
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kdcache.dump.runner import dump
from kdcache.dump.same_samples import check_recipe
from kdcache.errors import (
    CorpusError,
    IdentityError,
    ModelError,
    RecipeError,
    StorageError,
)
from kdcache.formats import writer
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from tests.dump.world import THRESHOLD, Killed, changed_corpus, rows_of, teacher_at, tree


def other_teacher(world, root):
    """The Marian teacher with one weight changed."""
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


@pytest.mark.parametrize("what", OTHERS)
def test_another_thing_on_an_existing_cache(what, make_recipe, world, whole, standing, tmp_path):
    make, message = OTHERS[what]
    with pytest.raises(IdentityError, match=message) as error:
        dump(make(make_recipe, world, tmp_path), standing)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(("choose another output", "give the signal another name"))
    assert tree(standing) == whole[1]


def test_keys_that_a_cache_did_not_know_yet_stand_at_their_defaults(make_recipe, standing):
    recipe, manifest = make_recipe(codec=THRESHOLD), open_cache(standing).manifest
    older = json.loads(json.dumps(manifest.recipe))
    del older["dump"]["streams"]["tgt"]["template"], older["corpus"]["empty"]
    check_recipe(manifest.model_copy(update={"recipe": older}), recipe, "cache")
    older["dump"]["streams"]["tgt"]["template"] = "chat"
    with pytest.raises(IdentityError, match=r"tgt.template: 'chat' in the cache, 'none' given"):
        check_recipe(manifest.model_copy(update={"recipe": older}), recipe, "cache")
    older["dump"]["streams"]["tgt"] |= {"template": "none", "of_another_version": 1}
    with pytest.raises(IdentityError, match="of_another_version: 1 in the cache, absent given"):
        check_recipe(manifest.model_copy(update={"recipe": older}), recipe, "cache")


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
    with pytest.raises(ModelError, match=r"'src' has samples of up to 52 tokens, .* takes 48"):
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
        "signals.logits needs a teacher: set dump.teacher.path, or signals.logits.teacher",
    ),
    "too_few_hypotheses": (
        lambda make, world, root: make(
            signals={
                "beams": {"kind": "beams", "num_beams": 3, "num_hypotheses": 2},
                "best": {"kind": "logits", "hypotheses": "beams", "hypothesis": 2},
            }
        ),
        RecipeError,
        "signals.best.hypothesis is 2; beams has 2 a sample, so expected 0 to 1, or all",
    ),
    "second_teacher_of_another_kind": (
        lambda make, world, root: make(
            teachers={"other": {"path": str(world.root / "bart")}},
            signals={
                "logits": {},
                "topic": {"kind": "classes", "stream": "src", "teacher": "other"},
            },
        ),
        ModelError,
        "signals.topic: .*bart, a teacher of kind encoder_decoder, has no classes; it has logits",
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
        r"\([0-9a-f]{32}\), the teacher .* has its own \([0-9a-f]{32}\)",
    ),
    "small_teacher": (
        lambda make, world, root: make(
            "bart",
            THRESHOLD,
            tokenizers={"teacher": {"kind": "pretrained", "path": str(world.root / "marian")}},
        ),
        ModelError,
        "it knows 19 ids, the tokenizer .* has 36",
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
    shutil.copytree(world.root / "marian", tmp_path / "nan")
    weights = load_file(tmp_path / "nan" / "model.safetensors")
    weights["final_logits_bias"][0, 5] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    recipe = make_recipe(codec=THRESHOLD, **teacher_at(tmp_path / "nan"))
    with pytest.raises(ModelError, match=r"signal 'logits', corpus rows .* NaN") as error:
        dump(recipe, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert open_cache(tmp_path / "cache").committed("logits") == set()
