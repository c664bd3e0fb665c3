"""Repair without a mirror: what is broken is made again, by the teacher and from the corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kdcache.cli import main
from kdcache.dump import shards
from kdcache.dump.runner import dump
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.manifest import CommitRecord
from kdcache.formats.record import decode_record, encode_record
from kdcache.recipe import dump_recipe
from kdcache.repair import repair_cache
from tests.dump.world import THRESHOLD, tree

SIGNALS = {
    "logits": {"codec": THRESHOLD},
    "hidden": {"kind": "hidden", "stream": "src", "side": "encoder", "layers": [0, 1]},
    "beams": {"kind": "beams", "num_beams": 2, "max_length": 6},
    "on_beams": {"kind": "logits", "hypotheses": "beams", "codec": {"name": "topk", "k": 3}},
}


@pytest.fixture(scope="module")
def dumped(world, tmp_path_factory):
    """A recipe with signals of several kinds, and its cache; not to be changed."""
    from kdcache.recipe import parse_recipe

    root = tmp_path_factory.mktemp("dumped")
    recipe = parse_recipe(
        {
            "name": "test",
            "corpus": {"fields": {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}},
            "dump": {
                "teacher": {"path": str(world.root / "marian"), "device": "cpu"},
                "shard_tokens": 700,
                "batch_tokens": 300,
                "signals": SIGNALS,
            },
        }
    )
    dump(recipe, root / "cache")
    (root / "recipe.yaml").write_text(dump_recipe(recipe))
    return root


@pytest.fixture
def own(dumped, tmp_path):
    """A copy of the cache that may be changed."""
    shutil.copytree(dumped / "cache", tmp_path / "cache")
    return tmp_path / "cache"


DAMAGES = {
    "a bit": lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:],
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "missing": None,
}
FILES = {
    "samples": "samples/00001.0-*.arrow",
    "commit of samples": "commits/samples.00001.json",
    "logits": "logits/00001.0-*.arrow",
    "commit of logits": "commits/logits.00000.json",
    "beams": "beams/00001.0-*.arrow",
    "labels of beams": "on_beams/00000.0-*.arrow",
    "commit of hidden": "commits/hidden.00001.json",
    "hidden": "hidden/00001.0-*.zarr/values/c/0/0/0",
    "metadata": "hidden/00001.0-*.zarr/values/zarr.json",
    "tokenizer": "tokenizers/teacher/source.spm",
    "tokens": "tokenizers/teacher/tokens.json",
}


def damage(root: Path, pattern: str, name: str) -> str:
    (file,) = root.glob(pattern)
    change = DAMAGES[name]
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    return file.relative_to(root).as_posix()


def stamps(root: Path, but: set[str]) -> dict[str, tuple[int, int]]:
    """When each file was written, and which it is."""
    return {
        name: ((root / name).stat().st_mtime_ns, (root / name).stat().st_ino)
        for name in tree(root)
        if name not in but
    }


@pytest.mark.parametrize("name", ["a bit", "missing"])
@pytest.mark.parametrize("pattern", FILES.values(), ids=FILES.keys())
def test_what_is_broken_alone_is_made_again(dumped, own, pattern, name):
    path = damage(own, pattern, name)
    before = stamps(own, {path})
    found = verify_cache(own)
    assert found.faults or found.unfinished
    report = repair_cache(own)
    assert report.verified.faults == report.verified.unfinished == []
    assert report.failed == []
    assert report.faults != []
    assert report.repaired == [f"{path}: made again"]
    assert tree(own) == tree(dumped / "cache")
    assert stamps(own, {path}) == before
    assert not (own / ".locks").exists()


def test_much_at_once(dumped, own):
    paths = {damage(own, pattern, "cut") for pattern in FILES.values()}
    before = stamps(own, paths)
    report = repair_cache(own)
    assert (report.verified.faults, report.failed) == ([], [])
    assert tree(own) == tree(dumped / "cache")
    assert stamps(own, paths) == before


def test_a_sound_cache_is_left_alone(own, monkeypatch):
    before = stamps(own, set())
    monkeypatch.setattr(shards, "redo_shard", None)
    report = repair_cache(own)
    assert (report.repaired, report.failed, report.verified.faults) == ([], [], [])
    assert stamps(own, set()) == before


def test_what_a_dump_has_not_come_to_is_left_to_it(dumped, own):
    for file in [*own.glob("on_beams/*"), *own.glob("commits/on_beams.*")]:
        file.unlink()
    path = damage(own, "logits/00001.0-*.arrow", "cut")
    report = repair_cache(own)
    assert report.repaired == [f"{path}: made again"]
    assert report.verified.faults == report.failed == []
    (line,) = report.verified.unfinished
    assert "'on_beams' is unfinished: 3 of 3 shards" in line
    assert list(own.glob("on_beams/*")) == []


@pytest.mark.parametrize("path", ["kdcache.json", "signals/logits.json", "signals/beams.json"])
@pytest.mark.parametrize("name", ["cut", "missing"])
def test_a_record_needs_a_recipe(dumped, own, path, name):
    damage(own, path, name)
    half = tree(own)
    report = repair_cache(own)
    assert report.repaired == []
    (line,) = [line for line in report.failed if f"{path}: not repaired" in line][:1]
    assert "it alone said how; name what it was made with by --recipe" in line
    assert report.verified.faults
    assert tree(own) == half
    before = stamps(own, {path})
    report = repair_cache(own, recipe=str(dumped / "recipe.yaml"))
    assert (report.verified.faults, report.failed) == ([], [])
    assert report.repaired == [f"{path}: made again"]
    assert tree(own) == tree(dumped / "cache")
    assert stamps(own, {path}) == before


def test_another_recipe_is_refused_and_nothing_is_taken_away(dumped, own):
    damage(own, "logits/00001.0-*.arrow", "cut")
    half = tree(own)
    for override, said in [
        (("dump.signals.logits.codec.c", "1/4"), "codec.c: 0.125 in the cache, 0.25 given"),
        (("dump.seed", "3"), "seed: 1 in the cache, 3 given"),
        (("dump.batch_tokens", "100"), "dump.batch_tokens: 300 in the cache, 100 given"),
        (("dump.teacher.path", "nowhere/at-all"), "nowhere/at-all"),
    ]:
        report = repair_cache(own, recipe=str(dumped / "recipe.yaml"), overrides=[override])
        assert said in report.failed[0]
        assert "\n" not in report.failed[0]
        assert tree(own) == half
    damage(own, "signals/logits.json", "missing")
    half = tree(own)
    override = ("dump.signals.logits.codec.c", "1/4")
    report = repair_cache(own, recipe=str(dumped / "recipe.yaml"), overrides=[override])
    assert "the recipe gives a signal of digest" in report.failed[0]
    assert tree(own) == half


def test_a_moved_teacher_and_corpus(dumped, own, world, tmp_path):
    damage(own, "logits/00000.0-*.arrow", "cut")
    damage(own, "samples/00000.0-*.arrow", "cut")
    moved = [
        ("dump.teacher.path", str(shutil.copytree(world.root / "marian", tmp_path / "teacher"))),
        ("corpus.fields.src", str(shutil.copy(world.root / "src", tmp_path / "a"))),
        ("corpus.fields.tgt", str(shutil.copy(world.root / "tgt", tmp_path / "b"))),
    ]
    (tmp_path / "a").write_text("other\n" + (tmp_path / "a").read_text().split("\n", 1)[1])
    report = repair_cache(own, overrides=moved)
    assert "another corpus or tokenizer: corpus.digest" in report.failed[0]
    shutil.copy(world.root / "src", tmp_path / "a")
    assert repair_cache(own, overrides=moved).verified.faults == []
    assert tree(own) == tree(dumped / "cache")


def test_the_command_takes_overrides(dumped, own, world, tmp_path, capsys):
    path = damage(own, "logits/00000.0-*.arrow", "cut")
    moved = shutil.copytree(world.root / "marian", tmp_path / "teacher")
    assert main(["verify", str(own), "--repair", "--dump.teacher.path", str(tmp_path / "no")]) == 1
    assert f"{tmp_path / 'no'}: " in capsys.readouterr().out
    assert main(["verify", str(own), "--repair", "--dump.teacher.path", str(moved)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: made again\n{own}: sound, ")
    assert tree(own) == tree(dumped / "cache")


def rebuilt_with_noise(root: Path, shard: int) -> None:
    """As if the beams of a shard had been made on other hardware: other scores, so other bytes."""
    cache = open_cache(root)
    record = cache.signal("beams")
    commit = cache.commit_record("beams", shard)
    from kdcache.formats.ragged import Ragged
    from kdcache.formats.schema import ragged_batch, signal_schema
    from kdcache.formats.writer import CacheWriter

    ((start, stop, columns),) = cache.signal_shard("beams", shard).parts
    scores = columns["hypotheses"].fields["score"] + np.float32(0.125)
    fields = {**columns["hypotheses"].fields, "score": scores}
    columns = {**columns, "hypotheses": Ragged(columns["hypotheses"].offsets, fields)}
    path = root / f"commits/beams.{shard:05d}.json"
    path.unlink()
    with CacheWriter(root) as writer:
        batch = ragged_batch(signal_schema(record), columns)
        part = writer.write_part("beams", shard, 0, start, stop, batch)
        writer.commit(commit.model_copy(update={"parts": [part]}))
    old = {file.path for part in commit.parts for file in part.files}
    for name in old:
        (root / name).unlink()
    labels = root / f"commits/on_beams.{shard:05d}.json"
    tree = decode_record(CommitRecord, labels.read_bytes(), "x")
    digest = open_cache(root).commit_record("beams", shard).digest
    labels.write_bytes(encode_record(tree.model_copy(update={"inputs": {"beams": digest}})))


def test_what_was_made_from_what_changed_is_made_again_too(dumped, own):
    rebuilt_with_noise(own, 1)
    assert verify_cache(own).faults == []
    assert tree(own) != tree(dumped / "cache")
    path = damage(own, "beams/00001.0-*.arrow", "a bit")
    report = repair_cache(own)
    assert (report.verified.faults, report.failed) == ([], [])
    said = "".join(report.repaired)
    assert "commits/beams.00001.json: made again" in said
    assert "commits/on_beams.00001.json: made again" in said
    assert "00000" not in said
    assert not (own / path).exists()
    assert tree(own) == tree(dumped / "cache")


def test_a_mirror_in_another_form_is_refused_where_it_does_not_fit(dumped, own):
    rebuilt_with_noise(own, 1)
    path = damage(own, "on_beams/00001.0-*.arrow", "cut")
    half = tree(own)
    report = repair_cache(own, dumped / "cache")
    (line,) = report.failed
    assert "made from another 'beams'; repair without --mirror" in line
    assert tree(own) == half
    report = repair_cache(own)
    assert (report.verified.faults, report.repaired) == ([], [f"{path}: made again"])


def test_a_trained_tokenizer_is_trained_again(make_recipe, tmp_path):
    tokenizers = {"teacher": {"kind": "sentencepiece", "vocab_size": 34}}
    dump(make_recipe(None, tokenizers=tokenizers), tmp_path / "cache")
    expected = tree(tmp_path / "cache")
    damage(tmp_path / "cache", "tokenizers/teacher/source.spm", "cut")
    damage(tmp_path / "cache", "samples/00000.0-*.arrow", "cut")
    report = repair_cache(tmp_path / "cache")
    assert (report.verified.faults, report.failed) == ([], [])
    assert tree(tmp_path / "cache") == expected


def test_a_shard_that_another_process_writes_is_left_to_it(own):
    from kdcache.formats.stores.store import open_store

    damage(own, "logits/00001.0-*.arrow", "cut")
    half = tree(own)
    claim = open_store(own).claim("logits.00001")
    report = repair_cache(own)
    assert "logits shard 1: not repaired: another process writes it; wait" in report.failed[0]
    assert {name: data for name, data in tree(own).items() if ".locks" not in name} == half
    damage(own, "commits/hidden.00001.json", "missing")  # as if a dump were at work on it
    other = open_store(own).claim("hidden.00001")
    assert len(repair_cache(own).failed) == 1
    claim.release()
    other.release()
    assert repair_cache(own).verified.faults == []
