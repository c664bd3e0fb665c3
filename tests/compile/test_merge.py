"""Merging caches: disjoint samples, overlaps, joins of signals, duplicates."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.compile import CompileOptions, compile_caches
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.identity import CorpusDigest, StreamDigest
from kdcache.formats.schema import join_ids
from tests.compile.universe import LOGITS, Universe, contents


def expected(universe: Universe, samples, path: Path) -> list[dict]:
    names = list(open_cache(path).signals)
    return [universe.sample(m, names) for m in samples]


def test_a_copy_holds_the_same_files(whole, tmp_path):
    compile_caches([whole], tmp_path / "copy")
    a, b = open_cache(whole), open_cache(tmp_path / "copy")
    for name in a.signals:
        for shard in range(a.num_shards):
            stands, copied = (c.commit_record(name, shard) for c in (a, b))
            assert copied.entries == stands.entries
            assert copied.tokens == stands.tokens
    assert contents(tmp_path / "copy") == contents(whole)
    assert verify_cache(tmp_path / "copy").faults == []


def test_disjoint_samples_follow_one_another_with_every_kind(universe, tmp_path):
    a = universe.write(tmp_path / "a", [0, 1, 2, 5])
    b = universe.write(tmp_path / "b", [11, 4, 9], part_samples=1, shard_tokens=9)
    out = tmp_path / "out"
    summary = compile_caches([a, b], out, CompileOptions(shard_tokens=11))
    assert contents(out) == expected(universe, [0, 1, 2, 5, 11, 4, 9], out)
    assert verify_cache(out).faults == []
    assert summary["samples"] == 7
    assert set(summary["signals"]) == set(universe.columns)
    assert summary["shards"] == len(open_cache(out).manifest.shards) > 2


def test_overlaps_stand_once_where_they_first_appear(universe, tmp_path):
    a = universe.write(tmp_path / "a", [2, 1, 7])
    b = universe.write(tmp_path / "b", [7, 4, 2, 10])
    c = universe.write(tmp_path / "c", [10, 6, 1])
    out = tmp_path / "out"
    compile_caches([a, b, c], out)
    assert contents(out) == expected(universe, [2, 1, 7, 4, 10, 6], out)
    assert verify_cache(out).faults == []


def test_signals_of_the_same_samples_are_joined(universe, tmp_path):
    """Each cache in an order of its own, so every label has to find its sample."""
    a = universe.write(tmp_path / "a", [0, 1, 2, 4, 6], signals=[LOGITS, "masks", "at_masked"])
    b = universe.write(tmp_path / "b", [6, 2, 0, 4, 1], signals=["masks", "masked_hidden"])
    c = universe.write(tmp_path / "c", [4, 1, 6, 2, 0], signals=["attention", "beams", "every"])
    out = tmp_path / "out"
    compile_caches([a, b, c], out)
    names = [LOGITS, "masks", "at_masked", "masked_hidden", "attention", "beams", "every"]
    assert sorted(open_cache(out).signals) == sorted(names)
    assert contents(out) == expected(universe, [0, 1, 2, 4, 6], out)
    assert verify_cache(out).faults == []


def test_the_kth_duplicate_of_an_id_is_the_same_sample_everywhere(universe, tmp_path):
    """Samples 0, 3 and 8 have one id and labels of their own."""
    a = universe.write(tmp_path / "a", [0, 1, 3], signals=[LOGITS])
    b = universe.write(tmp_path / "b", [1, 0, 3, 8], signals=[LOGITS])
    out = tmp_path / "out"
    compile_caches([a, b], out)
    assert contents(out) == expected(universe, [0, 1, 3, 8], out)


def test_labels_of_overlaps_are_those_of_the_first_cache(universe, tmp_path):
    a = universe.write(tmp_path / "a", [1, 2], signals=["classes"])
    other = universe.replaced("classes", 1, 9).replaced("classes", 2, 9)
    b = other.write(tmp_path / "b", [1, 2, 4], signals=["classes"])
    out = tmp_path / "out"
    compile_caches([a, b], out)
    assert contents(out) == [
        universe.sample(1, ["classes"]),
        universe.sample(2, ["classes"]),
        other.sample(4, ["classes"]),
    ]
    compile_caches([b, a], tmp_path / "turned")
    assert contents(tmp_path / "turned") == [other.sample(m, ["classes"]) for m in (1, 2, 4)]


def test_samples_without_a_signal_are_refused_or_dropped(universe, tmp_path):
    a = universe.write(tmp_path / "a", [0, 1, 2, 4], signals=[LOGITS, "hidden"])
    b = universe.write(tmp_path / "b", [4, 5, 6], signals=[LOGITS])
    with pytest.raises(ValueError, match=r"2 of 6 samples lack the signal 'hidden', the first is"):
        compile_caches([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compile_caches([a, b], tmp_path / "out", CompileOptions(signals=[LOGITS]))
    assert contents(tmp_path / "out") == expected(universe, [0, 1, 2, 4, 5, 6], tmp_path / "out")
    summary = compile_caches([a, b], tmp_path / "inner", CompileOptions(missing="drop"))
    assert contents(tmp_path / "inner") == expected(universe, [0, 1, 2, 4], tmp_path / "inner")
    assert summary["left_out"] == {"without hidden": 2}


def test_the_manifest_says_what_the_samples_are(universe, tmp_path):
    a = universe.write(tmp_path / "a", [2, 1, 7], signals=[LOGITS])
    b = universe.write(tmp_path / "b", [4, 2], signals=[LOGITS], shard_tokens=8)
    compile_caches([a, b], tmp_path / "out")
    cache = open_cache(tmp_path / "out")
    shards = [cache.samples(n) for n in range(cache.num_shards)]
    corpus = CorpusDigest()
    for shard in shards:
        corpus.update(shard.sample_id, shard.row)
    assert cache.manifest.corpus.digest == corpus.hexdigest()
    for name, stream in cache.manifest.streams.items():
        digest, lengths = StreamDigest("ab" * 16), []
        for shard in shards:
            column = shard.streams[name]
            digest.update(column.lengths, join_ids(column.fields))
            lengths += column.lengths.tolist()
        assert stream.digest == digest.hexdigest()
        assert (stream.num_tokens, stream.longest) == (sum(lengths), max(lengths))
    lineage = cache.manifest.lineage
    assert [source.name for source in lineage.sources] == [str(a), str(b)]
    assert [source.num_samples for source in lineage.sources] == [3, 2]
    assert lineage.sources[0].corpus == open_cache(a).manifest.corpus.digest
    assert set(lineage.sources[0].signals) == {LOGITS}
    assert [step["operation"] for step in lineage.operations] == ["merge", "signals"]
    compile_caches([tmp_path / "out"], tmp_path / "again", CompileOptions(count=2))
    again = open_cache(tmp_path / "again").manifest.lineage
    assert again.sources[0].lineage == lineage


def test_renamed_signals_are_followed_by_those_made_from_them(universe, tmp_path):
    a = universe.write(tmp_path / "a", [0, 1, 2], ["masks", "beams", "at_masked", "every"])
    rename = {"masks": "places", "beams": "written", "every": "labels"}
    compile_caches([a], tmp_path / "out", CompileOptions(rename=rename))
    cache = open_cache(tmp_path / "out")
    assert sorted(cache.signals) == ["at_masked", "labels", "places", "written"]
    assert cache.signal("at_masked").masks == "places"
    assert cache.signal("labels").hypotheses == "written"
    found = [sample["labels"] for sample in contents(tmp_path / "out")]
    for labels, m in zip(found, [0, 1, 2], strict=True):
        before = universe.sample(m, ["masks", "beams", "at_masked", "every"])["labels"]
        assert labels == {rename.get(name, name): value for name, value in before.items()}
    assert verify_cache(tmp_path / "out").faults == []
