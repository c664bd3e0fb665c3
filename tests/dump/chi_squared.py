"""Chi-squared tests without scipy."""

import math

import numpy as np


def normal_score(chi2: float, freedom: int) -> float:
    """Standard normal score of a chi-squared value (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return ((chi2 / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def assert_counts(counts, expected, freedom: int | None = None) -> None:
    """Counts are those of the expected shares: neither too far (p < 3e-5) nor too near."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    expected = expected / expected.sum() * counts.sum()
    assert expected.min() > 5, "too few for the test to mean anything"
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    score = normal_score(chi2, freedom or len(counts) - 1)
    assert abs(score) < 4, f"chi-squared {chi2:.1f}, score {score:.1f}\n{counts}\n{expected}"


def assert_same_counts(a, b) -> None:
    """Two samples of counts are of one distribution; rare cells are put together."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    common = (a + b) >= 20
    a = np.append(a[common], a[~common].sum())
    b = np.append(b[common], b[~common].sum())
    if a[-1] + b[-1] < 20:
        a, b = a[:-1], b[:-1]
    scale = math.sqrt(b.sum() / a.sum())
    chi2 = float(((scale * a - b / scale) ** 2 / (a + b)).sum())
    score = normal_score(chi2, len(a) - 1)
    assert abs(score) < 4, f"chi-squared {chi2:.1f}, score {score:.1f}\n{a}\n{b}"


def assert_independent(table) -> None:
    """Rows and columns of a table of counts are independent."""
    table = np.asarray(table, float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert expected.min() > 5, "too few for the test to mean anything"
    chi2 = float(((table - expected) ** 2 / expected).sum())
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    assert normal_score(chi2, freedom) < 4, f"chi-squared {chi2:.1f}\n{table}\n{expected}"
