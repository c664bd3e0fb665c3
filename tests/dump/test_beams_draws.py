"""Mode sample: draws that are hashes, with transformers' own distributions."""

from collections import Counter

import numpy as np
import pytest
import torch

from kdcache.dump.codecs.fixed_point import FIXED_BITS
from kdcache.dump.runner import dump
from kdcache.dump.signals import processors
from kdcache.dump.signals.processors import draw
from kdcache.formats.cache import open_cache
from kdcache.formats.keyed import mix64
from tests.dump.beams_oracle import encode, forced, hypotheses, load, recipe
from tests.dump.chi_squared import assert_counts, assert_same_counts
from tests.dump.world import tree

WARPED = {"temperature": 2.5, "top_k": 12, "top_p": 0.8}


def points(count, start=0):
    """Uniform numbers as `draw` takes them."""
    hashed = mix64(np.arange(start, start + count, dtype=np.uint64) + np.uint64(1 << 40))
    return torch.from_numpy((hashed >> np.uint64(64 - FIXED_BITS)).astype(np.int64))


def check_counts(counts, probs):
    """Counts are draws from [V] probabilities; rare ids are put together."""
    assert not counts[probs == 0].any()
    rare = probs * counts.sum() < 10
    cells, shares = (np.append(x[~rare], x[rare].sum()) for x in (counts, probs))
    if shares[-1] * counts.sum() < 10:
        cells, shares = cells[:-1], shares[:-1]
    assert_counts(cells, shares)


@pytest.mark.parametrize("vocab_size", [3, 64, 1000])
def test_draws_follow_the_probabilities(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    scores = torch.randn(1, vocab_size, generator=generator) * 2
    scores[0, 1] = -torch.inf
    count = 60_000
    found = draw(scores.expand(count, -1), points(count)).numpy()
    counts = np.bincount(found, minlength=vocab_size)
    assert len(counts) == vocab_size
    assert counts[1] == 0
    check_counts(counts, torch.softmax(scores[0].double(), dim=-1).numpy())


def test_draws_at_the_ends_of_the_unit_interval():
    scores = torch.tensor([[0.0, 1.0, -torch.inf], [-torch.inf, 2.0, 3.0], [-torch.inf, 0, -9e9]])
    ends = torch.tensor([0, (1 << FIXED_BITS) - 1])
    assert draw(scores, ends[:1].expand(3)).tolist() == [0, 1, 1]
    assert draw(scores, ends[1:].expand(3)).tolist() == [1, 2, 1]


def test_a_row_of_nan_does_not_disturb_the_others():
    scores = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    where = points(40)
    alone = draw(scores, where)
    scores[3] = torch.nan
    scores[39, 7] = torch.nan
    others = torch.tensor([row for row in range(40) if row not in (3, 39)])
    assert torch.equal(draw(scores, where)[others], alone[others])


def dumped(world, directory, out, signal, causal=False, **more):
    given = {"kind": "beams", "mode": "sample", **signal}
    if causal:
        given["stream"] = "src"
    dump(recipe(world, directory, {"beams": given}, causal, **more), out)
    return list(hypotheses(open_cache(out)))


def warped(log_probs, temperature=1.0, top_k=0, top_p=1.0):
    """[V] float64 probabilities after the three steps, by hand."""
    scaled = log_probs.numpy() / temperature
    order = np.argsort(-scaled, kind="stable")
    probs = np.exp(scaled - scaled.max())
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("architecture", ["t5", "gpt2"])
@pytest.mark.parametrize("settings", [{}, WARPED], ids=["plain", "warped"])
def test_samples_have_the_warped_distribution(architecture, settings, world, zoo, tmp_path):
    """First tokens, and second tokens after each first one, by chi-squared."""
    count, directory = 3000, zoo(architecture)
    signal = {"num_hypotheses": count, "max_length": 2, **settings}
    causal = architecture == "gpt2"
    (found,) = dumped(world, directory, tmp_path / "cache", signal, causal, texts=1)
    model, (ids,) = load(directory), encode(directory, world.src[:1])
    vocab_size, drawn = model.config.vocab_size, [some[0] for some in found]
    first = warped(forced(model, ids, [0])[0], **settings)
    firsts = Counter(tokens[0] for tokens in drawn)
    check_counts(np.array([firsts[token] for token in range(vocab_size)]), first)
    checked = 0
    for token, times in firsts.most_common(3):
        if token == model.generation_config.eos_token_id or times < 100:
            continue
        second = warped(forced(model, ids, [token, 0])[1], **settings)
        after = Counter(tokens[1] for tokens in drawn if tokens[0] == token)
        check_counts(np.array([after[token] for token in range(vocab_size)]), second)
        checked += 1
    assert checked
    # What is stored is the model's own probability, not the warped one.
    for tokens, log_prob, score in found[:20]:
        own = forced(model, ids, tokens)[np.arange(len(tokens)), tokens].sum()
        np.testing.assert_allclose([log_prob, score], [own, own / len(tokens)], atol=1e-4)


def test_samples_are_as_frequent_as_those_of_transformers(world, zoo, tmp_path):
    """Whole hypotheses of two tokens, against torch's generator under the same warpers."""
    count, directory = 3000, zoo("t5")
    signal = {"num_hypotheses": count, "max_length": 2, **WARPED}
    (found,) = dumped(world, directory, tmp_path / "cache", signal, texts=1)
    model, (ids,) = load(directory), encode(directory, world.src[:1])
    torch.manual_seed(5)
    theirs = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=2,
        do_sample=True,
        num_return_sequences=count,
        **WARPED,
    )[:, 1:].tolist()
    one = Counter(tuple(some[0]) for some in found)
    other = Counter(tuple(row[: 1 if row[0] == 1 else 2]) for row in theirs)
    cells = sorted(one | other)
    counts = [[some[cell] for cell in cells] for some in (one, other)]
    assert sum(a + b >= 20 for a, b in zip(*counts, strict=True)) > 10
    assert_same_counts(*counts)


def test_draws_depend_on_what_they_are_for_alone(world, zoo, tmp_path, monkeypatch):
    """Seed, name, sample, row, hypothesis and step; no batch, no run, no other draw."""
    signal = {"num_hypotheses": 4, "max_length": 8}
    base = dumped(world, zoo("t5"), tmp_path / "base", signal)
    torch.manual_seed(99)
    monkeypatch.setattr(processors, "DRAW_ENTRIES", 1)  # every row by itself
    assert dumped(world, zoo("t5"), tmp_path / "again", signal) == base
    assert tree(tmp_path / "again") == tree(tmp_path / "base")
    tokens = [[some[0] for some in found] for found in base]
    fewer = dumped(world, zoo("t5"), tmp_path / "fewer", signal | {"num_hypotheses": 2})
    assert [[some[0] for some in found] for found in fewer] == [found[:2] for found in tokens]
    seed = dumped(world, zoo("t5"), tmp_path / "seed", signal, seed=2)
    assert [[some[0] for some in found] for found in seed] != tokens
    # A text that comes twice is drawn from twice.
    lines = [world.src[0]] * 2
    (tmp_path / "src").write_text("\n".join(lines) + "\n")
    given = recipe(world, zoo("t5"), {"beams": {"kind": "beams", "mode": "sample", **signal}})
    fields = given.corpus.fields | {"src": str(tmp_path / "src"), "tgt": str(tmp_path / "src")}
    corpus = given.corpus.model_copy(update={"fields": fields})
    dump(given.model_copy(update={"corpus": corpus}), tmp_path / "twice")
    first, second = hypotheses(open_cache(tmp_path / "twice"))
    assert [some[0] for some in first] != [some[0] for some in second]
    assert len({tuple(some[0]) for some in first}) > 1
