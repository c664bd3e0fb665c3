"""The fused loss against torch's own dense losses, and what it promises about its inputs."""

# N positions, V vocabulary, E entries

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdcache.errors import TrainingError
from kdcache.labels.sparse_target import SparseTarget
from kdcache.train.losses.fused_loss import (
    LossTerm,
    cross_entropy,
    forward_kl,
    fused_loss,
    hard_target,
)

N, V = 23, 37
KINDS = ["repeats", "uniform", "bucket"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_logits(seed: int = 0, rows: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, V, generator=generator, dtype=torch.float64) * 3 + 5).to(dtype)


def make_target(kind: str, seed: int = 1, rows: int = N) -> SparseTarget:
    """Entries with repeats, some positions without any, masses that do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (rows,), generator=generator)
    counts[rows // 2 :: 7] = 0
    entry_rows = torch.repeat_interleave(torch.arange(rows), counts)
    ids = torch.randint(0, V, (len(entry_rows),), generator=generator)
    repeats = (torch.rand(len(ids), generator=generator) < 0.3).nonzero().flatten()
    repeats = repeats[(repeats > 0) & (entry_rows[repeats] == entry_rows[repeats - 1])]
    ids[repeats] = ids[repeats - 1]
    rest = torch.rand(rows, generator=generator, dtype=torch.float64)
    rest[::5] = 0.0
    return SparseTarget(
        rows=entry_rows,
        ids=ids,
        values=torch.rand(len(ids), generator=generator, dtype=torch.float64),
        uniform=rest / V if kind == "uniform" else None,
        bucket=rest if kind == "bucket" else None,
        constant=torch.randn(rows, generator=generator, dtype=torch.float64),
    )


def dense_loss(logits: Tensor, target: SparseTarget, temperature: float) -> Tensor:
    """[N] losses by the definition, from a dense target."""
    density = torch.zeros_like(logits)
    density.index_put_((target.rows, target.ids), target.values.to(logits), accumulate=True)
    if target.uniform is not None:
        density = density + target.uniform.to(logits)[:, None]
    log_probs = torch.log_softmax(logits / temperature, 1)
    loss = target.constant.to(logits) - (density * log_probs).sum(1)
    if target.bucket is not None:
        listed = torch.zeros_like(logits, dtype=torch.bool)
        listed[target.rows, target.ids] = True
        rest = log_probs.masked_fill(listed, -torch.inf).logsumexp(1)
        loss = loss - target.bucket.to(logits) * rest
    return loss


def dense_total(logits: Tensor, terms: list[LossTerm]) -> tuple[Tensor, Tensor]:
    values = []
    for term in terms:
        row_weight = term.row_weight
        if row_weight is None:
            row_weight = torch.full((len(logits),), 1 / len(logits), dtype=logits.dtype)
        values.append((dense_loss(logits, term.target, term.temperature) * row_weight).sum())
    stacked = torch.stack(values)
    return stacked @ stacked.new_tensor([term.weight for term in terms]), stacked.detach()


def gradient_of(loss, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    total, values = loss(leaf * 1)
    (total * 1.0).backward()
    return total.detach(), values, leaf.grad


def assert_like_dense(logits: Tensor, terms: list[LossTerm], relative: float = 1e-6, **options):
    total, values, gradient = gradient_of(lambda z: fused_loss(z, terms, **options), logits)
    expected = gradient_of(lambda z: dense_total(z, terms), logits)
    assert gradient.dtype == logits.dtype
    size = expected[2].abs().max().item()
    torch.testing.assert_close(total, expected[0], rtol=relative, atol=1e-12)
    torch.testing.assert_close(values, expected[1], rtol=relative, atol=1e-12)
    torch.testing.assert_close(gradient, expected[2], rtol=relative, atol=relative * size)


def mixed_terms() -> list[LossTerm]:
    """Every kind of target, ignored positions, equal and different temperatures."""
    row_weight = torch.rand(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    row_weight[::4] = 0.0
    labels = torch.arange(N) % V
    labels[::4] = -100
    return [
        LossTerm(hard_target(labels, V, 0.1), 1.0, 0.3, row_weight),
        LossTerm(make_target("repeats"), 1.0, 0.7, row_weight),
        LossTerm(make_target("bucket", 5), 2.0, 0.2, row_weight),
        LossTerm(make_target("uniform", 6), 0.5, 1.1, row_weight),
        LossTerm(make_target("bucket", 7), 1.0, 0.4, row_weight),
    ]


def test_value_by_hand():
    # p = (1/2, 1/4, 1/4); the target is (1/2 + 1/4, 0, 1/4): CE = 3/4 ln 2 + 1/4 ln 4 = 5/4 ln 2
    logits = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    target = SparseTarget(
        rows=torch.tensor([0, 0, 0]),
        ids=torch.tensor([0, 2, 0]),
        values=torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64),
        uniform=None,
        bucket=None,
        constant=torch.tensor([0.25], dtype=torch.float64),
    )
    total, values = fused_loss(logits, [LossTerm(target, weight=2.0)])
    total.backward()
    assert values.item() == pytest.approx(0.25 + 1.25 * math.log(2))
    assert total.item() == pytest.approx(2 * values.item())
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, 0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(smoothing: float):
    labels = torch.arange(N) % V
    labels[[0, 5, N - 1]] = -100

    def ours(z: Tensor):
        return cross_entropy(z, labels, label_smoothing=smoothing), torch.zeros(1)

    def theirs(z: Tensor):
        return F.cross_entropy(z, labels, label_smoothing=smoothing), torch.zeros(1)

    for got, expected in zip(
        gradient_of(ours, make_logits()), gradient_of(theirs, make_logits()), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("squared", [True, False])
def test_forward_kl_is_torchs(temperature: float, squared: bool):
    teacher = torch.softmax(make_logits(9) / temperature, 1)
    mask = torch.arange(N) % 3 > 0
    everywhere = torch.arange(N * V)
    target = SparseTarget(
        rows=everywhere // V,
        ids=everywhere % V,
        values=teacher.flatten(),
        uniform=None,
        bucket=None,
        constant=torch.xlogy(teacher, teacher).sum(1),
    )

    def ours(z: Tensor):
        loss = forward_kl(z, target, temperature, temperature_squared=squared, mask=mask)
        return loss, torch.zeros(1)

    def theirs(z: Tensor):
        log_probs = torch.log_softmax(z / temperature, 1)[mask]
        loss = F.kl_div(log_probs, teacher[mask], reduction="batchmean")
        return loss * (temperature**2 if squared else 1.0), torch.zeros(1)

    for got, expected in zip(
        gradient_of(ours, make_logits()), gradient_of(theirs, make_logits()), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    # A student that is the teacher has no loss and no gradient.
    same, _, gradient = gradient_of(ours, make_logits(9))
    assert abs(same.item()) < 1e-10
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_one_term_equals_dense(kind: str, temperature: float, inplace: bool):
    assert_like_dense(
        make_logits(), [LossTerm(make_target(kind), temperature, 0.7)], inplace=inplace
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("block_rows", [1, 7, 64, N, None])
def test_mix_equals_dense_in_any_blocks(block_rows: int | None, inplace: bool):
    assert_like_dense(make_logits(), mixed_terms(), block_rows=block_rows, inplace=inplace)


def test_blocks_and_place_change_no_bit():
    results = [
        gradient_of(
            lambda z, rows=rows, inplace=inplace: fused_loss(
                z, mixed_terms(), block_rows=rows, inplace=inplace
            ),
            make_logits(dtype=torch.float32),
        )
        for rows in (1, 7, 64, N)
        for inplace in (False, True)
    ]
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_narrow_logits_are_computed_in_float32(dtype: torch.dtype, relative: float, inplace: bool):
    logits = make_logits(dtype=dtype)
    total, values, gradient = gradient_of(
        lambda z: fused_loss(z, mixed_terms(), inplace=inplace), logits
    )
    expected = gradient_of(lambda z: dense_total(z, mixed_terms()), logits.double())
    assert gradient.dtype == dtype
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(values.double(), expected[1], rtol=1e-5, atol=0)
    size = expected[2].abs().max().item()
    torch.testing.assert_close(gradient.double(), expected[2], rtol=relative, atol=relative * size)


def test_float16_gradient_survives_small_weights():
    # 1e-9 is below the smallest float16; a scaled loss brings it back.
    logits = make_logits(dtype=torch.float16).requires_grad_()
    term = LossTerm(make_target("repeats"), 1.0, 1.0, torch.full((N,), 1e-9))
    total, _ = fused_loss(logits, [term])
    (total * 1e9).backward()
    plain = LossTerm(make_target("repeats"), 1.0, 1.0, torch.ones(N))
    expected = gradient_of(lambda z: dense_total(z, [plain]), logits.detach().double())[2]
    torch.testing.assert_close(logits.grad.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [0.25, -3.0, 0.0])
def test_upstream_gradient_scales(upstream: float, inplace: bool):
    terms = mixed_terms()
    plain = make_logits().requires_grad_()
    fused_loss(plain, terms)[0].backward()
    leaf = make_logits().requires_grad_()
    (fused_loss(leaf * 1, terms, inplace=inplace)[0] * upstream).backward()
    torch.testing.assert_close(leaf.grad, plain.grad * upstream)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str):
    terms = [
        LossTerm(make_target(kind, rows=4), 2.0, 0.7, torch.tensor([0.3, 0.0, 1.0, 0.2])),
        LossTerm(hard_target(torch.tensor([1, 2, 3, -1]), V, 0.1), 1.0, 0.4),
    ]
    logits = make_logits(rows=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fused_loss(z, terms, block_rows=3)[0], (logits,))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_without_gradient_nothing_is_written(temperature: float, inplace: bool):
    terms = [LossTerm(make_target("bucket"), temperature)]
    logits = make_logits()
    kept = logits.clone()
    total, values = fused_loss(logits, terms, inplace=inplace)
    with torch.no_grad():
        again, _ = fused_loss(logits.requires_grad_() * 1, terms, inplace=inplace)
    assert not total.requires_grad
    assert not again.requires_grad
    assert torch.equal(logits, kept)
    assert torch.equal(total, again)
    expected, expected_values = dense_total(kept, terms)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(values, expected_values)


def test_out_of_place_leaves_logits_and_graph_alone():
    logits = make_logits().requires_grad_()
    kept = logits.detach().clone()
    total, values = fused_loss(logits, mixed_terms())
    assert total.requires_grad
    assert not values.requires_grad
    total.backward(retain_graph=True)
    first = logits.grad.clone()
    logits.grad = None
    (total * 2).backward()
    assert torch.equal(logits.detach(), kept)
    torch.testing.assert_close(logits.grad, first * 2)


def test_inplace_takes_the_logits_place():
    leaf = make_logits().requires_grad_()
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    fused_loss(logits, mixed_terms(), inplace=True)[0].backward()
    assert seen == [logits.data_ptr()]
    torch.testing.assert_close(logits.detach(), leaf.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda z: z.logsumexp(1).sum(), id="saves_logits"),
        pytest.param(lambda z: z.sum(), id="saves_nothing"),
    ],
)
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_use_after_inplace_is_refused(other, view: bool, apart: bool):
    logits = make_logits().requires_grad_() * 1
    if view:
        logits = logits.view(1, N, V).view(-1, V)
    total, _ = fused_loss(logits, mixed_terms(), inplace=True)
    second = other(logits)
    combined = second if apart else total + second
    with pytest.raises(RuntimeError, match=r"used by another|modified by an inplace"):
        combined.backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_second_fused_loss_after_inplace_is_refused(grad: bool, inplace: bool):
    logits = make_logits().requires_grad_() * 1
    fused_loss(logits, mixed_terms(), inplace=True)
    with torch.set_grad_enabled(grad), pytest.raises(TrainingError, match="one call"):
        fused_loss(logits.view(N, V), mixed_terms(), inplace=inplace)


def test_use_before_inplace_is_refused():
    logits = make_logits().requires_grad_() * 1
    penalty = logits.logsumexp(1).square().mean()
    total, _ = fused_loss(logits, mixed_terms(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        (total + penalty).backward()


def test_second_backward_after_scaling_inplace_is_refused():
    total, _ = fused_loss(make_logits().requires_grad_() * 1, mixed_terms(), inplace=True)
    (total * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        total.backward()


def test_views_of_a_models_output():
    leaf = make_logits().requires_grad_()
    batch = (leaf * 1).view(1, N, V)
    fused_loss(batch.view(-1, V), mixed_terms(), inplace=True)[0].backward()
    expected = gradient_of(lambda z: fused_loss(z, mixed_terms()), make_logits())[2]
    torch.testing.assert_close(leaf.grad, expected)


def test_views_base_used_too_is_refused():
    batch = (make_logits().requires_grad_() * 1).view(1, N, V)
    total, _ = fused_loss(batch.view(-1, V), mixed_terms(), inplace=True)
    with pytest.raises(TrainingError, match="used by another"):
        (total + batch.sum()).backward()


def test_part_of_a_larger_tensor_is_not_overwritten():
    leaf = make_logits(rows=N + 2).requires_grad_()
    logits = leaf * 1
    fused_loss(logits[:N], mixed_terms(), inplace=True)[0].backward()
    assert torch.equal(logits, leaf)
    assert torch.count_nonzero(leaf.grad[N:]) == 0


def test_logits_that_are_not_contiguous_are_not_overwritten():
    leaf = make_logits().t().contiguous().requires_grad_()
    logits = leaf.t() * 1
    assert not logits.is_contiguous()
    fused_loss(logits, mixed_terms(), inplace=True)[0].backward()
    assert torch.equal(logits, leaf.detach().t())
    expected = gradient_of(lambda z: fused_loss(z, mixed_terms()), make_logits())[2]
    torch.testing.assert_close(leaf.grad.t(), expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_positions_may_hold_anything(inplace: bool):
    terms = mixed_terms()
    clean = gradient_of(lambda z: fused_loss(z, terms), make_logits())
    logits = make_logits()
    logits[0] = torch.nan
    logits[4] = torch.inf
    logits[8] = -torch.inf
    dirty = gradient_of(lambda z: fused_loss(z, terms, inplace=inplace), logits)
    for got, expected in zip(dirty, clean, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_fully_ignored_batch(inplace: bool):
    labels = torch.full((N,), -100)
    total, _, gradient = gradient_of(
        lambda z: (cross_entropy(z, labels, label_smoothing=0.1, inplace=inplace), torch.zeros(1)),
        make_logits(),
    )
    assert total.item() == 0.0
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, inplace: bool):
    target = make_target(kind, rows=0)
    terms = [LossTerm(target), LossTerm(target, 2.0)]
    total, values, gradient = gradient_of(
        lambda z: fused_loss(z, terms, inplace=inplace), make_logits(rows=0)
    )
    assert total.item() == 0.0
    assert values.tolist() == [0.0, 0.0]
    assert gradient.shape == (0, V)


def test_bucket_of_a_confident_student():
    # exp(-200) is nothing in float32: the rest's log-probability must still be about -200.
    logits = torch.zeros(1, 4)
    logits[0, 0] = 200.0
    target = SparseTarget(
        rows=torch.tensor([0]),
        ids=torch.tensor([0]),
        values=torch.tensor([0.9]),
        uniform=None,
        bucket=torch.tensor([0.1]),
        constant=torch.zeros(1),
    )
    _, values, gradient = gradient_of(lambda z: fused_loss(z, [LossTerm(target)]), logits)
    assert values.item() == pytest.approx(0.1 * (200 - math.log(3)), rel=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([[0.1, -0.1 / 3, -0.1 / 3, -0.1 / 3]]))


def test_empty_bucket_where_all_ids_are_listed():
    target = SparseTarget(
        rows=torch.zeros(V, dtype=torch.int64),
        ids=torch.arange(V),
        values=torch.full((V,), 1 / V, dtype=torch.float64),
        uniform=None,
        bucket=torch.zeros(1, dtype=torch.float64),
        constant=torch.zeros(1, dtype=torch.float64),
    )
    logits = make_logits(rows=1)
    total, _, gradient = gradient_of(lambda z: fused_loss(z, [LossTerm(target)]), logits)
    assert total.item() == pytest.approx(-torch.log_softmax(logits, 1).mean().item())
    assert torch.isfinite(gradient).all()


def test_shifted_logits_have_the_same_loss():
    terms = [LossTerm(make_target("uniform"), 1.0), LossTerm(make_target("bucket"), 2.0)]
    near = fused_loss(make_logits(dtype=torch.float32), terms)[1]
    far = fused_loss((make_logits() + 4096.0).float(), terms)[1]
    torch.testing.assert_close(near, far, rtol=2e-3, atol=0)


def broken_target(**change: Tensor) -> SparseTarget:
    parts = {
        "rows": torch.tensor([0, 1]),
        "ids": torch.tensor([0, V - 1]),
        "values": torch.ones(2),
        "uniform": None,
        "bucket": None,
        "constant": torch.zeros(N),
    }
    return SparseTarget(**{**parts, **change})


@pytest.mark.parametrize(
    ("term", "message"),
    [
        pytest.param(LossTerm(broken_target(), 0.0), "above 0", id="temperature"),
        pytest.param(LossTerm(broken_target(), math.inf), "above 0", id="no_temperature"),
        pytest.param(
            LossTerm(broken_target(ids=torch.tensor([0, V]))), f"0 to {V - 1}", id="high_id"
        ),
        pytest.param(
            LossTerm(broken_target(ids=torch.tensor([-1, 0]))), f"0 to {V - 1}", id="low_id"
        ),
        pytest.param(
            LossTerm(broken_target(rows=torch.tensor([0, N]))), f"0 to {N - 1}", id="high_row"
        ),
        pytest.param(
            LossTerm(broken_target(rows=torch.tensor([1, 0]))), "ascending", id="row_order"
        ),
        pytest.param(
            LossTerm(broken_target(constant=torch.zeros(N - 1))), "one per row", id="constant"
        ),
        pytest.param(LossTerm(broken_target(values=torch.ones(3))), "as many of each", id="values"),
        pytest.param(
            LossTerm(broken_target(), row_weight=torch.ones(2)), "one per row", id="row_weight"
        ),
    ],
)
def test_broken_terms_are_refused(term: LossTerm, message: str):
    with pytest.raises(TrainingError, match=message):
        fused_loss(make_logits(), [term])


def test_broken_logits_are_refused():
    term = LossTerm(broken_target())
    with pytest.raises(TrainingError, match="at least one term"):
        fused_loss(make_logits(), [])
    with pytest.raises(TrainingError, match=r"\[N, V\]"):
        fused_loss(make_logits().view(1, N, V), [term])
    with pytest.raises(TrainingError, match="floating"):
        fused_loss(make_logits().long(), [term])
    with pytest.raises(TrainingError, match="leaf"):
        fused_loss(make_logits().requires_grad_(), [term], inplace=True)
    with pytest.raises(TrainingError, match="leaf"):
        fused_loss(make_logits().requires_grad_().view(N, V), [term], inplace=True)
