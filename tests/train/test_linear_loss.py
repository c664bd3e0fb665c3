"""Losses fused with the projection against the same losses over explicit logits."""

# N positions, D hidden, V vocabulary, R rows of a chunk

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.labels.sparse_target import SparseTarget
from kdcache.losses import (
    DivergenceTerm,
    LossTerm,
    fused_loss,
    hard_target,
    jensen_shannon_rows,
    linear_losses,
    logit_mse_rows,
    reverse_kl_rows,
    total_variation_rows,
)
from kdcache.train.losses import linear_loss
from tests.train.test_losses import N, V, dense_total, make_target, mixed_terms

D = 8
CHUNKS = [None, 1, 5, N - 1, N, 4 * N]


def density(kind: str, seed: int = 11) -> LossTerm:
    """A divergence's term whose label lists 6 different ids of each position."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(2 * torch.randn(N, V, generator=generator, dtype=torch.float64), 1)
    values, ids = probs.topk(V if kind == "full" else 6, dim=1)
    rest = 1 - values.sum(1)
    target = replace(
        make_target("repeats"),
        rows=torch.arange(N).repeat_interleave(values.shape[1]),
        ids=ids.flatten(),
        values=values.flatten(),
        bucket=rest if kind == "bucket" else None,
    )
    if kind == "uniform":
        uniform = rest / (V - 6)
        target = replace(target, uniform=uniform, values=(values - uniform[:, None]).flatten())
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    weights[::4] = 0.0
    return LossTerm(target, 1.5, 0.6, weights)


def divergences() -> list[DivergenceTerm]:
    return [
        DivergenceTerm(jensen_shannon_rows, replace(density("full"), weight=2.25)),
        DivergenceTerm(reverse_kl_rows, density("bucket")),
        DivergenceTerm(total_variation_rows, replace(density("uniform"), temperature=1.0)),
        DivergenceTerm(logit_mse_rows, replace(density("uniform"), row_weight=None)),
    ]


MIXES = {
    "cross_entropy": ([LossTerm(hard_target(torch.arange(N), V))], []),
    "terms": (mixed_terms(), []),
    "divergence": ([], divergences()[:1]),
    "divergences": ([], divergences()),
    "all": (mixed_terms(), divergences()),
}


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    shapes = [(N, D), (V, D), (V,)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [one.to(dtype).requires_grad_() for one in made]


def explicit(
    logits: Tensor, terms: Sequence[LossTerm], others: Sequence[DivergenceTerm]
) -> tuple[Tensor, Tensor]:
    """The mix over logits that are there, the terms from dense labels."""
    total, values = logits.new_zeros(()), []
    if terms:
        found, each = dense_total(logits, terms)
        total, values = total + found, [*each]
    for one in others:
        weights = one.term.row_weight
        weights = logits.new_full((N,), 1 / N) if weights is None else weights.to(logits)
        value = (one.rows(logits, one.term.target, one.term.temperature) * weights).sum()
        total = total + value * one.term.weight
        values.append(value.detach())
    return total, torch.stack(values)


def run(loss, made: Sequence[Tensor | None], upstream: float = 1.0) -> list[Tensor | None]:
    """Total, values and gradients of fresh leaves."""
    leaves = [None if one is None else one.detach().requires_grad_() for one in made]
    total, values = loss(*leaves)
    (total * upstream).backward()
    assert not values.requires_grad
    return [total.detach(), values, *(one if one is None else one.grad for one in leaves)]


def assert_all_close(got, expected, rtol: float, atol: float = 0.0) -> None:
    """Gradients within their size; the totals as they are."""
    for ours, theirs in zip(got, expected, strict=True):
        if theirs is None:
            assert ours is None
            continue
        size = float(theirs.abs().max()) if theirs.ndim else 0.0
        torch.testing.assert_close(
            ours.double(), theirs.double(), rtol=rtol, atol=atol + rtol * size
        )


@pytest.mark.parametrize("block_rows", [1, 3, N])
@pytest.mark.parametrize("chunk_rows", [5, None])
def test_divergences_in_any_blocks(chunk_rows, block_rows, monkeypatch: pytest.MonkeyPatch):
    terms, others = MIXES["all"]
    monkeypatch.setattr(linear_loss, "BLOCK_ENTRIES", block_rows * V)
    shapes = []

    def spy(logits: Tensor, target: SparseTarget, temperature: float) -> Tensor:
        shapes.append(len(logits))
        return jensen_shannon_rows(logits, target, temperature)

    others = [replace(others[0], rows=spy), *others[1:]]
    got = run(lambda *m: linear_losses(*m, terms, others, chunk_rows=chunk_rows), inputs())
    assert max(shapes) == min(block_rows, chunk_rows or N)
    assert sum(shapes) == N
    expected = run(lambda h, w, b: explicit(F.linear(h, w, b), terms, others), inputs())
    assert_all_close(got, expected, rtol=1e-12)


@pytest.mark.parametrize("upstream", [1.0, -3.0])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("mix", MIXES)
def test_is_the_explicit_form(mix: str, chunk_rows: int | None, upstream: float):
    terms, others = MIXES[mix]
    got = run(
        lambda h, w, b: linear_losses(h, w, b, terms, others, chunk_rows=chunk_rows),
        inputs(),
        upstream,
    )
    expected = run(lambda h, w, b: explicit(F.linear(h, w, b), terms, others), inputs(), upstream)
    assert_all_close(got, expected, rtol=1e-12)


def test_cross_entropy_is_torchs():
    labels = torch.arange(N) % V
    terms = [LossTerm(hard_target(labels, V))]
    got = run(lambda h, w, b: linear_losses(h, w, b, terms, chunk_rows=5), inputs())

    def torchs(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(F.linear(h, w, b), labels)
        return loss, loss.detach()[None]

    assert_all_close(got, run(torchs, inputs()), rtol=1e-12)


def test_gradcheck():
    terms, others = MIXES["all"]
    some = others[:2]
    hidden, weight, bias = inputs()
    assert torch.autograd.gradcheck(
        lambda *made: linear_losses(*made, terms, some, chunk_rows=7)[0],
        (hidden, weight, bias),
        fast_mode=True,
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient(frozen: tuple[int, ...]):
    terms, others = MIXES["all"]
    made = inputs()
    for one in frozen:
        made[one].requires_grad_(False)
    linear_losses(*made, terms, others, chunk_rows=5)[0].backward()
    whole = run(lambda h, w, b: explicit(F.linear(h, w, b), terms, others), made)[2:]
    for number, (one, expected) in enumerate(zip(made, whole, strict=True)):
        if number in frozen:
            assert one.grad is None
        else:
            assert_all_close([one.grad], [expected], rtol=1e-12)


def test_without_bias():
    terms, others = MIXES["all"]
    hidden, weight, _ = inputs()
    got = run(
        lambda h, w, b: linear_losses(h, w, b, terms, others, chunk_rows=5), [hidden, weight, None]
    )
    expected = run(lambda h, w, b: explicit(F.linear(h, w), terms, others), [hidden, weight, None])
    assert_all_close(got, expected, rtol=1e-12)


@pytest.mark.parametrize("way", ["no_grad", "frozen"])
def test_an_evaluation_makes_no_gradients(way: str, monkeypatch: pytest.MonkeyPatch):
    terms, others = MIXES["all"]
    expected = linear_losses(*inputs(), terms, others)
    monkeypatch.setattr(linear_loss, "_add_gradients", None)
    made = inputs()
    if way == "frozen":
        total, values = linear_losses(*(one.detach() for one in made), terms, others)
    else:
        with torch.no_grad():
            total, values = linear_losses(*made, terms, others)
    assert not total.requires_grad
    assert torch.equal(total, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)]
)
def test_narrow_types(dtype, relative, mix: str, chunk_rows: int | None):
    terms, others = MIXES[mix]
    made = inputs(dtype)
    got = run(lambda h, w, b: linear_losses(h, w, b, terms, others, chunk_rows=chunk_rows), made)
    assert got[0].dtype == torch.float32
    assert [one.dtype for one in got[2:]] == [dtype] * 3
    wide = [one.detach().double() for one in made]
    expected = run(lambda h, w, b: explicit(F.linear(h, w, b), terms, others), wide)
    # The logits themselves are rounded to the narrow type.
    assert_all_close(got, expected, rtol=relative)


@pytest.mark.parametrize("mix", ["terms", "divergences", "all"])
def test_float16_gradients_survive_small_weights(mix: str):
    # 1e-9 is below the smallest float16; a scaled loss brings it back.
    terms, others = MIXES[mix]
    kept = [replace(one, row_weight=torch.full((N,), 1e-9)) for one in terms]
    small = [
        replace(one, term=replace(one.term, row_weight=torch.full((N,), 1e-9))) for one in others
    ]
    plain = [replace(one, row_weight=torch.ones(N)) for one in terms]
    full = [replace(one, term=replace(one.term, row_weight=torch.ones(N))) for one in others]
    made = inputs(torch.float16)
    got = run(lambda h, w, b: linear_losses(h, w, b, kept, small, chunk_rows=5), made, 1e9)
    wide = [one.detach().double() for one in made]
    expected = run(lambda h, w, b: explicit(F.linear(h, w, b), plain, full), wide)
    assert_all_close([got[0] * 1e9, got[1] * 1e9, *got[2:]], expected, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_the_projection_under_autocast(dtype: torch.dtype):
    terms, others = MIXES["all"]
    made = inputs(torch.float32)

    def ours(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return linear_losses(h, w, b, terms, others, chunk_rows=5)

    def theirs(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            logits = F.linear(h, w, b)
        assert logits.dtype == dtype
        return explicit(logits.double(), terms, others)

    got, expected = run(ours, made), run(theirs, made)
    assert [one.dtype for one in got] == [torch.float32] * 5
    # Both see the same rounded logits, so values agree far better than the type rounds.
    assert_all_close(got[:2], expected[:2], rtol=1e-5)
    assert_all_close(got[2:], expected[2:], rtol=8 * torch.finfo(dtype).eps)
    assert (got[0] - run(lambda *m: linear_losses(*m, terms, others), made)[0]).abs() > 1e-5


def test_autocast_leaves_float64_alone():
    terms, others = MIXES["all"]
    expected = linear_losses(*inputs(), terms, others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_losses(*inputs(), terms, others)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("mix", ["terms", "divergences", "all"])
def test_ignored_rows_may_have_any_logits(mix: str):
    terms, others = MIXES[mix]
    weights = torch.arange(N, dtype=torch.float64) % 4
    terms = [replace(one, row_weight=weights) for one in terms]
    others = [replace(one, term=replace(one.term, row_weight=weights)) for one in others]
    made = inputs()
    expected = run(lambda *m: linear_losses(*m, terms, others, chunk_rows=5), made)
    with torch.no_grad():
        made[0][weights == 0] = 1e308  # finite, and infinite or not a number as logits
    assert not F.linear(*made)[weights == 0].isfinite().all(1).any()
    got = run(lambda *m: linear_losses(*m, terms, others, chunk_rows=5), made)
    assert_all_close(got, expected, rtol=1e-12)
    assert not got[2][weights == 0].any()


def test_graphs_may_be_walked_twice():
    terms, others = MIXES["all"]
    made = inputs()
    total, _ = linear_losses(*made, terms, others, chunk_rows=5)
    total.backward(retain_graph=True)
    once = [one.grad.clone() for one in made]
    total.backward()
    for one, expected in zip(made, once, strict=True):
        torch.testing.assert_close(one.grad, 2 * expected)


@pytest.mark.parametrize("mix", MIXES)
def test_no_rows(mix: str):
    def none(term: LossTerm) -> LossTerm:
        target, empty = term.target, torch.zeros(0)
        target = replace(
            target,
            rows=target.rows[:0],
            ids=target.ids[:0],
            values=empty,
            uniform=None if target.uniform is None else empty,
            bucket=None if target.bucket is None else empty,
            constant=empty,
        )
        return replace(term, target=target, row_weight=None)

    terms = [none(one) for one in MIXES[mix][0]]
    others = [replace(one, term=none(one.term)) for one in MIXES[mix][1]]
    hidden, weight, bias = inputs()
    for dtype in (torch.float64, torch.float16):
        made = [one.detach().to(dtype) for one in (hidden[:0], weight, bias)]
        total, values, *grads = run(lambda *m: linear_losses(*m, terms, others), made)
        assert total == 0
        assert values.shape == (len(terms) + len(others),)
        assert not values.any()
        assert not any(grad.any() for grad in grads)
        assert grads[0].shape == (0, D)


def test_the_logits_never_exist(monkeypatch: pytest.MonkeyPatch):
    """Chunks are as large as asked, or as their entries allow."""
    shapes, rooms = [], set()
    project = linear_loss._project

    def spy(*arguments: Any) -> Tensor:
        made = project(*arguments)
        shapes.append(len(made))
        rooms.add(made.data_ptr())
        return made

    monkeypatch.setattr(linear_loss, "_project", spy)
    terms, others = MIXES["all"]
    linear_losses(*inputs(), terms, others, chunk_rows=10)
    assert shapes == [10, 10, 3]
    assert len(rooms) == 1  # every chunk lies where the first did
    shapes.clear()
    monkeypatch.setattr(linear_loss, "CHUNK_ROWS", 1)
    monkeypatch.setattr(linear_loss, "CHUNK_ENTRIES", 8 * V + 1)
    linear_losses(*inputs(), terms, others)
    assert shapes == [8, 8, 7]
    shapes.clear()
    monkeypatch.setattr(linear_loss, "CHUNK_ENTRIES", 1)
    linear_losses(*inputs(), terms, others)
    assert shapes == [1] * N
    shapes.clear()
    monkeypatch.setattr(linear_loss, "CHUNK_ROWS", 9)  # fewer would cost more than they save
    linear_losses(*inputs(), terms, others)
    assert shapes == [9, 9, 5]


def test_equals_the_fused_loss():
    terms = mixed_terms()
    expected = run(lambda h, w, b: fused_loss(F.linear(h, w, b), terms), inputs())
    got = run(lambda h, w, b: linear_losses(h, w, b, terms, chunk_rows=6), inputs())
    assert_all_close(got, expected, rtol=1e-12)


def test_what_does_not_fit_is_refused_in_one_line():
    hidden, weight, bias = inputs()
    terms = MIXES["cross_entropy"][0]
    drawn = [DivergenceTerm(reverse_kl_rows, LossTerm(make_target("repeats")))]
    longer = [replace(terms[0], row_weight=torch.ones(N + 1))]
    hot = [replace(terms[0], temperature=0.0)]
    cases = [
        ((hidden[:, 1:], weight, bias, terms), {}, r"expected \[N, D\], \[V, D\], \[V\]"),
        ((hidden, weight, bias[1:], terms), {}, r"expected \[N, D\], \[V, D\], \[V\]"),
        ((hidden[0], weight, bias, terms), {}, r"expected \[N, D\], \[V, D\], \[V\]"),
        ((hidden[1:], weight, bias, terms), {}, r"covers \[23\] positions; expected \[22\]"),
        ((hidden, weight, bias, longer), {}, r"covers \[24\] positions; expected \[23\]"),
        ((hidden, weight[:9], bias[:9], terms), {}, "expected 0 to 8"),
        ((hidden, weight, bias, hot), {}, "temperature is 0.0"),
        ((hidden, weight, bias, []), {}, "got no terms"),
        ((hidden, weight, bias, terms), {"chunk_rows": 0}, "chunk_rows is 0"),
        ((hidden, weight, bias, terms, drawn), {}, "reverse_kl: the labels have no density"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(TrainingError, match=message) as found:
            linear_losses(*arguments, **options)
        assert "\n" not in str(found.value)
