"""Labels through the whole round trip: encode, host, schema, decode."""

import math

import numpy as np
import pytest
import torch

from kdcache.dump.codecs.select import encode_logits
from kdcache.errors import RecipeError
from kdcache.formats import keyed
from kdcache.formats.codec import FullCodec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import logits_schema, ragged_batch, ragged_columns
from kdcache.labels.coded_labels import CodedLabels, LogitsSpec, coded_labels, entropy_nats
from kdcache.labels.decoding import decode, resolve_tail
from kdcache.labels.sparse_target import densify

TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
N, V = 60, 500
EXACT = [
    pytest.param(ThresholdCodec(values="float32"), id="threshold"),
    pytest.param(TopKCodec(k=8, values="float32"), id="topk"),
    pytest.param(NucleusCodec(p=0.9, k_max=20, values="float32"), id="nucleus"),
    pytest.param(FullCodec(values="float32"), id="full"),
]
CODED = [
    pytest.param(ThresholdCodec(), id="threshold"),
    pytest.param(TopKCodec(k=8), id="topk"),
    pytest.param(NucleusCodec(p=0.9, k_max=20), id="nucleus"),
    pytest.param(ThresholdCodec(temperatures=(1, 5)), id="threshold-set"),
    pytest.param(SampledCodec(n=50), id="sampled"),
    pytest.param(SampledCodec(n=700), id="sampled-two-byte-counts"),
    pytest.param(FullCodec(), id="full"),
]


def teacher(vocab_size: int = V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, vocab_size, generator=generator) * torch.linspace(0.3, 4, N)[:, None]


def round_trip(logits: torch.Tensor, codec, temperatures=TEMPERATURES) -> CodedLabels:
    """Through Arrow, as two samples."""
    num, vocab_size = logits.shape
    keys = [np.full(num, keyed.text_key(p), dtype=np.uint64) for p in ("draw", "round")]
    draw, rounding = (
        torch.from_numpy(keyed.position_hash(key, np.arange(num)).view(np.int64)) for key in keys
    )
    gold = torch.zeros(num, dtype=torch.int64)
    encoded = encode_logits(logits, gold, draw, rounding, codec, temperatures)
    starts = np.array([0, num // 3, num])
    offsets = {
        "tokens": starts,
        "exact": offsets_of(encoded.num_exact.numpy())[starts],
        "drawn": offsets_of(encoded.num_drawn.numpy())[starts],
    }
    host = encoded.to_host()
    columns = {name: Ragged(offsets[name], fields) for name, fields in host.items()}
    batch = ragged_batch(logits_schema(codec, vocab_size, temperatures), columns)
    stored = {name: column.take(np.arange(2)) for name, column in ragged_columns(batch).items()}
    return coded_labels(LogitsSpec(codec, vocab_size, tuple(temperatures)), stored)


def head_mask(coded: CodedLabels, vocab_size: int = V) -> torch.Tensor:
    mask = torch.zeros(len(coded.gold), vocab_size, dtype=torch.bool)
    if coded.exact_id is None:
        return ~mask
    rows = torch.arange(len(coded.gold)).repeat_interleave(coded.num_exact)
    mask[rows, coded.exact_id.long()] = True
    return mask


def loss_of(target, log_probs: torch.Tensor) -> torch.Tensor:
    """[N] constant minus sum of density x log_prob, the bucket by its definition."""
    dense = densify(target, log_probs.shape[1])
    cross = torch.where(dense > 0, dense * log_probs, 0).sum(1)
    if target.bucket is not None:
        listed = torch.zeros_like(log_probs, dtype=torch.bool)
        listed[target.rows, target.ids] = True
        rest = torch.logsumexp(log_probs.masked_fill(listed, -torch.inf), 1)
        cross = cross + torch.where(target.bucket > 0, target.bucket * rest, 0)
    return target.constant - cross


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("vocab_size", [V, 66_000])
def test_round_trip(codec, vocab_size):
    logits = teacher(vocab_size)[:: 1 if vocab_size == V else 6]
    if vocab_size != V and codec.name == "full":
        pytest.skip("slow, and ids are implied")
    num = len(logits)
    coded = round_trip(logits, codec)
    target = decode(coded)
    assert bool((target.rows.diff() >= 0).all())
    assert int(target.rows.max()) == num - 1
    probs = torch.softmax(logits, -1)
    dense = densify(target, vocab_size)
    if codec.has_drawn:
        error = (dense - probs).square().sum(1).mean().sqrt()
        assert float(error) < math.sqrt(1 / 16) + 0.02  # a flat row at c = 1/16
        assert target.uniform is None
        if not codec.has_drawn_log_probs:
            torch.testing.assert_close(target.constant, -entropy_nats(coded))
    else:
        torch.testing.assert_close(dense.sum(1), torch.ones(num))
        mask = head_mask(coded, vocab_size)
        torch.testing.assert_close(dense[mask], probs[mask], rtol=0.06, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.5, 3.0, 10.0])
@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
@pytest.mark.parametrize("codec", EXACT)
def test_temperatures_and_tails(codec, tail, temperature):
    logits = teacher()
    coded = round_trip(logits, codec)
    target = decode(coded, temperature, tail)
    probs = torch.softmax(logits / temperature, -1)
    mask = head_mask(coded)
    dense = densify(target, V)
    if tail == "renormalise":
        head = torch.where(mask, probs, 0)
        expected = head / head.sum(1, keepdim=True).clamp(min=1e-30)
        torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-6)
        return
    # The tail's mass is interpolated; the head shares its error.
    torch.testing.assert_close(dense[mask], probs[mask], rtol=0.04, atol=1e-4)
    rest = torch.where(mask, 0, probs).sum(1)
    if tail == "bucket" and codec.name != "full":
        assert target.uniform is None
        assert bool((dense[~mask] == 0).all())
        torch.testing.assert_close(target.bucket, rest, rtol=0.04, atol=1e-3)
        torch.testing.assert_close(dense.sum(1) + target.bucket, torch.ones(N))
    else:
        assert target.bucket is None
        torch.testing.assert_close(dense.sum(1), torch.ones(N))
        spread = torch.where(mask, 0, dense)
        torch.testing.assert_close(spread.sum(1), rest, rtol=0.04, atol=1e-3)
        largest = spread.amax(1, keepdim=True).expand(-1, V)
        torch.testing.assert_close(spread[~mask], largest[~mask], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
@pytest.mark.parametrize("codec", EXACT + CODED[:3])
def test_the_loss_is_zero_where_the_student_is_the_label(codec, tail, temperature):
    target = decode(round_trip(teacher(), codec), temperature, tail)
    dense = densify(target, V)
    if target.bucket is not None:
        listed = torch.zeros_like(dense, dtype=torch.bool)
        listed[target.rows, target.ids] = True
        spread = target.bucket / (~listed).sum(1)
        dense = torch.where(listed, dense, spread[:, None])
    loss = loss_of(target, dense.log())
    torch.testing.assert_close(loss, torch.zeros(N), rtol=0, atol=3e-5)
    other = torch.log_softmax(teacher().flip(0), -1)
    labelled = torch.zeros(N, dtype=torch.bool).index_fill_(0, target.rows, True)
    assert bool((loss_of(target, other)[labelled] > 0).all())


def test_drawn_labels_lose_nothing_in_the_mean():
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2)).expand(4000, -1) * 2
    log_probs = torch.log_softmax(logits, -1)
    for codec in (ThresholdCodec(), SampledCodec(n=50)):
        loss = loss_of(decode(round_trip(logits, codec)), log_probs)
        assert abs(float(loss.mean())) < 5 * float(loss.std()) / math.sqrt(4000) + 1e-4


def test_uniform_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log().repeat(N, 1)
    codec = TopKCodec(k=2, values="float32")
    target = decode(round_trip(logits, codec), 1.0, "uniform")
    expected = [0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3]
    assert densify(target, 5)[0].tolist() == pytest.approx(expected, abs=1e-3)
    entropy = -sum(p * math.log(p) for p in expected)
    assert float(target.constant[0]) == pytest.approx(-entropy, abs=1e-3)
    bucket = decode(round_trip(logits, codec), 1.0, "bucket")
    assert float(bucket.bucket[0]) == pytest.approx(0.2, abs=1e-3)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert float(bucket.constant[0]) == pytest.approx(-entropy, abs=1e-3)


@pytest.mark.parametrize("tail", ["uniform", "bucket", "renormalise"])
def test_nothing_is_left_out(tail):
    """Every id kept, by a codec that has a tail."""
    logits = teacher()
    target = decode(round_trip(logits, TopKCodec(k=V, values="float32")), 2.0, tail)
    torch.testing.assert_close(densify(target, V), torch.softmax(logits / 2, -1))
    assert bool(torch.isfinite(target.constant).all())


def test_a_position_without_exact_entries():
    logits = torch.zeros(N, V)
    coded = round_trip(logits, ThresholdCodec())
    assert coded.num_exact.sum() == 0
    target = decode(coded, 2.0)
    torch.testing.assert_close(densify(target, V), torch.full((N, V), 1 / V), rtol=1e-3, atol=0)
    target = decode(coded, 2.0, "renormalise")
    assert len(target.rows) == 0
    assert target.constant.tolist() == [0.0] * N


@pytest.mark.parametrize("values", ["uint8", "float16", "float32"])
def test_masked_ids_of_full(values):
    logits = teacher()
    logits[:, 7] = -torch.inf
    target = decode(round_trip(logits, FullCodec(values=values)), 2.0)
    assert bool(torch.isfinite(target.constant).all())
    # The largest code means e^-25, which is not quite nothing at temperature 2.
    assert float(densify(target, V)[:, 7].max()) < 1e-4


@pytest.mark.parametrize(
    ("codec", "temperature", "tail", "message"),
    [
        pytest.param(SampledCodec(n=5), 2.0, "auto", "serve temperature 1 only", id="sampled-T"),
        pytest.param(SampledCodec(n=5), 1.0, "uniform", "no exact entries", id="sampled-uniform"),
        pytest.param(SampledCodec(n=5), 2.0, "bucket", "no exact entries", id="sampled-bucket"),
        pytest.param(ThresholdCodec(), 2.0, "sampled", "temperature 1 only", id="threshold-T"),
        pytest.param(
            ThresholdCodec(temperatures=(1, 2, 5)),
            3.0,
            "sampled",
            "temperature 1, 2, 5 only",
            id="threshold-set-T",
        ),
        pytest.param(ThresholdCodec(), 0.4, "auto", "serves none below", id="threshold-cold"),
        pytest.param(TopKCodec(k=3), 1.0, "sampled", "draws no entries", id="topk-sampled"),
        pytest.param(TopKCodec(k=3), 0.1, "bucket", "serves none below", id="topk-cold"),
        pytest.param(FullCodec(), 1.0, "sampled", "draws no entries", id="full-sampled"),
    ],
)
def test_refused(codec, temperature, tail, message):
    with pytest.raises(RecipeError, match=message) as error:
        decode(round_trip(teacher(), codec), temperature, tail)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("codec", "temperature", "expected"),
    [
        (ThresholdCodec(), 1.0, "sampled"),
        (ThresholdCodec(), 2.0, "uniform"),
        (ThresholdCodec(temperatures=(1, 2)), 2.0, "sampled"),
        (ThresholdCodec(temperatures=(1, 2)), 3.0, "uniform"),
        (ThresholdCodec(temperatures=(2,)), 1.0, "uniform"),
        (SampledCodec(n=5), 1.0, "sampled"),
        (TopKCodec(k=3), 1.0, "uniform"),
        (FullCodec(), 0.1, "uniform"),
    ],
)
def test_what_auto_means(codec, temperature, expected):
    assert resolve_tail(codec, TEMPERATURES, temperature, "auto") == expected


def test_moves_between_devices():
    coded = round_trip(teacher(), SampledCodec(n=5)).to("cpu", non_blocking=True)
    assert coded.num_exact is None
    assert coded.drawn_id.dtype == torch.uint16
