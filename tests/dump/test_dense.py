from types import SimpleNamespace

import numpy as np
import pytest

from kdcache.dump.signals import dense
from kdcache.dump.signals.dense import chosen_layers
from kdcache.dump.signals.hidden import HiddenEncoder
from kdcache.errors import ModelError, RecipeError
from kdcache.formats.dense import dense_arrays
from kdcache.formats.plan import plan_parts
from kdcache.formats.signals import HiddenRecord
from kdcache.formats.zarr_layout import group_files

LAYERS = {
    "all": ("all", range(4), (0, 1, 2, 3)),
    "all of attention": ("all", range(1, 4), (1, 2, 3)),
    "ascending": ([3, 1], range(4), (1, 3)),
    "from the end": ([-1, -4], range(4), (0, 3)),
    "from the end of attention": ([-1, -3], range(1, 4), (1, 3)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_by_hand(case):
    layers, known, expected = LAYERS[case]
    assert chosen_layers("h", layers, known, "the encoder of bert") == expected


@pytest.mark.parametrize(
    ("layers", "known", "error", "message"),
    [
        ([4], range(4), ModelError, "signals.h.layers has 4; the encoder of bert has 3 layers, so "
         "expected 0 to 3, or -4 to -1"),
        ([1, -5], range(4), ModelError, "signals.h.layers has -5; the encoder of bert has 3 "
         "layers, so expected 0 to 3, or -4 to -1"),
        ([0], range(1, 4), ModelError, "signals.h.layers has 0; the encoder of bert has 3 layers, "
         "so expected 1 to 3, or -3 to -1"),
        ([-4], range(1, 4), ModelError, "signals.h.layers has -4; the encoder of bert has 3 "
         "layers, so expected 1 to 3, or -3 to -1"),
        ([2, -2], range(4), RecipeError, "signals.h.layers is [2, -2], which names a layer twice; "
         "of the encoder of bert these are [2, 2]"),
    ],
)  # fmt: skip
def test_layers_that_are_not(layers, known, error, message):
    with pytest.raises(error) as caught:
        chosen_layers("h", layers, known, "the encoder of bert")
    assert str(caught.value) == message


def encoder_of(layers: int, width: int, values: str) -> HiddenEncoder:
    """An encoder that has a record, and nothing else."""
    record = HiddenRecord.model_construct(layers=tuple(range(layers)), width=width, values=values)
    encoder = object.__new__(HiddenEncoder)
    encoder.__dict__.update(SimpleNamespace(record=record).__dict__)
    return encoder


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize(("layers", "width"), [(1, 1), (3, 24), (2, 160)])
def test_a_part_with_its_last_chunk_filled_up_is_within_the_limit(
    layers, width, values, monkeypatch
):
    limit = 1 << 20
    monkeypatch.setattr(dense, "PART_BYTES", limit)
    encoder = encoder_of(layers, width, values)
    lengths = np.full(60000, 17)
    start, stop = plan_parts(lengths, encoder.max_bytes_per_row, limit)[0]
    assert stop < 60000
    rows = int(lengths[start:stop].sum())
    arrays = {
        name: np.zeros(shape, dtype)
        for name, (shape, dtype) in dense_arrays(encoder.record, rows).items()
    }
    size = sum(len(piece) for _, pieces in group_files(arrays) for piece in pieces)
    assert size <= limit
    # A row of a byte or two is rounded up to whole ones, and every sample has an offset.
    assert size > (0.3 if width == 1 else 0.6) * limit


def test_a_chunk_above_the_limit_is_filled(monkeypatch):
    monkeypatch.setattr(dense, "PART_BYTES", 1 << 20)
    wide = encoder_of(4, 600, "float16")  # 2.3 MiB in a chunk of every layer
    parts = plan_parts(np.ones(2000, dtype=np.int64), wide.max_bytes_per_row, 1 << 20)
    rows = [stop - start for start, stop in parts]
    assert max(rows) <= 512
    assert rows[0] > 500
