"""Selection for a set of temperatures, against a brute force in Python's own integers."""

import math

import numpy as np
import pytest
import torch
import xxhash

from kdcache.dump.codecs.select import encode_logits
from kdcache.formats.codec import ThresholdCodec
from kdcache.formats.codes import code_log_probs
from tests.dump.test_select import TEMPERATURES, encode, hashes, per_position, teacher

SETS = [(1.0, 2.0, 5.0), (0.5, 2.0), (5.0,)]


def largest_probs(logits: torch.Tensor, temperatures) -> torch.Tensor:
    """[N, V] in the float type of the logits."""
    shifted = logits - logits.amax(-1, keepdim=True)
    every = [torch.softmax(logits if t == 1 else shifted / t, -1) for t in temperatures]
    return torch.stack(every).amax(0)


def oracle(probs: list[float], c: float, num: int, draw_hash: int) -> tuple[list, list]:
    """Exact and drawn ids by one running sum of Python integers."""
    bits = min(40, 52 + math.floor(math.log2(c / num)))
    unit = np.float32(c / 2**bits)
    fixed = [int(np.float32(p) / unit) for p in probs]
    exact = [i for i, q in enumerate(fixed) if q >> bits]
    drawn, running = [], (draw_hash % 2**64) >> (64 - bits)
    for i, q in enumerate(fixed):
        if q >> bits:
            continue
        if (running + q) >> bits > running >> bits:
            drawn.append(i)
        running += q
    return exact, drawn


@pytest.mark.parametrize("temperatures", SETS)
@pytest.mark.parametrize(("vocab_size", "c"), [(2, 0.3), (64, 1 / 16), (65, 1 / 24), (500, 1e-4)])
def test_a_set_equals_brute_force(vocab_size, c, temperatures):
    logits = teacher(40, vocab_size, seed=vocab_size)
    encoded = encode(logits, ThresholdCodec(c=c, temperatures=temperatures))
    exact = per_position(encoded.exact, encoded.num_exact, "id")
    drawn = per_position(encoded.drawn, encoded.num_drawn, "id")
    probs = largest_probs(logits, temperatures).tolist()
    for n, key in enumerate(hashes(40, "draw").tolist()):
        assert (exact[n], drawn[n]) == oracle(probs[n], c, len(temperatures), key)


@pytest.mark.parametrize("temperatures", SETS)
def test_exact_where_some_temperature_reaches_c(temperatures):
    logits = teacher(60, 300, seed=2).double()
    logits[::4, ::3] = -torch.inf
    encoded = encode(logits, ThresholdCodec(temperatures=temperatures))
    every = [torch.softmax(logits / t, -1) for t in temperatures]
    probs = torch.stack(every).amax(0)  # by another road: in float64
    exact = per_position(encoded.exact, encoded.num_exact, "id")
    drawn = per_position(encoded.drawn, encoded.num_drawn, "id")
    for n in range(60):
        assert exact[n] == (probs[n] >= 1 / 16).nonzero()[:, 0].tolist()
        turns = float(probs[n][probs[n] < 1 / 16].sum()) * 16
        assert math.floor(turns - 1e-4) <= len(drawn[n]) <= math.ceil(turns + 1e-4)
        assert bool((probs[n][drawn[n]] > 0).all())


@pytest.mark.parametrize("values", ["uint8", "float16"])
def test_drawn_entries_carry_their_log_probs(values):
    logits = torch.cat([teacher(50, 500), 12 * teacher(10, 500, seed=7)])
    codec = ThresholdCodec(temperatures=(1, 5), values=values)
    encoded = encode(logits, codec)
    log_probs = torch.log_softmax(logits.double(), -1)
    for column, counts, reach in (
        (encoded.exact, encoded.num_exact, codec.range_nats),
        (encoded.drawn, encoded.num_drawn, codec.drawn_range_nats),
    ):
        rows = torch.arange(60).repeat_interleave(counts)
        expected = log_probs[rows, column["id"]].clamp(min=-reach).numpy()
        assert len(expected) > 60
        found = column["code"].numpy()
        if values == "float16":
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
            continue
        root = np.sqrt(-code_log_probs(reach)[found])  # codes are even steps in it
        # At certainty float32 knows the root to a thousandth.
        assert np.abs(root - np.sqrt(-expected)).max() < math.sqrt(reach) / 255 + 1e-3


def test_flat_and_peaked_rows():
    logits = torch.full((3, 4000), -torch.inf)
    logits[0] = 3.0
    logits[1, 7] = 0.0
    logits[2] = -40.0
    logits[2, 7] = 40.0
    encoded = encode(logits, ThresholdCodec(temperatures=(1, 2, 5)))
    assert encoded.num_exact.tolist() == [0, 1, 1]
    assert encoded.num_drawn.tolist()[:2] == [16, 0]
    assert encoded.num_drawn[2] <= 1  # 4000 e^-16 of it, at the hottest
    assert encoded.exact["code"].tolist() == [0, 0]
    assert not encoded.tokens["tail_3"][1].isfinite()


def test_cold_temperatures_do_not_overflow():
    logits = torch.zeros(4, 100)
    logits[:, 3] = 3e38
    logits[1:, 4] = 2.9e38
    codec = ThresholdCodec(temperatures=(0.1, 1))
    encoded = encode(logits, codec, temperatures=(0.1, 1.0))
    assert encoded.exact["id"].tolist() == [3] * 4
    assert encoded.num_drawn.tolist() == [0] * 4


def test_a_set_over_more_than_65536_ids_does_not_depend_on_blocks():
    logits = teacher(6, 70_000, seed=4)
    codec = ThresholdCodec(c=1 / 32, temperatures=(1, 2, 5))
    whole, blocks = (encode(logits, codec, block_rows=rows).to_host() for rows in (6, 1))
    assert whole["drawn"]["id_high"].any()
    assert len(whole["drawn"]["code"]) == len(whole["drawn"]["id"])
    for column, fields in whole.items():
        for name, values in fields.items():
            assert blocks[column][name].tobytes() == values.tobytes(), (column, name)


@pytest.mark.parametrize("temperatures", SETS)
@pytest.mark.parametrize("c", [0.5, 1 / 3, 1 / 16])
def test_no_position_has_more_entries_than_the_schema_counts(temperatures, c):
    # Ids in steps, so that every temperature is the best one for some of them.
    levels = torch.arange(300).div(10, rounding_mode="floor")
    scales = torch.linspace(0, 6, 60)[:, None]
    logits = torch.cat([-levels * scales, teacher(60, 300)])
    codec = ThresholdCodec(c=c, temperatures=temperatures)
    encoded = encode(logits, codec)
    assert int(encoded.num_exact.max()) <= codec.max_exact(300)
    assert 1 / c - 1 <= int(encoded.num_drawn.max()) <= codec.max_drawn(300)


def test_temperature_1_alone_is_as_ever():
    """Bytes as they were before there were sets."""
    logits = teacher(12, 100, seed=20)
    logits[3, ::3] = -torch.inf
    digest = xxhash.xxh3_64()
    inputs = [logits, torch.arange(12), hashes(12, "draw"), hashes(12, "round")]
    codec = ThresholdCodec(c=1 / 12)
    assert codec == ThresholdCodec(c=1 / 12, temperatures=(1.0,))
    for fields in encode_logits(*inputs, codec, TEMPERATURES).to_host().values():
        for name, values in fields.items():
            digest.update(name.encode())
            digest.update(values.tobytes())
    assert digest.hexdigest() == "9b5cc99e0339b97f"
