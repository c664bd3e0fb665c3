"""Joined columns against a loop over single samples."""

import numpy as np
import pytest

from kdcache.errors import IntegrityError
from kdcache.formats.joined import JoinedColumns
from kdcache.formats.ragged import Ragged, offsets_of

COLUMNS = {"wide": ("u2", "u1", "f4"), "narrow": ("u1",), "exact": ("f2", "i8")}


def made(draw, samples: int, longest: int = 9) -> dict[str, Ragged]:
    """Columns of one file; some samples have no records, the arrays begin before the first."""
    columns = {}
    for name, dtypes in COLUMNS.items():
        offsets = offsets_of(draw.integers(0, longest + 1, samples)) + int(draw.integers(3))
        number = int(offsets[-1]) + 2
        fields = {
            f"{dtype}_{i}": draw.integers(0, 256, number * np.dtype(dtype).itemsize, dtype=np.uint8)
            .view(dtype)
            .copy()
            for i, dtype in enumerate(dtypes)
        }
        columns[name] = Ragged(offsets.astype(np.int32), fields)
    return columns


def one_by_one(files, rows) -> list[dict[str, dict[str, bytes]]]:
    """What each row has, found by counting through the files."""
    found = []
    for row in rows:
        file, inner = next(
            (file, row - start)
            for file, start in zip(files, np.cumsum([0, *map(samples_of, files)]), strict=False)
            if start <= row < start + samples_of(file)
        )
        sample = {}
        for name, column in file.items():
            a, b = int(column.offsets[inner]), int(column.offsets[inner + 1])
            sample[name] = {field: array[a:b].tobytes() for field, array in column.fields.items()}
        found.append(sample)
    return found


def samples_of(file) -> int:
    return len(file["wide"])


@pytest.mark.parametrize("sizes", [[1], [7], [5, 0, 1, 12], [40, 3]], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_take(sizes, seed):
    draw = np.random.default_rng(seed)
    files = [made(draw, size) for size in sizes]
    joined = JoinedColumns(files)
    for number in (0, 1, 30):
        rows = draw.integers(0, sum(sizes), number)  # with repeats
        taken = joined.take(rows)
        assert list(taken) == list(COLUMNS)
        for name, column in taken.items():
            assert column.offsets.dtype == np.int64
            assert len(column) == number
            for field, array in column.fields.items():
                assert array.dtype == files[0][name].fields[field].dtype
                assert len(array) == column.offsets[-1]
                assert array.flags.writeable
                assert array.flags.aligned
        for place, sample in enumerate(one_by_one(files, rows.tolist())):
            for name, fields in sample.items():
                a, b = taken[name].offsets[place : place + 2].tolist()
                for field, wanted in fields.items():
                    assert taken[name].fields[field][a:b].tobytes() == wanted


def test_samples_without_records():
    files = [made(np.random.default_rng(0), 4, longest=0)]
    for column in JoinedColumns(files).take(np.arange(4)).values():
        assert column.offsets.tolist() == [0] * 5
        assert all(len(array) == 0 for array in column.fields.values())


def test_what_is_taken_is_a_copy():
    files = [made(np.random.default_rng(1), 6)]
    joined = JoinedColumns(files)
    first = joined.take(np.arange(6))["wide"].fields["u2_0"]
    before = first.copy()
    files[0]["wide"].fields["u2_0"][:] ^= 0xFFFF
    assert np.array_equal(first, before)
    assert np.array_equal(joined.take(np.arange(6))["wide"].fields["u2_0"], before ^ 0xFFFF)


@pytest.mark.parametrize("files", [[], [{}, {}]], ids=["no files", "no columns"])
def test_nothing_to_take(files):
    assert JoinedColumns(files).take(np.arange(0)) == {}


def test_a_sample_that_is_not_there():
    joined = JoinedColumns([made(np.random.default_rng(2), 3), made(np.random.default_rng(3), 2)])
    with pytest.raises(IndexError):
        joined.take(np.array([5]))


@pytest.mark.parametrize("offsets", [[0, 2, 9], [-1, 2, 3], [0, 3, 2]], ids=str)
def test_offsets_that_point_elsewhere_are_refused_before_anything_is_copied(offsets):
    column = Ragged(np.array(offsets), {"id": np.arange(3)})
    with pytest.raises(IntegrityError, match=r"'ids': offsets run from .* over 3 values"):
        JoinedColumns([{"ids": column}])
