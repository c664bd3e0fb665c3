"""The wide form of columns: by numpy, by compiled code, and by a loop over single records."""

import gc
import subprocess
from itertools import pairwise

import numpy as np
import pytest

from kdcache.formats import joined, native, rows
from kdcache.formats.buffers import KEPT_BYTES, STEP_BYTES, Buffers
from kdcache.formats.joined import JoinedColumns
from kdcache.formats.ragged import Ragged, offsets_of

KNOTS = [f"tail_{i}" for i in range(5)]
#: Columns of every kind of signal; those of one field twice, by the widths it is stored in.
COLUMNS = {
    "one knot, short counts": {
        "tokens": {"num_exact": "u1", "num_drawn": "u2", "gold": "u1", "entropy": "u1"}
        | dict.fromkeys(KNOTS[:1], "f2"),
        "exact": {"id": "u2", "code": "u1"},
        "drawn": {"id": "u2", "code": "u1"},
    },
    "four knots, large vocabulary": {
        "tokens": {"num_exact": "u4", "num_drawn": "u1", "gold": "u1", "entropy": "u1"}
        | dict.fromkeys(KNOTS[:4], "f2"),
        "exact": {"id": "u2", "id_high": "u1", "code": "f2"},
        "drawn": {"id": "u2", "id_high": "u1"},
    },
    "five knots, values in full": {
        "tokens": {"num_drawn": "u4", "gold": "u1"} | dict.fromkeys(KNOTS, "f2"),
        "exact": {"code": "f4"},
        "drawn": {"id": "u2", "code": "u4"},
    },
    "streams": {
        "src": {"id": "u2", "segment": "u1"},
        "tgt": {"id": "u2", "id_high": "u1", "loss": "u1"},
    },
    "masks": {
        "replicas": {"num_masked": "u2"},
        "masked": {"position": "u2", "id": "u2", "id_high": "u1"},
    },
    "beams": {
        "hypotheses": {"num_tokens": "u2", "log_prob": "f4", "score": "f4"},
        "tokens": {"id": "u2"},
    },
    "classes": {"scores": {"value": "f2"}},
}
COUNTS = ("num_exact", "num_drawn", "num_masked", "num_tokens", "position")


def made(draw, columns, samples: int, longest: int) -> dict[str, Ragged]:
    """One file of random bytes; some samples have no records."""
    found = {}
    for name, stored in columns.items():
        offsets = offsets_of(draw.integers(0, longest + 1, samples)) + int(draw.integers(3))
        number = int(offsets[-1])
        fields = {
            field: np.frombuffer(draw.bytes(number * np.dtype(dtype).itemsize), dtype=dtype)
            for field, dtype in stored.items()
        }
        found[name] = Ragged(offsets.astype(np.int32), fields)
    return found


def record_by_record(files, name, stored, rows) -> dict[str, np.ndarray]:
    """The wide form of a column, one record after another."""
    where = [(file, m) for file in files for m in range(len(file[name]))]
    found: dict[str, list] = {}
    for file, m in (where[row] for row in rows):
        column = file[name]
        for record in range(int(column.offsets[m]), int(column.offsets[m + 1])):
            values = {field: array[record] for field, array in column.fields.items()}
            if "id_high" in values:
                values["id"] = int(values.pop("id_high")) * 65536 + int(values["id"])
            knots = [values.pop(knot) for knot in KNOTS if knot in values]
            if knots:
                values["tail"] = knots
            for field, value in values.items():
                found.setdefault(field, []).append(value)
    dtypes = {field: np.dtype(dtype) for field, dtype in stored.items() if field != "id_high"}
    dtypes |= dict.fromkeys(set(COUNTS) & set(stored), np.dtype(np.int64))
    if "id" in stored:
        in_labels = np.dtype(np.int32 if "id_high" in stored else np.uint16)
        dtypes["id"] = in_labels if name in ("exact", "drawn") else np.dtype(np.int64)
    knots = [knot for knot in KNOTS if dtypes.pop(knot, None) is not None]
    if knots:
        dtypes["tail"] = np.dtype(np.float16)
    made = {field: np.array(found.get(field, []), dtype=dtype) for field, dtype in dtypes.items()}
    if knots:
        made["tail"] = made["tail"].reshape(-1, len(knots))
    return made


@pytest.mark.parametrize("kind", COLUMNS)
def test_take_wide(copying, kind):
    columns = COLUMNS[kind]
    for seed, (sizes, longest) in enumerate([([1], 1), ([5, 0, 1, 12], 3), ([9, 30], 60)]):
        draw = np.random.default_rng(seed)
        files = [made(draw, columns, size, longest) for size in sizes]
        columns_of_all = JoinedColumns(files)
        assert (columns_of_all._wide is None) == (copying is None)
        for number in (0, 1, 50):
            asked = draw.integers(0, sum(sizes), number)  # with repeats
            taken = columns_of_all.take_wide(asked)
            assert list(taken) == list(columns)
            for name, column in taken.items():
                wanted = record_by_record(files, name, columns[name], asked.tolist())
                assert set(column.fields) == set(wanted)
                for field, array in column.fields.items():
                    assert array.dtype == wanted[field].dtype
                    assert array.shape == wanted[field].shape
                    assert array.tobytes() == wanted[field].tobytes()
                    assert array.flags.writeable
                lengths = np.concatenate([file[name].lengths for file in files])[asked]
                np.testing.assert_array_equal(column.offsets, offsets_of(lengths))
                assert column.offsets.dtype == np.int64


#: Streams by the width of their ids.
IDS = {
    "of one byte": {"id": "u1"},
    "of two": {"id": "u2", "segment": "u1"},
    "of three": {"id": "u2", "id_high": "u1", "loss": "u1"},
    "of four": {"id": "u4"},
    "of eight": {"id": "i8"},
}


@pytest.mark.parametrize("ids", IDS)
def test_take_padded(copying, ids):
    columns, pads = {"src": {"id": "u2"}, "tgt": IDS[ids]}, {"src": 0, "tgt": 7}
    for seed, (sizes, longest) in enumerate([([1], 1), ([5, 0, 1, 12], 3), ([9, 30], 60)]):
        draw = np.random.default_rng(seed)
        files = [made(draw, columns, size, longest) for size in sizes]
        if ids == "of four":  # and of those no more than there can be
            for file in files:
                file["tgt"].fields["id"] = file["tgt"].fields["id"] >> 1
        joined_files = JoinedColumns(files)
        assert (joined_files._wide is None) == (copying is None)
        for batches in ([1], [3, 0, 5], [0], [40, 2]):
            ends = np.cumsum([0, *batches])
            taken = draw.integers(0, sum(sizes), ends[-1])  # with repeats
            found = joined_files.take_padded(taken, ends, pads)
            assert list(found) == ["src", "tgt"]
            for name, stream in found.items():
                lengths = np.concatenate([file[name].lengths for file in files])[taken]
                flat = record_by_record(files, name, columns[name], taken.tolist())
                tokens = iter(flat.pop("id").tolist())
                matrices, masks, widths = [], [], []
                for start, stop in pairwise(ends.tolist()):
                    widths.append(max([1, *lengths[start:stop].tolist()]))
                    for length in lengths[start:stop].tolist():
                        spare = widths[-1] - length
                        matrices += [next(tokens) for _ in range(length)] + [pads[name]] * spare
                        masks += [True] * length + [False] * spare
                assert stream.widths == widths
                assert stream.ids.tolist() == matrices
                assert stream.mask.tolist() == masks
                assert (stream.ids.dtype, stream.mask.dtype) == (np.int64, np.bool_)
                np.testing.assert_array_equal(stream.beside.offsets, offsets_of(lengths))
                assert set(stream.beside.fields) == set(flat)
                for field, array in stream.beside.fields.items():
                    np.testing.assert_array_equal(array, flat[field])


def test_samples_that_are_not_there(copying):
    draw = np.random.default_rng(2)
    columns = JoinedColumns([made(draw, COLUMNS["streams"], size, 4) for size in (3, 2)])
    with pytest.raises(IndexError):
        columns.take_wide(np.array([0, 5]))
    with pytest.raises(IndexError):
        columns.take_padded(np.array([0, 5]), np.array([0, 2]), {"src": 0, "tgt": 0})


@pytest.mark.parametrize("width", [1, 3])
def test_rows_of_a_table(copying, width):
    draw = np.random.default_rng(3)
    table = draw.integers(-(1 << 62), 1 << 62, (50, width))
    for number in (0, 1, 200):
        asked = draw.integers(0, 50, number)
        found = rows.take_rows(table, asked)
        assert (found.dtype, found.shape) == (np.int64, (number, width))
        assert found.tolist() == [table[row].tolist() for row in asked]
    for missing in (50, -51):
        with pytest.raises(IndexError):
            rows.take_rows(table, np.array([3, missing]))


def test_sums_of_rows(copying):
    draw = np.random.default_rng(4)
    table = draw.integers(0, 1 << 31, (50, 5)).astype(np.int32)
    for batches in ([1], [3, 2, 40], [4, 0, 1]):
        asked = draw.integers(0, 50, sum(batches))
        ends = np.cumsum([0, *batches])
        found = rows.sum_rows(table, asked, ends)
        assert found.dtype == np.int64
        pairs = pairwise(ends.tolist())
        wanted = [
            [sum(table[row, u].item() for row in asked[a:b]) for u in range(5)] for a, b in pairs
        ]
        assert found.tolist() == wanted
    with pytest.raises(IndexError):
        rows.sum_rows(table, np.array([3, 50]), np.array([0, 2]))


def test_columns_that_compiled_code_does_not_know(compiled, monkeypatch):
    """Of offsets in eight bytes, or numbers of odd widths, numpy takes care."""
    monkeypatch.setattr(joined, "library", lambda: compiled)
    file = {"src": Ragged(np.array([0, 2, 3]), {"id": np.array([7, 8, 9], dtype=np.uint16)})}
    assert JoinedColumns([file])._wide is None
    odd = Ragged(np.array([0, 2, 3], dtype=np.int32), {"num_exact": np.ones(3, dtype=np.float16)})
    columns = JoinedColumns([{"tokens": odd, "src": Ragged(odd.offsets, file["src"].fields)}])
    found = columns.take_wide(np.array([1, 0]))
    assert found["src"].fields["id"].tolist() == [9, 7, 8]
    assert found["tokens"].fields["num_exact"].tolist() == [1, 1, 1]


def test_memory_is_used_again_when_no_view_is_left():
    buffers = Buffers()
    whole = buffers.empty(3 * STEP_BYTES)
    place = whole.ctypes.data
    view = whole[10:20].view(np.int16)[1:]
    view[:] = 7
    del whole
    gc.collect()
    other = buffers.empty(3 * STEP_BYTES)
    other[:] = 0
    assert view.tolist() == [7] * 4
    assert other.ctypes.data != place
    del view
    gc.collect()
    assert buffers.empty(2 * STEP_BYTES).ctypes.data == place
    assert buffers.empty(2 * STEP_BYTES).ctypes.data == place
    assert len(buffers.empty(KEPT_BYTES)) == KEPT_BYTES  # dropped at once: never twice the need
    gc.collect()
    assert sum(one.nbytes for one in buffers._free) <= KEPT_BYTES
    assert len(buffers.empty(0)) == 0
    del other
    gc.collect()
    table = buffers.array((STEP_BYTES // 8, 3), np.int32)
    assert (table.shape, table.dtype) == ((STEP_BYTES // 8, 3), np.int32)
    assert table.ctypes.data == place
    assert buffers.array((0, 3), np.int64).shape == (0, 3)


def test_nothing_is_compiled_where_nothing_can(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -c")
    with pytest.raises(native.NotBuilt, match="no-such-compiler"):
        native.build(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert native.load(native.library_path(tmp_path)) is None
    native.library_path(tmp_path).write_bytes(b"of another machine")
    assert native.load(native.library_path(tmp_path)) is None


def test_the_library_can_be_left_out(compiled, monkeypatch):
    monkeypatch.setattr(native, "load", lambda path: compiled)
    native.library.cache_clear()
    try:
        assert native.library() is compiled
        native.library.cache_clear()
        monkeypatch.setenv(native.OFF, "1")
        assert native.library() is None
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_named_with_its_words(tmp_path, monkeypatch):
    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="no room\n")

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native.subprocess, "run", fail)
    with pytest.raises(native.NotBuilt, match=r"^cc: no room; gcc: no room; clang: no room$"):
        native.build(tmp_path)
