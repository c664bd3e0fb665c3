"""Objectives: what is refused, what is built, and the canary."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdcache.errors import IdentityError, RecipeError, TrainingError
from kdcache.formats.cache import open_cache
from kdcache.recipe import CrossEntropyTerm, ForwardKLTerm
from kdcache.train.batches.stream import BatchStream
from kdcache.train.losses.fused_loss import LossTerm, fused_loss
from kdcache.train.losses.objective import Objective
from kdcache.train.losses.soft_terms import soft_target
from kdcache.train.runs.canary import Alignment, alignment, check_batch
from tests.report.kinds import make_kinds

SIGNALS = ["threshold", "sampled", "full"]


@pytest.fixture(scope="module")
def cache(world):
    return open_cache(world.cache)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    return open_cache(make_kinds(tmp_path_factory.mktemp("kinds") / "cache").path)


@pytest.fixture(scope="module")
def batch(cache):
    stream = BatchStream(cache, ["src", "tgt"], SIGNALS, 2000, 1, 9, max_epochs=1)
    return next(b for b in stream if b.num_tokens > 300).micro[0]


def make_objective(cache, *terms) -> Objective:
    return Objective(terms, cache.signals, "src", "tgt")


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"signal": "beams"}, r"cache has no signal 'beams'; it has \['full', 'sampled', 'thre"),
        ({"signal": "sampled", "temperature": 2.0}, "temperature 1"),
        ({"signal": "threshold", "temperature": 2.0, "tail": "sampled"}, "temperature 1"),
        ({"signal": "threshold", "temperature": 0.4}, "temperature 0.4"),
        ({"signal": "full", "tail": "sampled"}, "draws no entries"),
    ],
    ids=["missing", "sampled at T 2", "drawn tail at T 2", "below the knots", "full"],
)
def test_what_a_signal_cannot_serve_is_refused(cache, term, message):
    with pytest.raises(RecipeError, match=r"train\.objective\.1.*" + message):
        make_objective(cache, CrossEntropyTerm(), ForwardKLTerm(**term))
    unused = ForwardKLTerm(**term, weight=0)
    assert make_objective(cache, CrossEntropyTerm(), unused).signals == []


def test_a_signal_of_other_streams_is_refused(cache):
    with pytest.raises(IdentityError, match="labels stream 'tgt', the student uses 'src'"):
        Objective([ForwardKLTerm(signal="full")], cache.signals, "src", "src")


@pytest.mark.parametrize(
    ("signal", "what"),
    [
        ("hidden", "of kind hidden"),
        ("pooled", "of kind hidden"),
        ("attention", "of kind attention"),
        ("beams", "of kind beams"),
        ("nli", "of kind classes"),
        ("masks", "of kind masks"),
        ("causal", "logits at positions"),
        ("document", "logits at positions"),
        ("mlm", "logits at masked"),
        ("segment", "logits at segment"),
        ("every", r"logits of all hypotheses \(beams\)"),
    ],
)
def test_signals_of_other_kinds_are_refused_in_a_line(signal, what, every_kind):
    with pytest.raises(RecipeError) as caught:
        Objective([ForwardKLTerm(signal=signal)], every_kind.signals, "src", "tgt")
    expected = (
        rf"train\.objective\.0\.signal: '{signal}' is {what}; forward_kl needs logits at the "
        r"reference's targets, or of one hypothesis, of which the cache has \['best', 'targets'\]; "
        r"dump another.*"
    )
    assert re.fullmatch(expected, str(caught.value))


def test_other_signals_do_not_stand_in_the_way(every_kind):
    objective = Objective([ForwardKLTerm(signal="targets")], every_kind.signals, "src", "tgt")
    streams = ["src", "tgt"]
    stream = BatchStream(every_kind, streams, objective.signals, 200, 1, 9, max_epochs=1)
    batches = list(stream)
    assert sum(batch.num_tokens for batch in batches) == every_kind.stream("tgt").num_tokens
    assert all(micro.signals.keys() == {"targets"} for b in batches for micro in b.micro)


def test_a_student_with_fewer_rows_gets_labels_over_its_own(cache, batch):
    assert (
        make_objective(cache, ForwardKLTerm(signal="full")).vocab_size(1000)
        == cache.logits("full").vocab_size
    )
    num = len(batch.streams["tgt"].flat)
    shares = {}
    for signal, term in (
        ("full", {}),
        ("threshold", {"tail": "uniform"}),
        ("threshold", {"tail": "bucket"}),
        ("threshold", {"tail": "sampled"}),
        ("sampled", {}),
    ):
        target = soft_target(batch.signals[signal], ForwardKLTerm(signal=signal, **term), 1.0, 30)
        assert target.ids.max() == 29
        uniform = 0 if target.uniform is None else 30 * target.uniform.sum()
        bucket = 0 if target.bucket is None else target.bucket.sum()
        mass = float(target.values.sum() + uniform + bucket)
        shares[signal, term.get("tail")] = mass / num
        logits = torch.randn(num, 30, generator=torch.Generator().manual_seed(0))
        assert math.isfinite(fused_loss(logits, [LossTerm(target)])[0].item())
    drawn = {key: share for key, share in shares.items() if "sampled" in key}
    assert len(drawn) == 2
    assert all(share < 0.95 for share in drawn.values())
    assert all(abs(shares[key] - 1) < 1e-4 for key in shares.keys() - drawn.keys())


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_canary_sings_only_when_labels_fit(batch, signal):
    coded, targets = batch.signals[signal], batch.streams["tgt"].flat.numpy()
    lengths = batch.streams["tgt"].mask.sum(1).numpy()
    found = alignment(coded, targets, lengths)
    assert found.aligned
    assert found.checked > 0
    assert found.disagreeing == 0
    for shift in (-1, 1, 5):
        assert not alignment(coded, np.roll(targets, shift), lengths).aligned
    other_ids = (targets + 7) % coded.spec.vocab_size
    assert not alignment(coded, other_ids, lengths).aligned
    mixed = replace(coded, gold=coded.gold.flip(0))
    if signal != "sampled":  # its gold is compared in the sum, which no order changes
        assert not alignment(mixed, targets, lengths).aligned


@pytest.mark.parametrize(
    ("hits", "checked", "disagreeing", "aligned"),
    [
        ((5, 60, 8), 0, 0, True),
        ((60, 5, 8), 0, 0, False),
        ((5, 4, 90), 0, 0, False),
        ((9, 4, 5), 0, 0, True),
        ((90, 5, 8), 50, 0, True),
        ((5, 60, 8), 50, 2, True),
        ((5, 60, 8), 50, 3, False),
    ],
    ids=["fits", "-1", "+1", "chance", "repeats its input", "few", "many"],
)
def test_what_counts_as_aligned(hits, checked, disagreeing, aligned):
    by_shift = dict(zip((-1, 0, 1), hits, strict=True))
    assert Alignment(100, by_shift, checked, disagreeing).aligned is aligned


def test_a_shifted_batch_names_its_signal(batch):
    tokens = batch.streams["tgt"]
    rolled = replace(tokens)
    rolled.flat = tokens.flat.roll(1)
    shifted = replace(batch, streams={**batch.streams, "tgt": rolled})
    check_batch(batch, "tgt", SIGNALS)
    with pytest.raises(TrainingError, match=r"signal '\w+': labels are shifted"):
        check_batch(shifted, "tgt", SIGNALS)


def test_a_single_position_is_not_enough_to_complain():
    assert Alignment(1, {-1: 0, 0: 0, 1: 1}, 0, 0).aligned


def test_names_tell_terms_apart(cache):
    terms = [CrossEntropyTerm(), ForwardKLTerm(signal="full"), ForwardKLTerm(signal="sampled")]
    objective = make_objective(cache, *terms)
    assert objective.names == ["cross_entropy", "forward_kl.0", "forward_kl.1"]
    assert objective.signals == ["full", "sampled"]
    assert SimpleNamespace(**objective.records).full.codec.name == "full"
