"""Divergences against float64 ones written from their definitions, on every codec's labels."""

# N positions, V vocabulary

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from kdcache.errors import TrainingError
from kdcache.formats.codec import FullCodec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import SparseTarget
from kdcache.losses import jensen_shannon, logit_mse, reverse_kl, total_variation
from kdcache.train.losses import divergences
from tests.test_labels import round_trip, teacher
from tests.train.test_codec_losses import in_float64

CODECS = {
    "threshold": ThresholdCodec(),
    "topk": TopKCodec(k=8),
    "nucleus": NucleusCodec(p=0.9, k_max=20),
    "sampled": SampledCodec(n=50),
    "full": FullCodec(values="float32"),
}
LOSSES = {
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "logit_mse": logit_mse,
}
TAILS = {
    "threshold": ("sampled", "uniform", "bucket", "renormalise"),
    "topk": ("uniform", "bucket", "renormalise"),
    "nucleus": ("uniform", "bucket", "renormalise"),
    "sampled": ("sampled",),
    "full": ("uniform",),
}
LABELS = [
    pytest.param(codec, tail, temperature, id=f"{codec}-{tail}-{temperature:g}")
    for codec, tails in TAILS.items()
    for tail in tails
    for temperature in ((1.0,) if tail == "sampled" else (1.0, 0.5, 2.0))
]
DENSITIES = [one for one in LABELS if one.values[1] not in ("sampled", "renormalise")]
V = 60
COMPILES = any(shutil.which(name) for name in ("g++", "clang++"))


def make_labels(codec: str, tail: str, temperature: float) -> SparseTarget:
    labels = round_trip(teacher(V)[::4], CODECS[codec])
    target = in_float64(decode(labels, temperature, tail))
    return replace(target, bucket=None if target.bucket is None else target.bucket.double())


def make_logits(target: SparseTarget, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(target.constant), V)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64) + 1


def by_hand(name: str, logits: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """[N] divergences, row by row over classes: the ids, or the listed ones and the rest."""
    losses = []
    for n, row in enumerate(logits):
        mine = target.rows == n
        ids, values = target.ids[mine], target.values[mine]
        student = torch.softmax(row / temperature, 0)
        if target.uniform is None:
            density = torch.zeros_like(row)
        else:
            density = target.uniform[n].expand(V).clone()
        density[ids] += values
        if name == "logit_mse":
            difference = row[ids] / temperature - density[ids].log()
            losses.append(difference.var(correction=0) if len(ids) else 0 * row.sum())
            continue
        if target.bucket is not None:
            rest = torch.ones(V, dtype=torch.bool)
            rest[ids] = False
            student = torch.cat([student[ids], student[rest].sum()[None]])
            density = torch.cat([density[ids], target.bucket[n][None]])
        losses.append(classes(name, student, density))
    return torch.stack(losses)


def classes(name: str, student: Tensor, density: Tensor) -> Tensor:
    if name == "total_variation":
        return (student - density).abs().sum() / 2
    if name == "reverse_kl":
        return F.kl_div(density.log(), student, reduction="sum")
    mixture = ((student + density) / 2).log()
    sides = [F.kl_div(mixture, side, reduction="sum") for side in (student, density)]
    return (sides[0] + sides[1]) / 2


def values_and_gradient(loss, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    total = loss(leaf)
    (total * -1.5).backward()
    return total.detach(), leaf.grad


def takes(name: str, tail: str) -> bool:
    return tail not in ("sampled", "renormalise") or name not in ("reverse_kl", "logit_mse")


@pytest.mark.parametrize(("codec", "tail", "temperature"), LABELS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_by_hand(name, codec, tail, temperature):
    target = make_labels(codec, tail, temperature)
    logits = make_logits(target)
    mask = torch.arange(len(logits)) % 3 > 0
    if not takes(name, tail):
        message = f"{name}: the labels have no density outside their entries"
        with pytest.raises(TrainingError, match=message) as found:
            LOSSES[name](logits, target, temperature)
        assert "\n" not in str(found.value)
        return
    for squared, factor in ((True, temperature**2), (False, 1.0)):
        for kept in (None, mask):
            where = mask | True if kept is None else kept

            def ours(z, squared=squared, kept=kept):
                return LOSSES[name](z, target, temperature, temperature_squared=squared, mask=kept)

            def theirs(z, factor=factor, where=where):
                return by_hand(name, z, target, temperature)[where].mean() * factor

            got, expected = (values_and_gradient(loss, logits) for loss in (ours, theirs))
            torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(got[1], expected[1], rtol=1e-10, atol=1e-12)
            assert expected[0] > 0.01


@pytest.mark.parametrize(("codec", "tail", "temperature"), DENSITIES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_the_label_has_no_loss(name, codec, tail, temperature):
    target = make_labels(codec, tail, temperature)
    density = torch.zeros(len(target.constant), V, dtype=torch.float64)
    density[target.rows, target.ids] = target.values
    if target.uniform is not None:
        density += target.uniform[:, None]
    if target.bucket is not None:  # any split of the bucket's mass will do
        rest = torch.rand(density.shape, dtype=torch.float64) * (density == 0)
        density += target.bucket[:, None] * rest / rest.sum(1, keepdim=True)
    loss, gradient = values_and_gradient(
        lambda z: LOSSES[name](z, target, temperature), temperature * density.log() + 3
    )
    # float32 labels do not sum to 1 exactly; total variation is of first order in that.
    assert abs(loss) < (1e-6 if name == "total_variation" else 1e-7)
    if name != "total_variation":  # which has a kink there
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("tail", ["uniform", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, tail: str):
    target = make_labels("topk", tail, 2.0)
    logits = make_logits(target).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, target, 2.0), (logits,))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, to itself
@pytest.mark.skipif(not COMPILES, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("jensen_shannon", "uniform"),
        pytest.param("jensen_shannon", "bucket", marks=pytest.mark.slow),
        pytest.param("reverse_kl", "bucket", marks=pytest.mark.slow),
        pytest.param("total_variation", "uniform", marks=pytest.mark.slow),
    ],
)
def test_compiled_they_are_the_same(name: str, tail: str):
    graphs = counters["stats"]["unique_graphs"]
    for temperature in (1.0, 2.0, 1.3):
        target = make_labels("topk", tail, temperature)
        logits = make_logits(target)

        def ours(z, target=target, temperature=temperature):
            return LOSSES[name](z, target, temperature, temperature_squared=False, compiled=True)

        def theirs(z, target=target, temperature=temperature):
            return by_hand(name, z, target, temperature).mean()

        got, expected = (values_and_gradient(loss, logits) for loss in (ours, theirs))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-10, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == graphs + 1  # of all temperatures


def test_where_torch_cannot_compile_it_says_so(monkeypatch):
    def cannot(*args):
        raise TorchDynamoException("InvalidCxxCompiler: none found\nand more\n")

    monkeypatch.setattr(divergences, "_compiled", lambda share: cannot)
    target = make_labels("topk", "uniform", 1.0)
    with pytest.raises(TrainingError, match="InvalidCxxCompiler: none found; it needs") as found:
        jensen_shannon(make_logits(target), target, compiled=True)
    assert "\n" not in str(found.value)


def test_values_of_two_ids():
    # p = (1/2, 1/2), t = (3/4, 1/4), by hand
    target = SparseTarget(
        rows=torch.tensor([0, 0]),
        ids=torch.tensor([0, 1]),
        values=torch.tensor([0.75, 0.25], dtype=torch.float64),
        uniform=None,
        bucket=None,
        constant=torch.zeros(1, dtype=torch.float64),
    )
    logits = torch.zeros(1, 2, dtype=torch.float64)
    mixed = [0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)]
    mixed += [0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)]
    assert reverse_kl(logits, target).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert jensen_shannon(logits, target).item() == pytest.approx(sum(mixed) / 2)
    assert total_variation(logits, target).item() == pytest.approx(0.25)
    assert logit_mse(logits, target).item() == pytest.approx((math.log(3) / 2) ** 2)


@pytest.mark.parametrize("name", ["jensen_shannon", "total_variation"])
def test_drawn_labels_bias_upwards(name: str):
    target = make_labels("threshold", "sampled", 1.0)
    whole = make_labels("full", "uniform", 1.0)
    density = torch.zeros(len(whole.constant), V, dtype=torch.float64)
    density[whole.rows, whole.ids] = whole.values
    assert LOSSES[name](density.log(), target) > LOSSES[name](density.log(), whole) + 0.01


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "total_variation"])
def test_a_bucket_hides_and_never_adds(name: str):
    logits = make_logits(make_labels("full", "uniform", 1.0))
    bucket = LOSSES[name](logits, make_labels("topk", "bucket", 1.0))
    assert bucket < LOSSES[name](logits, make_labels("full", "uniform", 1.0)) + 1e-4


@pytest.mark.parametrize("tail", ["full", "uniform", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_narrow_logits_are_computed_in_float32(name, tail, dtype, relative):
    target = make_labels("full" if tail == "full" else "topk", tail.replace("full", "uniform"), 2.0)
    logits = make_logits(target).to(dtype)
    loss, gradient = values_and_gradient(lambda z: LOSSES[name](z, target, 2.0), logits)
    expected = values_and_gradient(lambda z: LOSSES[name](z, target, 2.0), logits.double())
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    size = float(expected[1].abs().max())
    torch.testing.assert_close(gradient.double(), expected[1], rtol=relative, atol=relative * size)


@pytest.mark.parametrize("tail", ["full", "uniform", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_ids_and_rows_out_of_use(name: str, tail: str):
    """Ids at -inf, ids so unlikely that they underflow, and masked rows that hold anything."""
    target = make_labels("full" if tail == "full" else "topk", tail.replace("full", "uniform"), 1.0)
    logits = make_logits(target).float()
    listed = torch.zeros(logits.shape, dtype=torch.bool)
    listed[target.rows, target.ids] = True
    low = (~listed).nonzero()
    if tail == "full" and name != "logit_mse":
        low = torch.stack([torch.arange(len(logits)), torch.arange(len(logits)) % V], 1)
    logits[low[::2, 0], low[::2, 1]] = -torch.inf
    logits[low[1::2, 0], low[1::2, 1]] = -200.0
    mask = torch.arange(len(logits)) > 1
    logits[0], logits[1] = torch.nan, torch.inf
    loss, gradient = values_and_gradient(lambda z: LOSSES[name](z, target, mask=mask), logits)
    expected = by_hand(name, logits[2:].double().clamp(min=-1e4), rows_from(target, 2), 1.0)
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=0)
    assert gradient.isfinite().all()
    assert not gradient[:2].any()
    assert gradient[2:].any(1).all()
    assert not gradient[logits.isneginf()].any()


def rows_from(target: SparseTarget, first: int) -> SparseTarget:
    kept = target.rows >= first
    return SparseTarget(
        rows=target.rows[kept] - first,
        ids=target.ids[kept],
        values=target.values[kept],
        uniform=None if target.uniform is None else target.uniform[first:],
        bucket=None if target.bucket is None else target.bucket[first:],
        constant=target.constant[first:],
    )


@pytest.mark.parametrize("tail", ["uniform", "bucket"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_tail_of_no_mass(name: str, tail: str):
    """Row 0 lists all ids; row 1 lists two, whose mass is 1, so that the student's tail costs."""
    zeros = torch.zeros(2, dtype=torch.float64)
    values = torch.full((V + 2,), 1 / V, dtype=torch.float64)
    values[V:] = 0.5
    target = SparseTarget(
        rows=torch.tensor([0] * V + [1, 1]),
        ids=torch.cat([torch.arange(V), torch.tensor([3, 4])]),
        values=values,
        uniform=zeros if tail == "uniform" else None,
        bucket=zeros if tail == "bucket" else None,
        constant=zeros,
    )
    logits = make_logits(target).float()
    loss, gradient = values_and_gradient(lambda z: LOSSES[name](z, target), logits)
    assert gradient.isfinite().all()
    probs = torch.softmax(logits.double(), 1)
    pair, rest = probs[1, 3:5], probs[1].sum() - probs[1, 3:5].sum()
    first = (
        classes(name, probs[0], values[:V])
        if name != "logit_mse"
        else logits[0].double().var(correction=0)
    )
    if name == "logit_mse":
        second = logits[1, 3:5].double().var(correction=0)
    elif name == "reverse_kl":
        tiny = torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float64)
        others = torch.cat([probs[1, :3], probs[1, 5:]]) if tail == "uniform" else rest[None]
        second = (pair * (2 * pair).log()).sum() + (others * (others / tiny).log()).sum()
    elif name == "total_variation":
        second = ((pair - 0.5).abs().sum() + rest) / 2
    else:
        mixture = (pair + 0.5) / 2
        second = (pair * (pair / mixture).log() + 0.5 * (0.5 / mixture).log()).sum() / 2
        second = second + rest * math.log(2) / 2
    torch.testing.assert_close(loss.double(), (first + second) / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_rounding_may_leave_a_probability_below_zero(name: str):
    target = make_labels("topk", "uniform", 1.0)
    target.values[0] = -target.uniform[0] - 1e-9
    zero = replace(target, values=target.values.clone())
    zero.values[0] = -target.uniform[0]
    logits = make_logits(target)
    got, expected = (
        values_and_gradient(lambda z, one=one: LOSSES[name](z, one), logits)
        for one in (target, zero)
    )
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_costs_nothing(name: str):
    target = rows_from(make_labels("topk", "uniform", 1.0), 15)
    assert len(target.constant) == 0
    loss, gradient = values_and_gradient(lambda z: LOSSES[name](z, target), torch.zeros(0, V))
    assert loss == 0
    assert gradient.shape == (0, V)
    target = make_labels("topk", "uniform", 1.0)
    nobody = torch.zeros(len(target.constant), dtype=torch.bool)
    loss, gradient = values_and_gradient(
        lambda z: LOSSES[name](z, target, mask=nobody), make_logits(target)
    )
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_does_not_fit_is_refused_in_one_line(name: str):
    target = make_labels("topk", "uniform", 1.0)
    logits = make_logits(target)
    cases = [
        (logits[1:], 1.0, None, r"covers \[15\] positions; expected \[14\]"),
        (logits[:, :30], 1.0, None, "expected 0 to 29"),
        (logits, 0.0, None, "temperature is 0.0"),
        (logits, 1.0, torch.ones(3, dtype=torch.bool), r"covers \[3\] positions"),
    ]
    for bad, temperature, mask, message in cases:
        with pytest.raises(TrainingError, match=message) as found:
            LOSSES[name](bad, target, temperature, mask=mask)
        assert "\n" not in str(found.value)
