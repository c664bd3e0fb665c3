"""A student with fewer ids than the teacher: where the mass goes, against dense float64 sums.

# N positions, V vocabulary of the teacher, S ids of the student
"""

import math
from dataclasses import replace

import pytest
import torch

from kdcache.formats.codec import FullCodec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.labels.coded_labels import CodedLabels
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import SparseTarget, densify
from kdcache.train.losses.fused_loss import LossTerm, fused_loss
from kdcache.train.losses.narrowing import narrowed
from tests.test_labels import N, V, head_mask, round_trip, teacher

S = 450
CODECS = {
    "threshold": ThresholdCodec(values="float32"),
    "topk": TopKCodec(k=8, values="float32"),
    "nucleus": NucleusCodec(p=0.9, k_max=20),
    "full": FullCodec(values="float32"),
}
CASES = [
    pytest.param(codec, tail, temperature, id=f"{name}-{tail}-{temperature:g}")
    for name, codec in CODECS.items()
    for tail in ("uniform", "bucket", "renormalise")
    for temperature in (1.0, 2.0)
]


def padded_teacher() -> torch.Tensor:
    """Logits whose last V - S ids hold nothing, a little, half, or nearly all of the mass."""
    logits = teacher()
    for row, shift in enumerate((-80.0, -2.0, 3.0, 12.0)):
        logits[row::4, S:] += shift
    return logits


def in_float64(target: SparseTarget) -> SparseTarget:
    changed = {
        name: getattr(target, name).double()
        for name in ("values", "uniform", "bucket", "constant")
        if getattr(target, name) is not None
    }
    return replace(target, **changed)


def dense_loss(
    coded: CodedLabels, target: SparseTarget, log_probs: torch.Tensor, tail: str
) -> torch.Tensor:
    """[N] divergences, one position at a time, from the dense label over all V ids."""
    num_ids = log_probs.shape[1]
    dense = densify(target, V)
    listed = head_mask(coded)
    losses = []
    for label, head, log_prob in zip(dense, listed, log_probs, strict=True):
        q = label[:num_ids].clone()
        rest = ~head[:num_ids]
        missing = 1 - q[~rest].sum()  # what the student's listed ids do not hold
        if coded.spec.codec.name == "full" or tail == "renormalise":
            q[rest] = 0
            q = q / q.sum() if q.sum() > 0 else q
        elif tail == "uniform":
            q[rest] = missing / rest.sum()
        else:
            q[rest] = 0
            bucket = log_prob[rest].exp().sum().log()
            losses.append(missing.log() * missing - missing * bucket)
        kl = torch.where(q > 0, q * (q.clamp(min=1e-300).log() - log_prob), 0).sum()
        losses.append(kl + losses.pop() if tail == "bucket" and rest.any() else kl)
    return torch.stack(losses)


@pytest.mark.parametrize(("codec", "tail", "temperature"), CASES)
def test_missing_mass_goes_where_it_is_said(codec, tail, temperature):
    coded = round_trip(padded_teacher(), codec)
    target = in_float64(decode(coded, temperature, tail))
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(N, S, generator=generator, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight = torch.rand(N, generator=generator, dtype=torch.float64)

    term = LossTerm(narrowed(target, V, S, drawn=False), temperature, 1.0, weight)
    total, _ = fused_loss(ours, [term])
    total.backward()
    log_probs = torch.log_softmax(theirs / temperature, dim=-1)
    expected = dense_loss(coded, target, log_probs, tail)
    (expected * weight).sum().backward()

    assert expected.min() > -1e-9
    torch.testing.assert_close(total, (expected * weight).sum(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("codec", [ThresholdCodec(), SampledCodec(n=50)], ids=["threshold", "n"])
def test_drawn_entries_are_dropped_and_nothing_moves(codec):
    target = in_float64(decode(round_trip(padded_teacher(), codec)))
    logits = torch.randn(N, S, dtype=torch.float64, requires_grad=True)
    found = narrowed(target, V, S, drawn=True)
    dense = densify(target, V)[:, :S]
    assert (dense.sum(1) < 0.9).any()
    torch.testing.assert_close(densify(found, S), dense)
    total, _ = fused_loss(logits, [LossTerm(found)])
    total.backward()
    log_probs = torch.log_softmax(logits.detach(), dim=-1)
    expected = (target.constant - (dense * log_probs).sum(1)).mean()
    torch.testing.assert_close(total.detach(), expected)
    gradient = (dense.sum(1, keepdim=True) * log_probs.exp() - dense) / N
    torch.testing.assert_close(logits.grad, gradient)


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_full_label_of_a_narrow_student_is_the_teachers_sliced_softmax(tail, temperature):
    logits = padded_teacher()
    target = decode(round_trip(logits, CODECS["full"]), temperature, tail)
    found = densify(narrowed(target, V, S, drawn=False), S)
    sliced = torch.softmax(logits.double()[:, :S] / temperature, dim=-1)
    torch.testing.assert_close(found.double(), sliced, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
def test_a_position_of_which_nothing_is_left(tail):
    logits = torch.zeros(N, V)
    logits[:, V - 1] = 60.0  # all other probabilities are nothing in float32
    target = decode(round_trip(logits, TopKCodec(k=1, values="float32")), 1.0, tail)
    student = torch.randn(N, S, requires_grad=True)
    total, _ = fused_loss(student, [LossTerm(narrowed(target, V, S, drawn=False))])
    total.backward()
    assert torch.isfinite(student.grad).all()
    log_probs = torch.log_softmax(student.detach(), dim=-1)
    expected = {
        "uniform": -math.log(S) - log_probs.mean(1).mean(),  # KL of the even distribution
        "bucket": 0.0,  # the bucket is all there is
        "renormalise": 0.0,
    }
    assert total.item() == pytest.approx(float(expected[tail]), abs=1e-5)


def test_a_full_label_of_which_nothing_is_left():
    logits = torch.full((N, V), -200.0)  # exp(-200) is 0 in float32
    logits[:, V - 1] = 0
    target = decode(round_trip(logits, CODECS["full"]))
    found = narrowed(target, V, S, drawn=False)
    assert not found.values.any()
    assert not found.constant.any()


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
def test_a_student_whose_every_id_is_listed(tail):
    logits = padded_teacher()
    logits[:, :5] += 60
    logits[:, V - 3 :] = logits[:, :5].max(1).values[:, None] - 1
    target = decode(round_trip(logits, TopKCodec(k=8, values="float32")), 1.0, tail)
    found = narrowed(target, V, 5, drawn=False)
    student = torch.randn(N, 5, requires_grad=True)
    total, _ = fused_loss(student, [LossTerm(found)])
    total.backward()
    assert torch.isfinite(student.grad).all()
    dense = densify(found, 5)
    # There is nothing left to spread over: what was dropped stays dropped.
    kept = torch.softmax(logits, dim=-1)[:, :5]
    assert kept.sum(1).max() < 0.9
    expected = kept / kept.sum(1, keepdim=True) if tail == "renormalise" else kept
    torch.testing.assert_close(dense, expected, rtol=1e-3, atol=1e-6)
    entropy = torch.special.xlogy(dense, dense).sum(1)
    torch.testing.assert_close(found.constant, entropy, rtol=1e-4, atol=1e-5)
    log_probs = torch.log_softmax(student.detach(), dim=-1)
    loss = (entropy - (dense * log_probs).sum(1)).mean()
    assert total.item() == pytest.approx(float(loss), rel=1e-4)


def test_a_student_with_as_many_ids_or_more_keeps_the_target():
    target = decode(round_trip(teacher(), CODECS["topk"]))
    for num_ids in (V, V + 1):
        assert narrowed(target, V, num_ids, drawn=False) is target
