"""Filters, lists, subsets, mixtures and shards, against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdcache.compile import CompileOptions, compile_caches
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codes import gold_log_probs
from kdcache.formats.identity import sample_id
from kdcache.formats.plan import plan_shards
from tests.compile.universe import LOGITS, PAIRS, contents

NAMES = [LOGITS, "masks", "at_masked", "hidden_int8"]


@pytest.fixture(scope="module")
def cache(universe, tmp_path_factory):
    return universe.write(tmp_path_factory.mktemp("select") / "cache", range(len(PAIRS)), NAMES)


def ids_of(path) -> list[str]:
    return [sample["id"] for sample in contents(path)]


def labels(universe, signal: str, m: int) -> dict[str, list]:
    return universe.sample(m, [signal])["labels"][signal]["tokens"]


def loss(universe, signal: str, m: int) -> float:
    codes = labels(universe, signal, m)["gold"]
    return float(np.mean([25 * (code / 255) ** 2 for code in codes])) if codes else math.nan


def entropy(universe, m: int) -> float:
    codes = labels(universe, LOGITS, m)["entropy"]
    return float(np.mean(codes)) / 255 * math.log(12)


def test_filters(universe, cache, tmp_path):
    losses = [loss(universe, LOGITS, m) for m in range(len(PAIRS))]
    entropies = [entropy(universe, m) for m in range(len(PAIRS))]
    middle = {"loss": np.median(losses), "entropy": np.median(entropies)}
    for number, (condition, keep) in enumerate(
        [
            (f"logits.loss < {middle['loss']}", lambda m: losses[m] < middle["loss"]),
            (f"logits.entropy >= {middle['entropy']}", lambda m: entropies[m] >= middle["entropy"]),
            ("tgt.length == 3", lambda m: len(PAIRS[m][1]) == 2),
            ("src.length > 2", lambda m: len(PAIRS[m][0]) > 1),
        ]
    ):
        out = tmp_path / f"out{number}"
        kept = [m for m in range(len(PAIRS)) if keep(m)]
        assert 0 < len(kept) < len(PAIRS)
        summary = compile_caches([cache], out, CompileOptions(filters=[condition]))
        assert contents(out) == [universe.sample(m, NAMES) for m in kept]
        assert list(summary["left_out"].values()) == [len(PAIRS) - len(kept)]
        assert verify_cache(out).faults == []


def test_filters_together_and_labels_that_not_every_sample_has(universe, tmp_path):
    """A sample without a second hypothesis has no labels of it, so it fulfils no condition."""
    losses = [loss(universe, "second", m) for m in range(len(PAIRS))]
    assert any(map(math.isnan, losses))
    signals = [LOGITS, "beams", "second"]
    a = universe.write(tmp_path / "a", range(len(PAIRS)), signals)
    kept = [m for m, value in enumerate(losses) if value >= 0 and len(PAIRS[m][0]) < 3]
    options = CompileOptions(filters=["second.loss != -1", "src.length < 4"], signals=[LOGITS])
    compile_caches([a], tmp_path / "out", options)
    assert contents(tmp_path / "out") == [universe.sample(m, [LOGITS]) for m in kept]


def test_a_filter_asks_the_cache_that_can_tell(universe, tmp_path):
    a = universe.write(tmp_path / "a", [0, 1, 2, 4, 5], ["hidden"])
    b = universe.write(tmp_path / "b", [5, 4, 2, 1], [LOGITS])
    middle = np.median([loss(universe, LOGITS, m) for m in (1, 2, 4, 5)])
    condition = f"logits.loss < {middle}"
    with pytest.raises(ValueError, match="1 of 5 samples are in no cache that has 'logits'"):
        compile_caches([a, b], tmp_path / "o", CompileOptions(filters=[condition], signals=[]))
    options = CompileOptions(filters=[condition], missing="drop")
    compile_caches([a, b], tmp_path / "out", options)
    kept = [m for m in (1, 2, 4, 5) if loss(universe, LOGITS, m) < middle]
    assert contents(tmp_path / "out") == [universe.sample(m, ["hidden", LOGITS]) for m in kept]


def test_lists_keep_the_order_of_the_corpus(universe, cache, tmp_path):
    path = tmp_path / "list"
    path.write_text("\n".join([sample_id(PAIRS[7]).hex(), sample_id(PAIRS[0]).hex(), "22", "2"]))
    compile_caches([cache], tmp_path / "out", CompileOptions(ids=path))
    # 0, 3 and 8 have one id; the rows of the cache are twice the number of the sample.
    assert contents(tmp_path / "out") == [universe.sample(m, NAMES) for m in (0, 1, 3, 7, 8, 11)]


def test_a_subset_does_not_depend_on_order_shards_or_company(universe, cache, tmp_path):
    options = CompileOptions(fraction=0.5, seed=3, signals=[LOGITS])
    compile_caches([cache], tmp_path / "out", options)
    found = contents(tmp_path / "out")
    assert 0 < len(found) < len(PAIRS)
    everything = [universe.sample(m, [LOGITS]) for m in range(len(PAIRS))]
    chosen = [m for m, sample in enumerate(everything) if sample in found]
    assert found == [everything[m] for m in chosen]
    a = universe.write(tmp_path / "a", [9, 0, 10, 3, 7, 8], [LOGITS], shard_tokens=7)
    b = universe.write(tmp_path / "b", [6, 2, 11, 1, 5, 4], [LOGITS], shard_tokens=100)
    compile_caches([b, a], tmp_path / "turned", options)
    turned = [m for m in (6, 2, 11, 1, 5, 4, 9, 0, 10, 3, 7, 8) if m in chosen]
    assert contents(tmp_path / "turned") == [everything[m] for m in turned]
    other = CompileOptions(fraction=0.5, seed=4, signals=[LOGITS])
    compile_caches([cache], tmp_path / "other", other)
    assert contents(tmp_path / "other") != found


def test_counts_are_exact_and_follow_the_filters(universe, cache, tmp_path):
    for count in (1, 3, 100):
        options = CompileOptions(count=count, filters=["tgt.length == 4"], signals=[LOGITS])
        compile_caches([cache], tmp_path / f"out{count}", options)
        fits = [m for m in range(len(PAIRS)) if len(PAIRS[m][1]) == 3]
        found = contents(tmp_path / f"out{count}")
        assert len(found) == min(count, len(fits))
        assert all(sample in [universe.sample(m, [LOGITS]) for m in fits] for sample in found)


def test_a_mixture_repeats_by_weight(universe, tmp_path):
    a = universe.write(tmp_path / "a", [0, 1, 2, 3, 4, 5], [LOGITS])
    b = universe.write(tmp_path / "b", [4, 6, 7], [LOGITS])
    compile_caches([a, b], tmp_path / "out", CompileOptions(mix=[1.5, 2], seed=1))
    found = contents(tmp_path / "out")
    sample = {m: universe.sample(m, [LOGITS]) for m in range(8)}
    part = [m for m in range(6) if sample[m] in found[6:-6]]
    assert 0 < len(part) < 6
    assert found == [sample[m] for m in [0, 1, 2, 3, 4, 5, *part, 4, 6, 7, 4, 6, 7]]
    assert [int(r) for n in range(1) for r in open_cache(tmp_path / "out").samples(n).row] == list(
        range(open_cache(tmp_path / "out").manifest.shards[0].stop)
    )
    compile_caches([a, b], tmp_path / "none", CompileOptions(mix=[0, 1]))
    assert contents(tmp_path / "none") == [sample[m] for m in (4, 6, 7)]
    # The share of 1.5 has that of 1.2 in it.
    compile_caches([a, b], tmp_path / "less", CompileOptions(mix=[1.2, 0], seed=1))
    less = contents(tmp_path / "less")[6:]
    assert all(one in [sample[m] for m in part] for one in less)


def test_a_part_of_a_subset_is_chosen_apart(universe, cache, tmp_path):
    """Were it by the same hashes, half of a half would be all of it."""
    compile_caches([cache], tmp_path / "half", CompileOptions(fraction=0.5, signals=[]))
    options = CompileOptions(fraction=0.5, mix=[0.5], signals=[])
    compile_caches([cache], tmp_path / "quarter", options)
    half, quarter = ids_of(tmp_path / "half"), ids_of(tmp_path / "quarter")
    assert 0 < len(quarter) < len(half)
    assert set(quarter) <= set(half)


@pytest.mark.parametrize("shard_tokens", [1, 9, 1000])
def test_shards_are_cut_anew(universe, cache, tmp_path, shard_tokens):
    compile_caches([cache], tmp_path / "out", CompileOptions(shard_tokens=shard_tokens))
    out = open_cache(tmp_path / "out")
    counts = np.array([len(src) + len(tgt) + 2 for src, tgt in PAIRS])
    shards = [(shard.start, shard.stop) for shard in out.manifest.shards]
    assert shards == plan_shards(counts, shard_tokens)
    assert out.manifest.shard_tokens == shard_tokens
    assert contents(tmp_path / "out") == [universe.sample(m, NAMES) for m in range(len(PAIRS))]
    assert verify_cache(tmp_path / "out").faults == []


def test_losses_are_those_of_the_codes():
    assert gold_log_probs(np.array([51], dtype=np.uint8))[0] == pytest.approx(-1.0)
