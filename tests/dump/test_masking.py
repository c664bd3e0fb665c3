"""Masking against the papers' figures."""

import math
import random
from itertools import combinations, groupby
from types import SimpleNamespace

import numpy as np
import pytest

from kdcache.formats.keyed import sample_keys
from kdcache.formats.ragged import Ragged
from kdcache.text.mask_choice import Tokens, span_lengths
from tests.dump.chi_squared import assert_counts, assert_independent, assert_same_counts
from tests.dump.masking_data import (
    CLS,
    MASK,
    SEP,
    SPECIAL,
    WORDPIECE,
    WORDS,
    corpus,
    draw,
    flags,
    scheme,
)
from tests.dump.masking_oracle import cut_words


def test_bert_masks_15_percent_of_each_sample_and_at_least_one_token() -> None:
    lengths = np.tile(np.arange(1, 61), 60)
    out = draw(corpus(lengths), scheme("bert"))
    expected = [max(1, round(n * 0.15)) for n in lengths.tolist()]
    assert out.counts[:, 0].tolist() == expected
    assert lengths.sum() > 100_000
    assert out.counts.sum() / lengths.sum() == pytest.approx(0.15, abs=0.005)


def test_bert_gives_every_set_of_tokens_the_same_probability() -> None:
    data = corpus(np.full(20_000, 6), WORDS)  # 120,000 tokens
    out = draw(data, scheme("bert", probability=1 / 3), WORDS)
    sets = list(map(tuple, (out.position - 1).reshape(-1, 2).tolist()))
    assert_counts([sets.count(pair) for pair in combinations(range(6), 2)], np.ones(15))


@pytest.mark.parametrize("name", ["bert", "whole_word", "segment"])
def test_of_the_chosen_80_percent_are_masked_10_random_and_10_kept(name: str) -> None:
    size = {"segment": 11_000}.get(name, 36_000)
    data = corpus(np.full(size, 20))
    out = draw(data, scheme(name))
    assert len(out.id) > 100_000
    kinds = np.where(out.id == MASK, 0, np.where(out.id == out.own, 2, 1))
    by_chance = 0.1 / len(WORDPIECE.random_ids)  # a random token may be the token itself
    shares = [0.8, 0.1 - by_chance, 0.1 + by_chance]
    assert_counts(np.bincount(kinds), shares)
    # It is decided token by token: neighbours say nothing of each other.
    near = (out.sample[1:] == out.sample[:-1]) & (out.position[1:] == out.position[:-1] + 1)
    table = np.zeros((2, 2))
    other = (kinds != 0).astype(int)
    np.add.at(table, (other[:-1][near], other[1:][near]), 1)
    assert_independent(table)


def test_random_tokens_are_uniform_over_ids_that_are_not_special() -> None:
    data = corpus(np.full(6_000, 120))
    out = draw(data, scheme("bert", mask_share=0.0, random_share=1.0))
    assert len(out.id) > 100_000
    counts = np.bincount(out.id, minlength=len(WORDPIECE.special))
    assert counts[: len(SPECIAL)].sum() == 0
    assert counts[-3:].sum() == 0  # ids that name nothing
    assert_counts(counts[len(SPECIAL) : -3], np.ones(300))


def test_whole_words_are_masked_whole_up_to_the_budget() -> None:
    lengths = np.tile(np.arange(2, 52), 80)  # 106,000 tokens
    data = corpus(lengths)
    out = draw(data, scheme("whole_word"))
    masked, ids, voc = flags(data, out), data.stream.fields["id"], WORDPIECE
    spent = []
    for m, n in enumerate(lengths.tolist()):
        begin, end = data.stream.offsets[m : m + 2]
        here, budget = masked[begin:end], max(1, round(0.15 * n))
        texts = cut_words(ids[begin:end], voc.special, voc.words.begins, voc.words.ends)
        words = [word for text in texts for word in text]
        assert all(here[word].all() or not here[word].any() for word in words)
        left = budget - here.sum()
        sizes = [len(word) for word in words if not here[word].any()]
        if left < 0:  # no word fits, so one is taken all the same
            assert min(map(len, words)) > budget
            assert sum(here[word].any() for word in words) == 1
        else:
            assert min(sizes, default=math.inf) > left
        spent.append(here.sum() / budget)
    assert np.mean(spent) == pytest.approx(1.0, abs=0.03)


def test_whole_word_gives_words_of_one_size_the_same_probability() -> None:
    data = corpus(np.full(20_000, 6), WORDS)
    out = draw(data, scheme("whole_word", probability=1 / 3), WORDS)
    sets = list(map(tuple, (out.position - 1).reshape(-1, 2).tolist()))
    assert_counts([sets.count(pair) for pair in combinations(range(6), 2)], np.ones(15))


def test_span_lengths_are_geometric_with_the_papers_mean() -> None:
    drawn = (np.random.default_rng(3).permutation(200_000) + 0.5) / 200_000  # an even grid
    lengths = span_lengths(drawn, 0.2, 10)
    shares = np.array([0.2 * 0.8 ** (n - 1) for n in range(1, 11)])
    shares /= shares.sum()
    assert np.abs(np.bincount(lengths)[1:] / len(lengths) - shares).max() < 1e-5
    assert lengths.mean() == pytest.approx(3.8, abs=0.005)  # "an average span length of 3.8"
    assert span_lengths(drawn[:5], 1.0, 10).tolist() == [1] * 5
    assert span_lengths(np.array([0.0, np.nextafter(1, 0)]), 0.2, 10).tolist() == [1, 10]


def test_span_lengths_drawn_from_hashes_are_geometric() -> None:
    data = corpus(np.full(1_000, 120), WORDS)
    keys = sample_keys(5, "mask", "", data.sample_ids, data.rows)
    pair, position = np.divmod(np.arange(120_000), 120)
    text = np.zeros(120_000, dtype=bool)
    tokens = Tokens(keys, pair, position, begins_word=~text, begins_text=text)
    lengths = span_lengths(tokens.uniforms("length", pair, position), 0.2, 10)
    assert_counts(np.bincount(lengths)[1:], [0.8**n for n in range(10)])


def test_spans_come_out_as_the_papers_procedure_gives_them() -> None:
    sizes = [1, 2, 1, 1, 3] * 8
    num_samples = 4_000
    is_piece = np.tile([after > 0 for size in sizes for after in range(size)], num_samples)
    data = corpus(np.full(num_samples, sum(sizes)), frame=False)  # 256,000 tokens
    rng = np.random.default_rng(5)
    data.stream.fields["id"][:] = np.where(
        is_piece, rng.integers(205, 305, len(is_piece)), rng.integers(5, 205, len(is_piece))
    )
    out = draw(data, scheme("span"))
    ours = np.split(flags(data, out), data.stream.offsets[1:-1])
    simulation = random.Random(6)
    budget = round(0.15 * sum(sizes))
    theirs = [simulate_spans(sizes, budget, simulation) for _ in range(num_samples)]
    assert {int(np.sum(flags)) for side in (ours, theirs) for flags in side} == {budget}
    for statistic in (first_run, num_runs, last_masked):
        a, b = ([statistic(flags) for flags in side] for side in (ours, theirs))
        size = max(*a, *b) + 1
        assert_same_counts(np.bincount(a, minlength=size), np.bincount(b, minlength=size))


def simulate_spans(sizes: list[int], budget: int, rng: random.Random) -> list[bool]:
    """The paper's procedure with Python's own random numbers, redrawing what is refused."""
    masked = [False] * len(sizes)
    left = budget
    while any(not m and size <= left for m, size in zip(masked, sizes, strict=True)):
        length = 1
        while rng.random() >= 0.2:
            length += 1
        start = rng.randrange(len(sizes))
        if length > 10 or masked[start]:
            continue
        for word in range(start, min(start + length, len(sizes))):
            if not masked[word]:
                if sizes[word] > left:
                    break
                masked[word] = True
                left -= sizes[word]
    return [m for m, size in zip(masked, sizes, strict=True) for _ in range(size)]


def runs(flags) -> list[int]:
    """Lengths of the runs of True."""
    return [len(list(group)) for flag, group in groupby(flags) if flag]


def first_run(flags) -> int:
    return runs(flags)[0]


def num_runs(flags) -> int:
    return len(runs(flags))


def last_masked(flags) -> int:
    return int(np.flatnonzero(flags)[-1])


def test_a_run_of_spans_is_masked_randomised_or_kept_as_one() -> None:
    data = corpus(np.full(16_000, 50))
    out = draw(data, scheme("span"))
    assert len(out.id) > 100_000
    follows = (out.sample[1:] == out.sample[:-1]) & (np.diff(out.position) == 1)
    run = np.append(0, np.cumsum(~follows))
    length = np.bincount(run)
    masked = np.bincount(run, weights=out.id == MASK)
    kept = np.bincount(run, weights=out.id == out.own)
    assert ((masked == 0) | (masked == length)).all()
    # A random token is the token itself once in 300 times, so a random run keeps few.
    assert ((kept == length) | (kept <= 2)).all()
    kinds = np.where(masked > 0, 0, np.where(kept == length, 2, 1))
    assert_counts(np.bincount(kinds), [0.8, 0.1, 0.1])


def test_a_segment_is_one_piece_of_half_the_sample_at_a_uniform_place() -> None:
    lengths = np.append(np.full(6_000, 21), np.arange(1, 60))
    data = corpus(lengths)
    out = draw(data, scheme("segment"))
    assert out.counts[:, 0].tolist() == [max(1, round(n / 2)) for n in lengths.tolist()]
    follows = out.sample[1:] == out.sample[:-1]
    assert (np.diff(out.position)[follows] == 1).all()
    start = out.position[np.append(True, ~follows)][:6_000]
    assert 6_000 * 21 > 100_000
    assert_counts(np.bincount(start)[1:], np.ones(12))  # 10 of 21 tokens: 12 places


def test_a_segment_of_half_masks_every_middle_token_more_often_than_the_ends() -> None:
    data = corpus(np.full(10_000, 20), frame=False)
    counts = flags(data, draw(data, scheme("segment"))).reshape(-1, 20).sum(0)
    places = np.array([min(i, 19 - i) + 1 for i in range(20)]) / 11
    assert np.abs(counts / 10_000 - places).max() < 0.02


def test_words_are_masked_independently_with_probability_one_tenth() -> None:
    data = corpus(np.full(12_000, 10), WORDS, frame=False)
    out = draw(data, scheme("word"), WORDS)
    masked = flags(data, out).reshape(-1, 10)
    binomial = [math.comb(10, k) * 0.1**k * 0.9 ** (10 - k) for k in range(5)]
    counts = np.bincount(masked.sum(1), minlength=11)
    assert_counts(np.append(counts[:4], counts[4:].sum()), [*binomial[:4], 1 - sum(binomial[:4])])
    assert_counts(masked.sum(0), np.ones(10))
    both = (masked[:, :-1] & masked[:, 1:]).sum(), masked[:, 0].size * 9
    assert both[0] / both[1] == pytest.approx(0.01, abs=0.0015)
    assert (out.id == MASK).all()


def test_every_piece_of_a_masked_word_becomes_the_mask_token() -> None:
    data = corpus(np.full(3_000, 40))
    out = draw(data, scheme("word"))
    assert (out.id == MASK).all()
    masked, ids = flags(data, out), data.stream.fields["id"]
    goes_on = np.flatnonzero(~WORDPIECE.words.begins[ids] & (np.roll(ids, 1) >= len(SPECIAL)))
    assert len(goes_on) > 10_000
    assert (masked[goes_on] == masked[goes_on - 1]).all()


@pytest.mark.parametrize("name", ["bert", "word"])
@pytest.mark.parametrize("other", ["replica", "seed", "row", "sample"])
def test_maskings_of_other_replicas_seeds_and_samples_are_independent(name, other) -> None:
    data = corpus(np.full(6_000, 20), WORDS, frame=False)
    how = scheme(name, probability=0.2)
    first = draw(data, how, WORDS, replicas=2)
    a = flags(data, first)
    if other == "replica":
        b = flags(data, first, replica=1)
    elif other == "seed":
        b = flags(data, draw(data, how, WORDS, seed=2))
    else:
        if other == "row":
            data.rows = data.rows + 1
        else:
            data.sample_ids = np.roll(data.sample_ids, 1, axis=0)
        b = flags(data, draw(data, how, WORDS))
    assert len(a) > 100_000
    both = (a & b).reshape(-1, 20).sum(1)
    if name == "bert":  # 4 of 20 and 4 of 20: hypergeometric
        shares = [math.comb(4, k) * math.comb(16, 4 - k) for k in range(5)]
    else:
        shares = [math.comb(20, k) * 0.04**k * 0.96 ** (20 - k) for k in range(21)]
    shares = np.array(shares) / sum(shares)
    counts = np.bincount(both, minlength=21)
    assert_counts(np.append(counts[:3], counts[3:].sum()), [*shares[:3], shares[3:].sum()])


def test_spans_end_at_special_tokens() -> None:
    num_samples = 4_000
    ids = np.tile([CLS, 9, 10, SEP, 11, 12, SEP], num_samples)  # words at 1, 2 and 4, 5
    data = SimpleNamespace(
        stream=Ragged(np.arange(num_samples + 1) * 7, {"id": ids}),
        sample_ids=np.zeros((num_samples, 16), np.uint8),
        rows=np.arange(num_samples),
    )
    out = draw(data, scheme("span", probability=0.5, span_p=0.01, span_max=4))
    sets = list(map(tuple, out.position.reshape(-1, 2).tolist()))
    # Two of four words. A span from 1 or 4 takes the next word unless its length is 1; one from
    # 2 or 5 ends with its text, and another word is drawn.
    one = 1 / (1 + 0.99 + 0.99**2 + 0.99**3)
    shares = {
        (1, 2): 4 / 3 - 2 / 3 * one,
        (4, 5): 4 / 3 - 2 / 3 * one,
        (1, 4): 2 / 3 * one,
        (1, 5): (1 + one) / 3,
        (2, 4): (1 + one) / 3,
        (2, 5): 2 / 3,
    }
    assert_counts([sets.count(pair) for pair in shares], list(shares.values()))
