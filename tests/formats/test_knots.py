import numpy as np
import pytest

from kdcache.errors import RecipeError
from kdcache.formats.knots import interpolation_weights

STORED = [0.5, 1.0, 2.0, 5.0]


@pytest.mark.parametrize("index", range(4))
def test_a_stored_temperature_is_itself(index):
    weights = interpolation_weights(STORED, STORED[index])
    assert weights.tolist() == np.eye(5)[index + 1].tolist()


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.0, 1.3, 3.0, 10.0, 1e6])
@pytest.mark.parametrize("stored", [[1.0], [0.5, 1.0], [1.0, 4.0], STORED])
def test_straight_lines_are_exact(stored, temperature):
    if temperature < stored[0]:
        pytest.skip("not served")
    betas = np.array([0, *(1 / t for t in stored)])
    weights = interpolation_weights(stored, temperature)
    assert weights.sum() == pytest.approx(1)
    assert weights @ (3 - 2 * betas) == pytest.approx(3 - 2 / temperature)


def test_one_knot_by_hand():
    assert interpolation_weights([1.0], 4.0).tolist() == [0.75, 0.25]


def test_log_sum_exp_of_a_zipf_tail():
    log_probs = -1.2 * np.log(np.arange(20, 8000))
    log_probs += np.log(0.3) - np.log(np.exp(log_probs).sum())

    def f(temperature):
        return np.log(np.exp(log_probs / temperature).sum())

    knots = np.array([np.log(len(log_probs)), *(f(t) for t in STORED)])
    for temperature in np.geomspace(0.5, 100, 40):
        found = interpolation_weights(STORED, temperature) @ knots
        assert found == pytest.approx(f(temperature), abs=0.1)


@pytest.mark.parametrize("temperature", [0.49, 0.0, -1.0, float("nan")])
def test_below_the_smallest_is_refused(temperature):
    with pytest.raises(RecipeError, match=r"temperature .*stores the tail at .*0\.5, 1, 2, 5"):
        interpolation_weights(STORED, temperature)


def test_nothing_stored_is_refused():
    with pytest.raises(RecipeError, match="none"):
        interpolation_weights([], 1.0)
