"""Scores on text: against torch's own loss, with sources shuffled, in any batches."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from kdcache.errors import CorpusError
from kdcache.train.runs.validate import (
    Score,
    TokenPairs,
    encode,
    score,
    score_shuffled,
    score_tokens,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(world):
    model = AutoModelForSeq2SeqLM.from_pretrained(world.teacher)
    return model.train(), AutoTokenizer.from_pretrained(world.teacher)


def oracle(model, tokenizer, src, tgt) -> tuple[float, float, int]:
    """Sentence by sentence through transformers' own loss."""
    model.eval()
    losses, hits, num = 0.0, 0, 0
    with torch.no_grad():
        for source, target in zip(src, tgt, strict=True):
            inputs = tokenizer(source, return_tensors="pt")
            labels = tokenizer(text_target=target, return_tensors="pt")["input_ids"]
            out = model(**inputs, labels=labels)
            losses += out.loss.item() * labels.numel()
            hits += int((out.logits.argmax(-1) == labels).sum())
            num += labels.numel()
    model.train()
    return losses / num, hits / num, num


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_scores_are_those_of_transformers(teacher, world, batch_tokens):
    src, tgt = world.src[:12], world.tgt[:12]
    found = score(*teacher, src, tgt, CPU, batch_tokens)
    loss, accuracy, num = oracle(*teacher, src, tgt)
    assert found.loss_nats == pytest.approx(loss, rel=1e-5)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.num_tokens == num
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert teacher[0].training


def test_shuffled_sources_are_a_derangement():
    for size in (2, 3, 10, 101):
        ids = [np.array([i]) for i in range(size)]
        found = TokenPairs(ids, ids).shuffled()
        moved = [int(src[0]) for src in found.src]
        assert sorted(moved) == list(range(size))
        assert all(here != i for i, here in enumerate(moved))
        assert [int(tgt[0]) for tgt in found.tgt] == list(range(size))


def test_shuffled_scores_are_those_of_the_shuffled_pairs(teacher, world):
    src, tgt = world.src[:9], world.tgt[:9]
    ids = [np.array([i]) for i in range(9)]
    order = [int(i[0]) for i in TokenPairs(ids, ids).shuffled().src]
    found = score_shuffled(*teacher, src, tgt, CPU)
    loss, _, _ = oracle(*teacher, [src[i] for i in order], tgt)
    assert found.loss_nats == pytest.approx(loss, rel=1e-5)


def test_limits():
    pairs = TokenPairs([np.zeros(n) for n in (3, 9, 2)], [np.zeros(n) for n in (4, 5, 6)])
    assert [len(pairs.limited(n)) for n in (1, 4, 8, 9, 15, 99)] == [1, 1, 1, 2, 3, 3]
    assert [len(ids) for ids in pairs.within(6).src] == [3, 2]
    assert pairs.within(None) is pairs


def test_pairs_beyond_the_positions_are_left_out(teacher, world):
    model, tokenizer = teacher
    long = "cat " * 200
    found = score(model, tokenizer, [*world.src[:3], long], [*world.tgt[:3], long], CPU)
    assert found == score(model, tokenizer, world.src[:3], world.tgt[:3], CPU)
    with pytest.raises(CorpusError, match="nothing to score"):
        score(model, tokenizer, [long], [long], CPU)
    with pytest.raises(CorpusError, match="nothing to score"):
        score_tokens(model, TokenPairs([], []), CPU, 10)


def test_texts_are_encoded_as_a_dump_encodes_them(world):
    from kdcache.formats.cache import open_cache

    cache = open_cache(world.cache)
    tokenizer = AutoTokenizer.from_pretrained(cache.tokenizer_dir("teacher"))
    samples = cache.samples(0)
    for name, lines in (("src", world.src), ("tgt", world.tgt)):
        stream, record = samples.streams[name], cache.manifest.streams[name]
        ids = encode(tokenizer, [lines[row] for row in samples.row], record.target)
        assert np.concatenate(ids).tolist() == stream.fields["id"].tolist()
    assert encode(tokenizer, [], True) == []


def test_a_hopeless_loss_has_infinite_perplexity():
    assert Score(1000.0, 0.0, 1).perplexity == math.inf
