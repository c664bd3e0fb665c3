import math

import numpy as np
import pytest

from kdcache.formats.codec import FullCodec, ThresholdCodec, TopKCodec
from kdcache.formats.codes import (
    code_log_probs,
    entropy_nats,
    exact_log_probs,
    gold_codes,
    gold_log_probs,
)


@pytest.mark.parametrize(
    ("codec", "code", "log_prob"),
    [
        pytest.param(ThresholdCodec(c=1 / 16), 0, 0.0, id="certain"),
        pytest.param(ThresholdCodec(c=1 / 16), 255, -math.log(16), id="threshold"),
        pytest.param(ThresholdCodec(c=1 / 16), 51, -math.log(16) / 25, id="a fifth"),
        pytest.param(TopKCodec(k=3), 255, -25.0, id="wide range"),
        pytest.param(FullCodec(), 102, -4.0, id="two fifths"),
    ],
)
def test_exact_codes_by_hand(codec, code, log_prob):
    found = exact_log_probs(codec, np.array([code], dtype=np.uint8))
    assert found.dtype == np.float32
    assert found[0] == pytest.approx(log_prob, rel=1e-6)


@pytest.mark.parametrize("values", ["float16", "float32"])
def test_float_codes_are_the_log_probs(values):
    codes = np.array([0.0, -1.5, -20.0], dtype=values)
    assert exact_log_probs(TopKCodec(k=3, values=values), codes).tolist() == [0.0, -1.5, -20.0]


def test_gold_rounds_to_the_nearest_code():
    assert gold_codes(gold_log_probs(np.arange(256, dtype=np.uint8))).tolist() == list(range(256))
    assert gold_codes(np.array([0.0, -1.0, -25.0, -99.0, -np.inf])).tolist() == [
        0,
        51,
        255,
        255,
        255,
    ]


def test_entropy_is_linear_up_to_its_largest_value():
    found = entropy_nats(np.array([0, 51, 255], dtype=np.uint8), 1000)
    assert found == pytest.approx([0, math.log(1000) / 5, math.log(1000)], rel=1e-6)


def test_codes_descend():
    assert (np.diff(code_log_probs(2.0)) < 0).all()
