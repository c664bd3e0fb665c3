"""The threshold codec for a set of temperatures: what follows for the bytes, and refusals."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from kdcache.formats.checks.structure import logits_faults
from kdcache.formats.codec import SampledCodec, ThresholdCodec, TopKCodec
from kdcache.formats.codes import code_log_probs, drawn_log_probs
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import logits_schema, max_bytes_per_token
from kdcache.formats.signals import LogitsRecord
from tests.formats.labels import teacher_record


@pytest.mark.parametrize(
    ("codec", "vocab_size", "drawn", "counts", "most"),
    [
        pytest.param(
            ThresholdCodec(temperatures=(1, 2, 5)),
            8000,
            "id:uint16 code:uint8",
            "uint8",
            10 + 49 * 3 + 49 * 3,
            id="uint8",
        ),
        pytest.param(
            ThresholdCodec(c=1 / 100, temperatures=(1, 2, 5), values="float16"),
            70_000,
            "id:uint16 id_high:uint8 code:halffloat",
            "uint16",
            12 + 301 * 5 + 301 * 5,
            id="float16",
        ),
        pytest.param(
            ThresholdCodec(temperatures=(1,)), 8000, "id:uint16", "uint8", 10 + 17 * 5, id="1"
        ),
        pytest.param(
            ThresholdCodec(temperatures=(2,)),
            20,
            "id:uint16 code:uint8",
            "uint8",
            10 + 17 * 6,
            id="2",
        ),
    ],
)
def test_schema_of_a_set(codec, vocab_size, drawn, counts, most):
    schema = logits_schema(codec, vocab_size, (1.0, 2.0, 5.0))
    found = {
        column.name: [f"{field.name}:{field.type}" for field in column.type.value_type]
        for column in schema
    }
    assert " ".join(found["drawn"]) == drawn
    assert found["tokens"][:2] == [f"num_exact:{counts}", f"num_drawn:{counts}"]
    assert max_bytes_per_token(codec, vocab_size, (1.0, 2.0, 5.0)) == most


@pytest.mark.parametrize(
    ("codec", "exact", "drawn"),
    [
        pytest.param(ThresholdCodec(c=1 / 8), math.log(8), 25, id="1"),
        pytest.param(ThresholdCodec(c=1 / 8, temperatures=(1, 2)), 2 * math.log(8), 50, id="1-2"),
        pytest.param(ThresholdCodec(c=1 / 8, temperatures=(1, 50)), 80, 80, id="very-hot"),
        pytest.param(
            ThresholdCodec(c=1 / 8, temperatures=(0.5,)),
            0.5 * math.log(8) + 12 * math.log(2),
            25,
            id="cold",
        ),
        pytest.param(SampledCodec(n=3), 25, 25, id="sampled"),
    ],
)
def test_ranges_of_codes(codec, exact, drawn):
    assert codec.range_nats == pytest.approx(exact)
    assert codec.drawn_range_nats == pytest.approx(drawn)


def test_exact_entries_lie_within_their_range():
    """Two steps of probability, that far apart that the lower still is c at one temperature."""
    for temperature in (0.5, 0.9, 1.0, 2.0, 5.0):
        codec = ThresholdCodec(c=1 / 16, temperatures=(temperature,))
        for num in (2, 1000, 1 << 24):
            gap = np.linspace(-60, 0, 2000)  # of few ids below one, or of one above many
            for few, many in ((1, 10), (1, num), (10, 1)):
                total = np.log(few + many * np.exp(gap))
                hot = np.log(few + many * np.exp(gap / temperature))
                log_prob = gap - total
                exact = gap / temperature - hot >= math.log(codec.c)
                assert (log_prob[exact] >= -codec.range_nats - 1e-9).all()


def test_what_draws_serve():
    assert ThresholdCodec().drawn_temperatures == (1.0,)
    assert not ThresholdCodec().has_drawn_log_probs
    assert ThresholdCodec(temperatures=("1/2", 2)).drawn_temperatures == (0.5, 2.0)
    assert ThresholdCodec(temperatures=(2,)).has_drawn_log_probs
    assert SampledCodec(n=3).drawn_temperatures == (1.0,)
    assert not SampledCodec(n=3).has_drawn_log_probs
    assert TopKCodec(k=3).drawn_temperatures == ()


@pytest.mark.parametrize("values", ["uint8", "float16"])
def test_drawn_codes_have_a_range_of_their_own(values):
    codec = ThresholdCodec(temperatures=(1, 2), values=values)
    codes = np.array([0, 51, 255], dtype=values)
    expected = code_log_probs(50.0)[[0, 51, 255]] if values == "uint8" else codes
    found = drawn_log_probs(codec, codes)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("temperatures", "message"),
    [
        ((2, 1), "2, 1; they must ascend"),
        ((1, 1), "1, 1; they must ascend"),
        ((), "are none; they must"),
        ((0,), "greater than or equal to 0.1"),
        ((1000,), "less than or equal to 100"),
        ((True,), "should be a number"),
    ],
)
def test_sets_that_are_refused(temperatures, message):
    with pytest.raises(ValidationError, match=message):
        ThresholdCodec(temperatures=temperatures)


def test_a_record_stores_the_tails_that_the_draws_need():
    fields = {
        "name": "logits",
        "at": "targets",
        "stream": "tgt",
        "stream_digest": "ab" * 16,
        "vocab_size": 100,
        "temperatures": [1.0, 2.0],
        "seed": 1,
        "teacher": teacher_record(),
        "recipe": {},
        "versions": {},
    }
    LogitsRecord(**fields, codec=ThresholdCodec(temperatures=(1, 2)))
    with pytest.raises(ValidationError, match=r"draws for .1.0, 5.0., not all of them"):
        LogitsRecord(**fields, codec=ThresholdCodec(temperatures=(1, 5)))


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        (-7.5, []),
        (math.nan, ["drawn.code: 1 values are no log-probs"]),
        (0.5, ["drawn.code: 1 values are no log-probs"]),
        (-math.inf, ["drawn.code: 1 values are no log-probs"]),
    ],
)
def test_drawn_codes_are_checked(code, faults):
    codec = ThresholdCodec(c=0.25, temperatures=(1, 2), values="float16")
    one = np.array([0, 1])
    token = {"num_exact": 1, "num_drawn": 1, "gold": 3, "entropy": 9}
    fields = {name: np.array([value], dtype=np.uint8) for name, value in token.items()}
    entry = {"id": np.array([3], dtype=np.uint16), "code": np.array([-0.5], dtype=np.float16)}
    drawn = {"id": np.array([5], dtype=np.uint16), "code": np.array([code], dtype=np.float16)}
    columns = {"tokens": Ragged(one, fields), "exact": Ragged(one, entry)}
    columns["drawn"] = Ragged(one, drawn)
    assert logits_faults(codec, 100, columns, np.array([1])) == faults
