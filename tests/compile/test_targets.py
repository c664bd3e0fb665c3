"""Hypotheses as new targets: which are chosen, and that labels, tokens and texts are theirs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu
import torch

from kdcache.compile import CompileOptions, compile_caches
from kdcache.compile.hypotheses import SentenceBleu, draw, tokens_of
from kdcache.compile.hypotheses import closest as closest_of
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import FullCodec, ThresholdCodec, TopKCodec
from kdcache.formats.identity import sample_id
from kdcache.formats.plan import plan_shards
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import join_ids
from kdcache.labels.coded_labels import LogitsSpec, coded_labels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from tests.compile.written import CODECS, COUNT, TEMPERATURES, VOCAB, Written, write_world
from tests.formats.labels import code_labels


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Written:
    return write_world(tmp_path_factory.mktemp("written"))


def closest(world: Written, m: int) -> int:
    scores = [sacrebleu.sentence_bleu(h, [world.tgt[m]]).score for h in world.hypotheses[m]]
    return scores.index(max(scores))


def samples(path) -> list[tuple[str, str, str, list[int], list[int]]]:
    """id, source text, target text, source ids and target ids of every sample."""
    cache, found = open_cache(path), []
    for n in range(cache.num_shards):
        shard = cache.samples(n)
        for m in range(len(shard.row)):
            ids = [
                join_ids(shard.streams[s].take(np.array([m])).fields).tolist()
                for s in ("src", "tgt")
            ]
            texts = [shard.text(field)[m].as_py() for field in ("src", "tgt")]
            found.append((shard.sample_id[m].tobytes().hex(), *texts, *ids))
    return found


def check_samples(world: Written, path, chosen: list[int], of: list[int]) -> None:
    sources = {m: ids for m, (_, _, _, ids, _) in enumerate(samples(world.root))}
    expected = []
    for m, h in zip(of, chosen, strict=True):
        src, tgt = world.src[m], world.hypotheses[m][h]
        expected.append((sample_id([src, tgt]).hex(), src, tgt, sources[m], world.ids[m][h]))
    assert samples(path) == expected


def check_labels(world: Written, path, names, chosen: list[int], of: list[int]) -> None:
    """Every signal decodes to what it would be, had the hypotheses been dumped as targets."""
    cache = open_cache(path)
    rows = np.concatenate([np.r_[world.positions(m, h)] for m, h in zip(of, chosen, strict=True)])
    gold = np.array([i for m, h in zip(of, chosen, strict=True) for i in world.ids[m][h]])
    counts = np.array([len(world.ids[m][h]) for m, h in zip(of, chosen, strict=True)])
    for name in names:
        record = cache.logits(name)
        assert (record.at, record.hypotheses, record.hypothesis) == ("targets", None, 0)
        assert record.stream_digest == cache.stream("tgt").digest
        columns = code_labels(world.teacher[rows], gold, counts, record.codec, TEMPERATURES)
        at = 0
        for n in range(cache.num_shards):
            for start, stop, found in cache.signal_shard(name, n).parts:
                some = {key: c.take(np.arange(start, stop)) for key, c in columns.items()}
                spec = LogitsSpec(record.codec, record.vocab_size, record.temperatures)
                assert torch.equal(decoded(spec, found), decoded(spec, some))
                assert (found["tokens"].fields["gold"] == some["tokens"].fields["gold"]).all()
                at = stop
        assert at == len(of)


def decoded(spec: LogitsSpec, columns: dict[str, Ragged]) -> torch.Tensor:
    own = {key: column.take(np.arange(len(column))) for key, column in columns.items()}
    return densify(decode(coded_labels(spec, own)), VOCAB)


def test_the_best_hypotheses(world, tmp_path):
    summary = compile_caches([world.root], tmp_path / "out", CompileOptions(targets="beams=best"))
    check_samples(world, tmp_path / "out", [0] * COUNT, list(range(COUNT)))
    names = ["all_drawn", "all_full", "all_top", "first"]
    check_labels(world, tmp_path / "out", names, [0] * COUNT, list(range(COUNT)))
    cache = open_cache(tmp_path / "out")
    assert sorted(cache.signals) == [*names, "hidden_src"]
    dropped = ["beams", "hidden_other", "hidden_tgt", "on_reference", "second"]
    assert summary["dropped_signals"] == dropped
    # The other stream of the replaced text has gone, its tokenizer too.
    assert sorted(cache.manifest.streams) == ["src", "tgt"]
    assert sorted(cache.manifest.tokenizers) == ["own"]
    assert verify_cache(tmp_path / "out").faults == []
    before, after = (hidden_of(path) for path in (world.root, tmp_path / "out"))
    assert (before == after).all()


def hidden_of(path) -> np.ndarray:
    cache = open_cache(path)
    shards = [cache.dense_shard("hidden_src", n) for n in range(cache.num_shards)]
    return np.concatenate([shard.decode(shard.start, shard.stop, 1) for shard in shards])


def test_those_closest_to_the_reference(world, tmp_path):
    chosen = [closest(world, m) for m in range(COUNT)]
    assert 0 < sum(chosen) < COUNT
    options = CompileOptions(targets="beams=reference", shard_tokens=60)
    compile_caches([world.root], tmp_path / "out", options)
    check_samples(world, tmp_path / "out", chosen, list(range(COUNT)))
    names = ["all_drawn", "all_full", "all_top"]
    assert sorted(open_cache(tmp_path / "out").signals) == [*names, "hidden_src"]
    pairs = [len(src) + len(tgt) for _, _, _, src, tgt in samples(tmp_path / "out")]
    shards = [(s.start, s.stop) for s in open_cache(tmp_path / "out").manifest.shards]
    assert shards == plan_shards(np.array(pairs), 60)
    check_labels(world, tmp_path / "out", names, chosen, list(range(COUNT)))
    assert verify_cache(tmp_path / "out").faults == []


def test_drawn_ones_differ_between_copies_and_not_between_runs(world, tmp_path):
    options = CompileOptions(targets="beams=sampled", mix=[2], seed=5, signals=["all_full"])
    compile_caches([world.root], tmp_path / "out", options)
    of = [*range(COUNT), *range(COUNT)]
    found = [text for _, _, text, _, _ in samples(tmp_path / "out")]
    chosen = [world.hypotheses[m].index(text) for m, text in zip(of, found, strict=True)]
    assert chosen[:COUNT] != chosen[COUNT:]
    check_samples(world, tmp_path / "out", chosen, of)
    check_labels(world, tmp_path / "out", ["all_full"], chosen, of)
    again = CompileOptions(targets="beams=sampled", seed=5, signals=[])
    compile_caches([world.root], tmp_path / "again", again)
    assert samples(tmp_path / "again") == samples(tmp_path / "out")[:COUNT]


def test_draws_follow_the_softmax_of_the_log_probs():
    log_probs = np.array([-1.0, -2.0, -0.5, -900.0, -901.0, -3.0])
    counts = np.array([3, 2, 1] * 3000)
    fields = {"log_prob": np.tile(log_probs, 3000).astype(np.float32)}
    columns = {"hypotheses": Ragged(offsets_of(counts), fields)}
    hashes = np.random.default_rng(0).integers(0, 2**64, len(counts), dtype=np.uint64)
    hashes[:3] = 2**64 - 1
    found = draw(columns, hashes)
    assert (found < counts).all()
    for kind, some in enumerate(([-1.0, -2.0, -0.5], [-900.0, -901.0])):
        weights = np.exp(np.array(some) - max(some))
        shares = np.bincount(found[kind::3], minlength=len(some)) / 3000
        assert np.abs(shares - weights / weights.sum()).max() < 4 * math.sqrt(0.25 / 3000)


def test_of_equally_close_hypotheses_the_first_is_taken():
    columns = {"hypotheses": Ragged(np.array([0, 4, 6]), {})}
    texts = ["no", "the old cat", "the old cat", "the cat", "not this", "nor that"]
    found = closest_of(columns, texts, ["the old cat", "fully other"], SentenceBleu("13a"))
    assert found.tolist() == [1, 0]


def test_tokens_of_chosen_hypotheses():
    hypotheses = Ragged(np.array([0, 2, 3]), {"num_tokens": np.array([2, 1, 3], np.uint16)})
    ids = np.array([7, 8, 9, 4, 5, 6], dtype=np.uint16)
    columns = {"hypotheses": hypotheses, "tokens": Ragged(np.array([0, 3, 6]), {"id": ids})}
    for chosen, expected in (([0, 0], [[7, 8], [4, 5, 6]]), ([1, 0], [[9], [4, 5, 6]])):
        found = tokens_of(columns, np.array(chosen))
        assert np.split(found.fields["id"], found.offsets[1:-1])[0].tolist() == expected[0]
        assert found.fields["id"].tolist() == [i for ids in expected for i in ids]


def test_the_bleu_of_the_best_hypothesis_filters(world, tmp_path):
    scores = [
        sacrebleu.sentence_bleu(some[0], [ref]).score
        for some, ref in zip(world.hypotheses, world.tgt, strict=True)
    ]
    middle = float(np.median(scores))
    options = CompileOptions(filters=[f"beams.bleu > {middle}"], signals=[])
    compile_caches([world.root], tmp_path / "out", options)
    kept = [world.src[m] for m, score in enumerate(scores) if score > middle]
    assert 0 < len(kept) < COUNT
    assert [src for _, src, *_ in samples(tmp_path / "out")] == kept


def test_references_and_hypotheses_are_mixed_with_word_level_labels(tmp_path):
    """Sequence and word level together: one signal, of one name, over both kinds of targets."""
    (tmp_path / "written").mkdir()
    world = write_world(tmp_path / "written", other=False)
    best = CompileOptions(targets="beams=best", signals=["all_top"], rename={"all_top": "labels"})
    compile_caches([world.root], tmp_path / "best", best)
    plain = CompileOptions(signals=["on_reference"], rename={"on_reference": "labels"})
    compile_caches([world.root], tmp_path / "plain", plain)
    both = [tmp_path / "plain", tmp_path / "best"]
    compile_caches(both, tmp_path / "out", CompileOptions(mix=[1, 1]))
    assert verify_cache(tmp_path / "out").faults == []
    texts = [text for _, _, text, _, _ in samples(tmp_path / "out")]
    assert texts == [*world.tgt, *(some[0] for some in world.hypotheses)]
    assert gold_of(tmp_path / "out") == [*gold_of(tmp_path / "plain"), *gold_of(tmp_path / "best")]
    assert gold_of(tmp_path / "plain") == gold_of(world.root, "on_reference")
    assert open_cache(tmp_path / "out").signals["labels"].codec == TopKCodec(k=5)


def gold_of(path, signal: str = "labels") -> list[int]:
    cache = open_cache(path)
    return [
        code
        for n in range(cache.num_shards)
        for _, _, columns in cache.signal_shard(signal, n).parts
        for code in columns["tokens"].fields["gold"].tolist()
    ]


def test_labels_of_all_codecs_were_looked_at():
    kinds = {type(codec) for name, codec in CODECS.items() if name.startswith("all")}
    assert kinds == {FullCodec, TopKCodec, ThresholdCodec}
