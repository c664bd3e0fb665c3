"""Rows of many samples of a dense signal at once, against plain numpy."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import IntegrityError
from kdcache.formats.data_files import write_group
from kdcache.formats.dense import DensePart, DenseShard
from kdcache.formats.dense_window import DenseWindow
from kdcache.formats.integrity import mapped
from kdcache.formats.mapped_array import MappedArray
from kdcache.formats.ragged import offsets_of
from kdcache.formats.zarr_layout import CHUNK_ROWS, CRC_BYTES, shard_path

LAYERS, WIDTH = 3, 5
#: Rows of the samples of each part of each shard; a part of none, samples of none, chunks crossed.
COUNTS = [[[3, 700, 0, 12], [1]], [[0]], [[520, 2, 511], [0, 0], [1400, 5]]]


def array_of(folder: Path, name: str, array: np.ndarray) -> MappedArray:
    file = folder / shard_path(name, array.ndim)
    data = memoryview(b"")
    if len(array):
        with file.open("rb") as stream:
            data = mapped(stream)
    return MappedArray(data, str(file), array.shape, array.dtype)


class World:
    """A window of int8 values with scales, and the same as plain arrays."""

    def __init__(self, folder: Path) -> None:
        draw = np.random.default_rng(0)
        self.values, self.scales, shards, start = [], [], [], 0
        for s, counts_of_parts in enumerate(COUNTS):
            parts, begin = [], start
            for p, counts in enumerate(counts_of_parts):
                values = draw.integers(-127, 128, (sum(counts), LAYERS, WIDTH)).astype(np.int8)
                scale = draw.random((sum(counts), LAYERS)).astype(np.float32)
                group = folder / f"{s}.{p}"
                write_group(group, {"values": values, "scale": scale})
                arrays = (array_of(group, "values", values), array_of(group, "scale", scale))
                parts.append(DensePart(start, start + len(counts), str(group), "int8", *arrays))
                cuts = np.cumsum(counts)[:-1]
                self.values += np.split(values, cuts)
                self.scales += np.split(scale, cuts)
                start += len(counts)
            flat = np.array([count for counts in counts_of_parts for count in counts])
            shards.append(DenseShard(begin, start, offsets_of(flat), parts))
        self.parts = [part for shard in shards for part in shard.parts]
        self.window = DenseWindow(shards)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("window"))


samples = st.lists(st.integers(0, sum(len(p) for s in COUNTS for p in s) - 1), max_size=30)
layers = st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4)


@given(samples, layers)
def test_rows_are_those_of_the_samples(world: World, samples: list[int], layers: list[int]) -> None:
    values, scale, counts = world.window.take(np.array(samples, dtype=np.int64), layers)
    assert counts.tolist() == [len(world.values[m]) for m in samples]
    empty = np.zeros((0, LAYERS, WIDTH), np.int8)
    wanted = np.concatenate([empty, *(world.values[m] for m in samples)])[:, layers]
    np.testing.assert_array_equal(values, wanted)
    wanted = np.concatenate([empty[:, :, 0], *(world.scales[m] for m in samples)])[:, layers]
    np.testing.assert_array_equal(scale, wanted)
    assert values.dtype == np.int8
    assert values.flags.writeable


def test_only_chunks_that_are_needed_are_touched(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.window.take(np.array([1, 8]), [2])
    # Sample 1 has the rows 3 to 702 of part 0, sample 8 the rows 522 to 1032 of part 3.
    assert [part.values.chunks_read for part in world.parts] == [2, 0, 0, 2, 0, 0]
    assert world.parts[0].values._checked.sum(0).tolist() == [0, 0, 2]
    world.window.will_need([0, 1])
    assert [part.values.chunks_read for part in world.parts] == [2, 0, 0, 2, 0, 0]


def test_the_system_is_asked_for_the_layers_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    asked: list[tuple[int, int]] = []

    class Map:
        def madvise(self, _: int, start: int, length: int) -> None:
            asked.append((start, start + length))

    array = world.parts[5].values
    array._map = Map()  # type: ignore[assignment]
    array.will_need([1])
    chunk = CHUNK_ROWS * WIDTH + CRC_BYTES
    assert asked == [(0, 6 * chunk - CRC_BYTES)]  # from the page that layer 1 begins in


def test_a_flipped_chunk_is_refused_by_whoever_needs_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    file = tmp_path / "0.0" / shard_path("values", 3)
    data = bytearray(file.read_bytes())
    chunk = CHUNK_ROWS * WIDTH + CRC_BYTES
    data[2 * chunk + 700] ^= 1  # layer 1 has the chunks 2 and 3
    file.write_bytes(data)
    for wanted, layer in [([0], 0), ([3], 1)]:
        world.window.take(np.array(wanted), [layer])
    for _ in range(2):
        with pytest.raises(IntegrityError, match="crc32c of chunk 0 of layer index 1"):
            world.window.take(np.array([0]), [1])


@pytest.mark.parametrize(("starts", "counts"), [([-1], [2]), ([0, 714], [1, 2])])
def test_rows_that_are_not_there_are_refused(
    world: World, starts: list[int], counts: list[int]
) -> None:
    array = world.parts[0].values
    out = np.zeros(9, dtype=array.row_dtype)
    places = np.arange(len(starts))
    with pytest.raises(IndexError, match=r"in \(715, 3, 5\)"):
        array.copy_runs(np.array(starts), np.array(counts), 0, out, places)
    with pytest.raises(IndexError):
        array.copy_runs(np.array([0]), np.array([1]), LAYERS, out, np.array([0]))
