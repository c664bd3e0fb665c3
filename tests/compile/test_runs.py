"""Runs of samples are gathered as single samples are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.compile.runs import gather_runs, run_starts
from kdcache.formats.ragged import Ragged, offsets_of


def column(seed: int, num_samples: int) -> Ragged:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 4, num_samples)
    total = int(lengths.sum())
    fields = {"id": draw.integers(0, 99, total), "row": draw.normal(size=(total, 2))}
    return Ragged(offsets_of(lengths).astype(np.int32), fields)


COLUMNS = [column(seed, 30) for seed in range(3)]
runs = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 29), st.integers(1, 30)), min_size=1, max_size=4
)


@given(runs)
def test_runs_are_samples_one_after_another(chosen):
    source, rows = [], []
    for which, start, length in chosen:
        stop = min(30, start + length)
        source += [which] * (stop - start)
        rows += range(start, stop)
    found = gather_runs(COLUMNS, np.array(source), np.array(rows))
    expected: dict[str, list] = {"id": [], "row": []}
    lengths = []
    for which, row in zip(source, rows, strict=True):
        a, b = COLUMNS[which].offsets[row : row + 2]
        lengths.append(b - a)
        for name, values in COLUMNS[which].fields.items():
            expected[name] += values[a:b].tolist()
    assert found.offsets.tolist() == offsets_of(np.array(lengths)).tolist()
    assert {name: values.tolist() for name, values in found.fields.items()} == expected


@pytest.mark.parametrize(
    ("source", "rows", "starts"),
    [
        ([], [], []),
        ([0], [5], [0]),
        ([0, 0, 0], [5, 6, 7], [0]),
        ([0, 1, 1], [5, 6, 7], [0, 1]),
        ([0, 0, 0], [5, 7, 6], [0, 1, 2]),
        ([0, 0, 0], [5, 5, 6], [0, 1]),
    ],
)
def test_where_runs_begin(source, rows, starts):
    assert run_starts(np.array(source), np.array(rows)).tolist() == starts


def test_one_run_is_not_copied():
    found = gather_runs(COLUMNS, np.zeros(20, np.int64), np.arange(5, 25))
    assert np.shares_memory(found.fields["id"], COLUMNS[0].fields["id"])
