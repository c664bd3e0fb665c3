"""Labels drawn for a set of temperatures: what they are in the mean, and how far they scatter."""

import math

import numpy as np
import pytest
import torch

from kdcache.dump.codecs.select import encode_logits
from kdcache.formats import keyed
from kdcache.formats.codec import ThresholdCodec
from kdcache.formats.codes import code_log_probs
from kdcache.labels.coded_labels import CodedLabels, LogitsSpec
from kdcache.labels.decoding import decode
from kdcache.labels.sparse_target import densify
from tests.test_labels import TEMPERATURES, N, V, loss_of, round_trip, teacher

SEEDS, VOCAB, PROJECTIONS = 4096, 200, 16


def rows_of_all_kinds(num: int, vocab_size: int) -> torch.Tensor:
    """[N, V] logits from nearly flat to nearly certain."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(num, vocab_size, generator=generator) * torch.linspace(0.1, 5, num)[:, None]


def many_labels(codec: ThresholdCodec, logits: torch.Tensor, position: int) -> CodedLabels:
    """One position under as many hash seeds as there are rows."""
    num = len(logits)
    seeds = np.arange(num, dtype=np.uint64)
    draw, rounding = (
        torch.from_numpy(
            keyed.position_hash(
                keyed.mix64(seeds ^ np.uint64(keyed.text_key(purpose))), np.full(num, position)
            ).view(np.int64)
        )
        for purpose in ("draw", "round")
    )
    gold = torch.zeros(num, dtype=torch.int64)
    encoded = encode_logits(logits, gold, draw, rounding, codec, TEMPERATURES)
    return CodedLabels(
        spec=LogitsSpec(codec, logits.shape[1], TEMPERATURES),
        num_exact=encoded.num_exact,
        num_drawn=encoded.num_drawn,
        gold=encoded.tokens["gold"],
        entropy=encoded.tokens["entropy"],
        tail=torch.stack([encoded.tokens[f"tail_{i}"] for i in range(4)], dim=1),
        exact_id=encoded.exact["id"].to(torch.int32),
        exact_code=encoded.exact["code"],
        drawn_id=encoded.drawn["id"].to(torch.int32),
        drawn_code=encoded.drawn["code"],
    )


def chances(logits: torch.Tensor, codec: ThresholdCodec) -> torch.Tensor:
    """[V] float64 probability that an id is kept."""
    every = [torch.softmax(logits.double() / t, -1) for t in codec.temperatures]
    return (torch.stack(every).amax(0) / codec.c).clamp(max=1)


@pytest.mark.parametrize(
    ("codec", "positions"),
    [
        pytest.param(ThresholdCodec(temperatures=(1, 2, 5)), 50, id="1-2-5"),
        pytest.param(ThresholdCodec(c=1 / 8, temperatures=(0.5, 2)), 20, id="cold-and-hot"),
    ],
)
def test_labels_are_unbiased_at_every_temperature_of_the_set(codec, positions):
    logits = rows_of_all_kinds(positions, VOCAB)
    generator = torch.Generator().manual_seed(5)
    projections = torch.randn(VOCAB, PROJECTIONS, generator=generator)
    # Two-sided normal quantile at 1e-3 over all comparisons (0.5e-3 / 2400 beyond it).
    bound = 5.2
    squared = dict.fromkeys(codec.temperatures, 0.0)
    expected_squared = dict.fromkeys(codec.temperatures, 0.0)
    for n in range(positions):
        coded = many_labels(codec, logits[n].expand(SEEDS, -1), n)
        kept = chances(logits[n], codec)
        for temperature in codec.temperatures:
            probs = torch.softmax(logits[n].double() / temperature, -1)
            error = densify(decode(coded, temperature), VOCAB).sub_(probs)
            projected = (error @ projections).double()  # [SEEDS, PROJECTIONS]
            deviation = projected.std(dim=0) / math.sqrt(SEEDS)
            assert bool((projected.mean(dim=0).abs() <= bound * deviation + 1e-6).all()), n
            squared[temperature] += float(error.square_().sum(dim=1).double().mean())
            expected_squared[temperature] += float((probs**2 * (1 / kept - 1)).sum())
    for temperature, expected in expected_squared.items():
        assert squared[temperature] == pytest.approx(expected, rel=0.02), temperature


def one_draw_of_each_code(codec: ThresholdCodec, logits: torch.Tensor) -> CodedLabels:
    """[256] the exact entries and tails of one position, and one drawn entry, code by code."""
    coded = many_labels(codec, logits.expand(256, -1), 0)
    first = int(coded.num_exact[0])
    return CodedLabels(
        spec=coded.spec,
        num_exact=coded.num_exact[:1].expand(256),
        num_drawn=torch.ones(256, dtype=torch.int64),
        gold=coded.gold,
        entropy=coded.entropy,
        tail=coded.tail[:1].expand(256, -1),
        exact_id=coded.exact_id[:first].repeat(256),
        exact_code=coded.exact_code[:first].repeat(256),
        drawn_id=torch.full((256,), VOCAB - 1, dtype=torch.int32),
        drawn_code=torch.arange(256, dtype=torch.uint8),
    )


@pytest.mark.parametrize(
    ("sharpness", "largest"),
    [
        pytest.param(0.1, 0.01, id="flat"),
        pytest.param(1.0, 0.004, id="smooth"),
        pytest.param(3.0, 0.005, id="peaked"),
        pytest.param(9.0, 0.005, id="beyond-the-range"),
    ],
)
def test_the_bias_of_rounding_is_small(sharpness, largest):
    """The mean over draws and roundings, without any sampling: id by id, code by code."""
    codec = ThresholdCodec(temperatures=(1, 2, 5))
    generator = torch.Generator().manual_seed(3)
    logits = sharpness * torch.randn(VOCAB, generator=generator)
    kept = chances(logits, codec).numpy()
    log_probs = torch.log_softmax(logits.double(), -1).numpy()[kept < 1]
    codes = code_log_probs(codec.drawn_range_nats)[::-1]
    above = np.clip(np.searchsorted(codes, log_probs, side="right"), 1, 255)
    low, high = np.exp(codes[above - 1]), np.exp(codes[above])
    share = np.clip((np.exp(log_probs) - low) / (high - low), 0, 1)
    coded = one_draw_of_each_code(codec, logits)
    for temperature in codec.temperatures:
        target = decode(coded, temperature)
        weight = target.values[target.ids == VOCAB - 1].double().numpy()[::-1]  # [256]
        mean = kept[kept < 1] * (share * weight[above] + (1 - share) * weight[above - 1])
        probs = torch.softmax(logits.double() / temperature, -1).numpy()[kept < 1]
        assert 0 < np.abs(mean - probs).sum() < largest * probs.sum()


@pytest.mark.parametrize("values", ["uint8", "float16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_drawn_labels_lose_nothing_at_any_temperature_of_the_set(temperature, values):
    codec = ThresholdCodec(temperatures=(1, 2, 5), values=values)
    logits = teacher()
    log_probs = torch.log_softmax(logits / temperature, -1)
    # The label closes its own sum, so the loss of every single position is about nothing.
    mean, most = (3e-3, 0.1) if values == "uint8" else (3e-4, 5e-3)
    losses = loss_of(decode(round_trip(logits, codec), temperature), log_probs)
    assert float(losses.abs().max()) < most
    assert abs(float(losses.mean())) < mean


def test_weights_by_hand():
    """Four ids, two temperatures: p and p^(1/2), and everything in floats of 32 bits."""
    probs = torch.tensor([0.64, 0.25, 0.10, 0.01])
    codec = ThresholdCodec(c=0.5, temperatures=(1, 2), values="float32")
    coded = many_labels(codec, probs.log().expand(2000, -1), 0)
    total = 0.8 + 0.5 + math.sqrt(0.1) + 0.1
    assert coded.num_exact.tolist() == [1] * 2000  # 0.64 alone is 0.5 or more; 0.8 / total is not
    hot, cold = (densify(decode(coded, t), 4) for t in (2.0, 1.0))
    # Each is drawn for temperature 2, at which it is more probable, and weighs c there.
    for i, root in ((1, 0.5), (2, math.sqrt(0.1)), (3, 0.1)):
        drawn = cold[:, i] > 0
        assert float(drawn.float().mean()) == pytest.approx(root / total / 0.5, abs=0.04)
        assert hot[drawn, i].tolist() == pytest.approx([0.5] * int(drawn.sum()), rel=1e-5)
        expected = 0.5 * probs[i].item() / (root / total)
        assert cold[drawn, i].tolist() == pytest.approx([expected] * int(drawn.sum()), rel=1e-3)
    assert cold[:, 0].tolist() == pytest.approx([0.64] * 2000, rel=1e-5)
    assert hot[:, 0].tolist() == pytest.approx([0.8 / total] * 2000, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
def test_other_temperatures_are_served_by_the_exact_entries(tail, temperature):
    logits = teacher()
    coded = round_trip(logits, ThresholdCodec(temperatures=(2, 5), values="float32"))
    exact = torch.arange(N).repeat_interleave(coded.num_exact)
    probs = torch.softmax(logits / temperature, -1)[exact, coded.exact_id.long()]
    target = decode(coded, temperature, tail)
    assert target.rows.tolist() == exact.tolist()  # none was drawn
    if tail != "renormalise":
        found = densify(target, V)[exact, coded.exact_id.long()]
        torch.testing.assert_close(found, probs, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [V, 66_000])
@pytest.mark.parametrize("temperatures", [(1, 2, 5), (5,)])
def test_rows_of_every_kind_through_the_file(temperatures, vocab_size):
    codec = ThresholdCodec(c=1 / 32, temperatures=temperatures)
    logits = torch.full((5, vocab_size), -torch.inf)
    logits[0] = 0.0  # flat
    logits[1, 3] = 1.0  # certain
    logits[2] = torch.linspace(0, -200, vocab_size)
    logits[3, ::3] = torch.randn(len(logits[3, ::3]), generator=torch.Generator().manual_seed(1))
    logits[4, :5] = torch.tensor([0.0, -60.0, -70.0, -90.0, -100.0])
    coded = round_trip(logits, codec)
    for temperature in codec.temperatures:
        target = decode(coded, temperature)
        dense = densify(target, vocab_size)
        assert bool(torch.isfinite(dense).all())
        assert bool(torch.isfinite(target.constant).all())
        assert not dense[logits.isneginf()].any()
        # As many draws as fit the mass, so it can be off by one of them (and by rounding).
        assert float((dense.sum(1) - 1).abs().max()) < 1.1 / 32 + 0.25 * (temperature < 5)
        assert float(dense[1, 3]) == 1
        some = torch.softmax(logits[4].double() / temperature, -1)[:5]
        assert float((dense[4, :5] - some).abs().max()) <= 1.05 / 32
