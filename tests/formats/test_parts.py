"""Parts: how large their records may be, so that no part is above its limit."""

import numpy as np
import pytest

from kdcache.formats import parts
from kdcache.formats.dense import dense_arrays
from kdcache.formats.parts import part_row_bytes
from kdcache.formats.plan import plan_parts
from kdcache.formats.signals import HiddenRecord
from kdcache.formats.zarr_layout import group_files


def record_of(layers: int, width: int, values: str) -> HiddenRecord:
    return HiddenRecord.model_construct(layers=tuple(range(layers)), width=width, values=values)


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize(("layers", "width"), [(1, 1), (3, 24), (2, 160)])
def test_a_part_with_its_last_chunk_filled_up_is_within_the_limit(
    layers, width, values, monkeypatch
):
    limit = 1 << 20
    monkeypatch.setattr(parts, "PART_BYTES", limit)
    record = record_of(layers, width, values)
    lengths = np.full(60000, 17)
    start, stop = plan_parts(lengths, part_row_bytes(record), limit)[0]
    assert stop < 60000
    rows = int(lengths[start:stop].sum())
    arrays = {
        name: np.zeros(shape, dtype) for name, (shape, dtype) in dense_arrays(record, rows).items()
    }
    size = sum(len(piece) for _, pieces in group_files(arrays) for piece in pieces)
    assert size <= limit
    # A row of a byte or two is rounded up to whole ones, and every sample has an offset.
    assert size > (0.3 if width == 1 else 0.6) * limit


def test_a_chunk_above_the_limit_is_filled(monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 20)
    wide = record_of(4, 600, "float16")  # 2.3 MiB in a chunk of every layer
    plan = plan_parts(np.ones(2000, dtype=np.int64), part_row_bytes(wide), 1 << 20)
    rows = [stop - start for start, stop in plan]
    assert max(rows) <= 512
    assert rows[0] > 500
