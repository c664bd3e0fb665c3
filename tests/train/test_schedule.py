"""Learning rates by hand."""

import pytest

from kdcache.recipe import ScheduleSection
from kdcache.train.losses.schedule import learning_rate


@pytest.mark.parametrize(
    ("name", "warmup", "ratio", "expected"),
    [
        ("constant", 0, 0.0, [8, 8, 8, 8, 8]),
        ("constant", 4, 0.0, [2, 8, 8, 8, 8]),
        ("inverse_sqrt", 4, 0.0, [2, 8, 4, 2, 4 / 3]),
        ("inverse_sqrt", 0, 0.0, [8, 4, 2, 1, 2 / 3]),
        ("cosine", 4, 0.0, [2, 8, 8 * 0.9045084971874737, 8 * 0.3454915028125263, 0]),
        ("cosine", 0, 0.5, [None, None, None, None, 4]),
    ],
)
def test_rates_at_steps(name, warmup, ratio, expected):
    section = ScheduleSection(name=name, warmup_steps=warmup, final_ratio=ratio)
    total = 144 if warmup == 0 or name != "cosine" else 64
    steps = [1, 4, 16, 64, 144] if name != "cosine" or warmup == 0 else [1, 4, 16, 40, 64]
    found = [learning_rate(section, 8.0, step, total) for step in steps]
    for step, rate, wanted in zip(steps, found, expected, strict=True):
        if wanted is not None:
            assert rate == pytest.approx(wanted), step


def test_a_run_of_warm_up_alone_and_one_past_its_end():
    section = ScheduleSection(name="cosine", warmup_steps=10, final_ratio=0.1)
    assert learning_rate(section, 1.0, 5, 10) == 0.5
    assert learning_rate(section, 1.0, 11, 10) == pytest.approx(0.1)
