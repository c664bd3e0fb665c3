"""Selection against a brute-force oracle in Python's own integers, and its statistics."""

import math

import numpy as np
import pytest
import torch

from kdcache.dump.codecs.coding import entry_hash, mix64
from kdcache.dump.codecs.select import EncodedPositions, encode_logits
from kdcache.errors import ModelError
from kdcache.formats import keyed
from kdcache.formats.codec import FullCodec, NucleusCodec, SampledCodec, ThresholdCodec, TopKCodec
from kdcache.formats.codes import code_log_probs, entropy_nats, exact_log_probs
from kdcache.formats.ragged import Ragged, offsets_of
from kdcache.formats.schema import logits_schema, ragged_batch, split_ids

TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
CODECS = [
    pytest.param(ThresholdCodec(), id="threshold"),
    pytest.param(ThresholdCodec(c=1 / 3, values="float16"), id="threshold-float16"),
    pytest.param(ThresholdCodec(temperatures=(1, 2, 5)), id="threshold-set"),
    pytest.param(
        ThresholdCodec(temperatures=(0.5, 2), values="float16"), id="threshold-set-float16"
    ),
    pytest.param(TopKCodec(k=5), id="topk"),
    pytest.param(TopKCodec(k=1000, values="float32"), id="topk-all"),
    pytest.param(NucleusCodec(p=0.9, k_max=12), id="nucleus"),
    pytest.param(SampledCodec(n=50), id="sampled"),
    pytest.param(SampledCodec(n=300), id="sampled-300"),
    pytest.param(FullCodec(), id="full"),
]


def hashes(num: int, purpose: str, seed: int = 0) -> torch.Tensor:
    keys = np.full(num, keyed.text_key(purpose, seed), dtype=np.uint64)
    return torch.from_numpy(keyed.position_hash(keys, np.arange(num)).view(np.int64))


def teacher(num: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """Logits from nearly certain to nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.1, 5, num)[:, None]
    return torch.randn(num, vocab_size, generator=generator) * sharpness


def encode(logits, codec, seed=0, block_rows=None, temperatures=TEMPERATURES) -> EncodedPositions:
    num = len(logits)
    gold = torch.arange(num) % logits.shape[1]
    draw, rounding = hashes(num, "draw", seed), hashes(num, "round", seed)
    return encode_logits(logits, gold, draw, rounding, codec, temperatures, block_rows)


def per_position(column: dict, counts: torch.Tensor, name: str) -> list[list]:
    return [piece.tolist() for piece in column[name].split(counts.tolist())]


def test_hashes_equal_numpy():
    x = np.array([0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0], dtype=np.uint64)
    found = mix64(torch.from_numpy(x.view(np.int64))).numpy().view(np.uint64)
    assert found.tolist() == keyed.mix64(x).tolist()
    ids = np.array([0, 7, 65_536, 151_935, 2**32 - 1], dtype=np.uint64)
    expected = keyed.mix64(x ^ keyed.mix64(ids))
    signed = [torch.from_numpy(part.view(np.int64)) for part in (x, ids)]
    assert entry_hash(*signed).numpy().view(np.uint64).tolist() == expected.tolist()


def threshold_oracle(probs: list[float], c: float, draw_hash: int) -> tuple[list, list]:
    """Systematic draws by one running sum of Python integers."""
    unit = float(np.float32(c / 2**40))
    fixed = [int(np.float32(np.float32(p) / np.float32(unit))) for p in probs]
    head = [i for i, q in enumerate(fixed) if q >= 2**40]
    draws, running = [], (draw_hash % 2**64) >> 24
    for i, q in enumerate(fixed):
        if i in head:
            continue
        if (running + q) >> 40 > running >> 40:
            draws.append(i)
        running += q
    return head, draws


@pytest.mark.parametrize("vocab_size", [2, 63, 64, 65, 500])
@pytest.mark.parametrize("c", [1 / 16, 1 / 24, 0.3, 0.9])
def test_threshold_equals_brute_force(vocab_size, c):
    logits = teacher(40, vocab_size, seed=vocab_size)
    encoded = encode(logits, ThresholdCodec(c=c))
    heads = per_position(encoded.exact, encoded.num_exact, "id")
    draws = per_position(encoded.drawn, encoded.num_drawn, "id")
    probs = torch.softmax(logits, -1).tolist()
    for n, key in enumerate(hashes(40, "draw").tolist()):
        assert (heads[n], draws[n]) == threshold_oracle(probs[n], c, key)
        chosen = heads[n] + draws[n]
        assert len(set(chosen)) == len(chosen)
        turns = sum(p for i, p in enumerate(probs[n]) if i not in heads[n]) / c
        assert math.floor(turns - 1e-4) <= len(draws[n]) <= math.ceil(turns + 1e-4)


def test_threshold_takes_ids_of_adversarial_rows_once():
    # Many ids just below c: a float32 running sum draws some of them twice.
    probs = torch.full((1, 16), 1 / 16 - 1e-7)
    probs[0, 0] += 16e-7
    encoded = encode(probs.log().repeat(200, 1), ThresholdCodec(c=1 / 16))
    for ids in per_position(encoded.drawn, encoded.num_drawn, "id"):
        assert len(set(ids)) == len(ids) in (14, 15)


def test_sampled_equals_brute_force():
    n, vocab_size = 20, 130
    logits = teacher(30, vocab_size, seed=3)
    encoded = encode(logits, SampledCodec(n=n))
    ids = per_position(encoded.drawn, encoded.num_drawn, "id")
    counts = per_position(encoded.drawn, encoded.num_drawn, "code")
    for row, key in enumerate(hashes(30, "draw").tolist()):
        ends = np.cumsum([int(p * 2**40) for p in torch.softmax(logits, -1)[row].tolist()])
        turn = np.arange(1, n + 1, dtype=np.uint64)
        hashed = keyed.mix64(np.uint64(key % 2**64) + turn * np.uint64(keyed.GOLDEN))
        points = [int(h) >> 24 for h in hashed]
        points = [p + ((p >> 20) * (int(ends[-1]) - 2**40) >> 20) for p in points]
        assert all(0 <= p < ends[-1] for p in points)
        expected = np.unique(np.searchsorted(ends, points, side="right"), return_counts=True)
        assert ids[row] == expected[0].tolist()
        assert counts[row] == expected[1].tolist()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("vocab_size", [200, 256])
def test_block_size_changes_no_bit(codec, vocab_size):
    logits = teacher(23, vocab_size)
    whole = encode(logits, codec, block_rows=23).to_host()
    for block_rows in (1, 4, None):
        blocks = encode(logits, codec, block_rows=block_rows).to_host()
        for column, fields in whole.items():
            for name, values in fields.items():
                assert blocks[column][name].tobytes() == values.tobytes(), (column, name)


@pytest.mark.parametrize("codec", CODECS)
def test_pieces_one_after_another_are_the_whole(codec):
    inputs = [teacher(30, 200), torch.arange(30), hashes(30, "draw"), hashes(30, "round")]
    pieces = [
        encode_logits(*(each[start : start + 10] for each in inputs), codec, TEMPERATURES)
        for start in (0, 10, 20)
    ]
    joined = EncodedPositions.concat(pieces).to_host()
    for column, fields in encode_logits(*inputs, codec, TEMPERATURES).to_host().items():
        for name, values in fields.items():
            np.testing.assert_array_equal(joined[column][name], values)


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16_logits_count_as_they_are(codec):
    logits = teacher(9, 200).to(torch.bfloat16)
    half, single = encode(logits, codec).to_host(), encode(logits.float(), codec).to_host()
    for column, fields in single.items():
        for name, values in fields.items():
            assert half[column][name].tobytes() == values.tobytes(), (column, name)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num", [0, 1, 9])
def test_host_columns_fit_the_schema(codec, num):
    encoded = encode(teacher(num, 300), codec)
    counts = {
        "tokens": np.full(1, num),
        "exact": encoded.num_exact.numpy().sum(keepdims=True),
        "drawn": encoded.num_drawn.numpy().sum(keepdims=True),
    }
    columns = {
        name: Ragged(offsets_of(counts[name]), fields) for name, fields in encoded.to_host().items()
    }
    schema = logits_schema(codec, 300, TEMPERATURES)
    batch = ragged_batch(schema, columns)
    batch.validate(full=True)
    assert (batch.num_rows, batch.schema) == (1, schema)


def test_ids_take_three_bytes_above_65536():
    logits = torch.full((1, 70_000), -20.0)
    logits[0, 69_999] = 5.0
    columns = encode(logits, TopKCodec(k=1)).to_host()
    for name, expected in split_ids(np.array([69_999]), 70_000).items():
        assert columns["exact"][name].dtype == expected.dtype
        assert columns["exact"][name].tolist() == expected.tolist()


def test_topk_and_nucleus_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15], [0.9, 0.02, 0.04, 0.03, 0.01]]).log()
    top = encode(logits, TopKCodec(k=2, values="float32"))
    assert per_position(top.exact, top.num_exact, "id") == [[1, 3], [0, 2]]
    assert top.exact["code"].exp().tolist() == pytest.approx([0.4, 0.3, 0.9, 0.04])
    nucleus = encode(logits, NucleusCodec(p=0.8, k_max=4))
    assert per_position(nucleus.exact, nucleus.num_exact, "id") == [[1, 3, 4], [0]]
    nucleus = encode(logits, NucleusCodec(p=0.8, k_max=2))
    assert per_position(nucleus.exact, nucleus.num_exact, "id") == [[1, 3], [0]]


@pytest.mark.parametrize("codec", CODECS)
def test_gold_entropy_and_tail(codec):
    logits = teacher(60, 777).to(torch.float64)
    log_probs = torch.log_softmax(logits, -1)
    encoded = encode(logits, codec)
    gold = code_log_probs(25.0)[encoded.tokens["gold"].numpy()]
    expected = log_probs[torch.arange(60), torch.arange(60)].clamp(min=-25).numpy()
    assert np.abs(np.sqrt(-gold) - np.sqrt(-expected)).max() < 5 / 255 / 2 + 1e-5
    entropy = -(log_probs.exp() * log_probs).sum(-1).numpy()
    found = entropy_nats(encoded.tokens["entropy"].numpy(), 777)
    assert np.abs(found - entropy).max() < math.log(777) / 255 + 1e-5
    if not codec.has_tail:
        assert "tail_0" not in encoded.tokens
        return
    rows = torch.arange(60).repeat_interleave(encoded.num_exact)
    log_probs[rows, encoded.exact["id"]] = -torch.inf
    for i, temperature in enumerate(TEMPERATURES):
        found = encoded.tokens[f"tail_{i}"].to(torch.float64)
        expected = torch.logsumexp(log_probs / temperature, -1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_tails_far_below_float32():
    logits = torch.tensor([[0.0, -60.0, -61.0], [300.0, -300.0, -300.0], [0.0, 0.0, 0.0]])
    encoded = encode(logits, ThresholdCodec(c=0.3), temperatures=(0.5, 1.0, 2.0))
    log_tail = math.log1p(math.exp(-1))
    assert encoded.num_exact.tolist() == [1, 1, 3]
    assert encoded.tokens["tail_1"].tolist() == pytest.approx(
        [-60 + log_tail, -600 + math.log(2), -math.inf], rel=1e-3
    )
    assert encoded.tokens["tail_0"].tolist() == pytest.approx(
        [-120 + math.log1p(math.exp(-2)), -1200 + math.log(2), -math.inf], rel=1e-3
    )


@pytest.mark.parametrize("codec", CODECS)
def test_masked_ids_are_never_drawn(codec):
    logits = teacher(50, 300)
    logits[:, ::3] = -torch.inf
    encoded = encode(logits, codec)
    assert bool(torch.isfinite(entropy_of(encoded)).all())
    if encoded.drawn is not None:
        assert bool((encoded.drawn["id"] % 3 != 0).all())
    if codec.name in ("threshold", "nucleus"):
        assert bool((encoded.exact["id"] % 3 != 0).all())
    if codec.name == "full":
        assert (encoded.exact["code"].view(50, 300)[:, ::3] == 255).all()


def entropy_of(encoded: EncodedPositions) -> torch.Tensor:
    return encoded.tokens["entropy"].to(torch.float32)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_logits_that_are_not_finite_are_refused(codec, bad):
    logits = teacher(9, 100)
    logits[7, 42] = bad
    with pytest.raises(ModelError, match="position 7 of the batch") as error:
        encode(logits, codec, block_rows=4)
    assert "\n" not in str(error.value)


def test_a_position_without_any_id_is_refused():
    logits = torch.full((2, 10), -torch.inf)
    with pytest.raises(ModelError, match="position 0"):
        encode(logits, TopKCodec(k=1))


# ---- statistics: every position repeated for many seeds, as rows of one call

SEEDS, POSITIONS, VOCAB, PROJECTIONS = 4096, 50, 200, 16


def repeated_labels(codec, logits: torch.Tensor, draw, rounding) -> torch.Tensor:
    """[SEEDS, V] float32 decoded labels of one position."""
    rows = logits.expand(SEEDS, -1)
    gold = torch.zeros(SEEDS, dtype=torch.int64)
    encoded = encode_logits(rows, gold, draw, rounding, codec, TEMPERATURES)
    labels = torch.zeros(SEEDS, logits.shape[-1])
    each = torch.arange(SEEDS)
    if encoded.exact is not None:
        log_probs = exact_log_probs(codec, encoded.exact["code"].numpy())
        at = each.repeat_interleave(encoded.num_exact)
        labels[at, encoded.exact["id"]] = torch.from_numpy(np.exp(log_probs))
    counts = encoded.drawn.get("code", torch.ones(1))
    at = each.repeat_interleave(encoded.num_drawn)
    labels[at, encoded.drawn["id"]] += counts * codec.drawn_weight
    return labels


def rounding_variance(probs: np.ndarray, codec) -> float:
    """Sum over the head of (upper - t)(t - lower), the neighbours being codes."""
    head = probs[probs >= codec.c]
    table = np.exp(code_log_probs(codec.range_nats))[::-1]
    above = np.clip(np.searchsorted(table, head, side="right"), 1, 255)
    return float(((table[above] - head) * (head - table[above - 1])).sum())


@pytest.mark.parametrize(
    "codec", [ThresholdCodec(c=1 / 16), ThresholdCodec(c=1 / 8), SampledCodec(n=50)]
)
def test_labels_are_unbiased_with_the_least_variance(codec):
    logits = teacher(POSITIONS, VOCAB, seed=11)
    generator = torch.Generator().manual_seed(5)
    projections = torch.randn(VOCAB, PROJECTIONS, generator=generator, dtype=torch.float64)
    # Two-sided normal quantile at 1e-3 over all comparisons (0.5e-3 / 800 beyond it).
    bound = 4.97
    squared, expected_squared = 0.0, 0.0
    for n in range(POSITIONS):
        key = np.arange(SEEDS)
        seeds = [
            torch.from_numpy(
                keyed.position_hash(
                    keyed.mix64(key.astype(np.uint64) ^ np.uint64(keyed.text_key(purpose))),
                    np.full(SEEDS, n),
                ).view(np.int64)
            )
            for purpose in ("draw", "round")
        ]
        labels = repeated_labels(codec, logits[n : n + 1], *seeds).to(torch.float64)
        probs = torch.softmax(logits[n].to(torch.float64), -1)
        error = (labels - probs) @ projections  # [SEEDS, PROJECTIONS]
        deviation = error.std(dim=0) / math.sqrt(SEEDS)
        assert bool((error.mean(dim=0).abs() <= bound * deviation + 1e-6).all()), n
        squared += float((labels - probs).square().sum(dim=1).mean())
        t = probs.numpy()
        if codec.name == "threshold":
            tail = t[t < codec.c]
            expected_squared += float((tail * (codec.c - tail)).sum()) + rounding_variance(t, codec)
        else:
            expected_squared += (1 - float((t**2).sum())) / codec.n
    assert squared == pytest.approx(expected_squared, rel=0.05)
