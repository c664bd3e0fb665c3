"""Dense signals: values come back, only what was asked for is touched, damage is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.cache import open_cache
from kdcache.formats.data_files import write_group
from kdcache.formats.dense import (
    DensePart,
    decode_values,
    dense_arrays,
    dense_row_bytes,
    open_dense_part,
)
from kdcache.formats.listing import part_of
from kdcache.formats.manifest import CommitRecord, FileRecord, part_digest
from kdcache.formats.signals import HiddenRecord
from kdcache.formats.zarr_layout import CHUNK_ROWS, CRC_BYTES, crc_bytes
from tests.formats.kinds import DENSE, HEADS, Kinds, made_up_hidden
from tests.formats.labels import teacher_record
from tests.formats.test_cache import rewrite

ROWS, LAYERS, WIDTH = 1300, 3, 4
CHUNK = CHUNK_ROWS * WIDTH * 2 + CRC_BYTES  # float16


def record(values: str = "float16", layers: int = LAYERS, width: int = WIDTH) -> HiddenRecord:
    return HiddenRecord(
        name="hidden",
        stream="src",
        stream_digest="0" * 32,
        seed=0,
        teacher=teacher_record(),
        recipe={},
        versions={},
        side="encoder",
        layers=tuple(range(layers)),
        width=width,
        pool="none",
        values=values,
    )


def stored(values: str) -> dict[str, np.ndarray]:
    return made_up_hidden(record(values), ROWS, np.random.default_rng(0))


def opened(folder: Path, values: str = "float16") -> DensePart:
    return open_dense_part(reader(folder, []), str(folder), 0, 7, record(values), ROWS)


def reader(folder: Path, asked: list[tuple[str, bool]]) -> Callable[[str, bool], memoryview]:
    """Files of a group; what is asked for is taken down."""

    def read(path: str, whole: bool) -> memoryview:
        asked.append((path, whole))
        return memoryview((folder / path).read_bytes())

    return read


def truth(arrays: dict[str, np.ndarray], values: str) -> np.ndarray:
    """[R, L, W] float32 by torch."""
    tensor = torch.from_numpy(arrays["values"].copy())
    if values == "bfloat16":
        return tensor.view(torch.bfloat16).float().numpy()
    if values == "int8":
        return (tensor.float() * torch.from_numpy(arrays["scale"])[:, :, None]).numpy()
    return tensor.float().numpy()


@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
def test_values_come_back_as_torch_and_zarr_python_have_them(tmp_path: Path, values: str) -> None:
    arrays = stored(values)
    write_group(tmp_path, arrays)
    part = opened(tmp_path, values)
    expected = truth(arrays, values)
    assert part.rows == ROWS
    for start, stop in ((0, ROWS), (0, 1), (511, 513), (512, 1024), (1299, 1300), (600, 600)):
        for layer in range(LAYERS):
            found = part.decode(start, stop, layer)
            np.testing.assert_array_equal(found, expected[start:stop, layer])
            np.testing.assert_array_equal(found, part.decode_through_zarr(start, stop, layer))
            raw = part.read(start, stop, layer)
            np.testing.assert_array_equal(raw, arrays["values"][start:stop, layer])
            assert (found.dtype, raw.dtype) == (np.float32, arrays["values"].dtype)


def test_bfloat16_of_every_bit_pattern() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)[:, None]
    expected = torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(decode_values(bits, "bfloat16"), expected)


def test_shapes_and_sizes_of_what_is_stored() -> None:
    assert dense_arrays(record("int8"), 5) == {
        "values": ((5, 3, 4), np.dtype("i1")),
        "scale": ((5, 3), np.dtype("<f4")),
    }
    sizes = [dense_row_bytes(record(values)) for values in ("float16", "bfloat16", "int8")]
    assert sizes == [24, 24, 12 + 12]


@pytest.mark.parametrize(
    ("span", "layer"), [((0, 1301), 0), ((-1, 5), 0), ((6, 5), 0), ((0, 5), 3), ((0, 5), -1)]
)
def test_rows_and_layers_that_are_not_there(
    tmp_path: Path, span: tuple[int, int], layer: int
) -> None:
    write_group(tmp_path, stored("float16"))
    with pytest.raises(IndexError, match="of layer index"):
        opened(tmp_path).read(*span, layer)


def test_one_layer_touches_its_own_chunks_alone(tmp_path: Path) -> None:
    arrays = stored("int8")
    write_group(tmp_path, arrays)
    part = opened(tmp_path, "int8")
    assert part.chunks_read == 0
    part.read(600, 700, 1)
    assert part.chunks_read == 1
    part.read(600, 1100, 1)
    assert part.chunks_read == 2
    part.decode(0, ROWS, 1)  # three chunks of values, three of scales
    assert part.chunks_read == 6
    assert part.values._checked.tolist() == [[False, True, False]] * 3


def test_other_layers_may_be_in_ruins(tmp_path: Path) -> None:
    arrays = stored("float16")
    write_group(tmp_path, arrays)
    file = tmp_path / "values/c/0/0/0"
    data = bytearray(file.read_bytes())
    for layer in (0, 2):
        data[3 * layer * CHUNK : 3 * (layer + 1) * CHUNK] = b"\xff" * (3 * CHUNK)
    file.write_bytes(data)
    part = opened(tmp_path)
    np.testing.assert_array_equal(part.read(0, ROWS, 1), arrays["values"][:, 1])
    for layer in (0, 2):
        with pytest.raises(IntegrityError, match=f"crc32c of chunk 0 of layer index {layer}"):
            part.read(0, 1, layer)


@pytest.mark.parametrize("at", [0, CHUNK - CRC_BYTES - 1, CHUNK - 1], ids=["first", "last", "crc"])
def test_a_flipped_bit_in_a_chunk_is_refused_when_it_is_read(tmp_path: Path, at: int) -> None:
    arrays = stored("float16")
    write_group(tmp_path, arrays)
    file = tmp_path / "values/c/0/0/0"
    data = bytearray(file.read_bytes())
    data[4 * CHUNK + at] ^= 8  # chunk 1 of layer 1
    file.write_bytes(data)
    part = opened(tmp_path)
    np.testing.assert_array_equal(part.read(0, 512, 1), arrays["values"][:512, 1])
    for _ in range(2):
        with pytest.raises(IntegrityError, match="crc32c of chunk 1 of layer index 1") as caught:
            part.read(500, 600, 1)
    assert str(file) in str(caught.value)
    np.testing.assert_array_equal(part.read(1024, ROWS, 1), arrays["values"][1024:, 1])


def test_a_chunk_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.formats import mapped_array

    write_group(tmp_path, stored("float16"))
    part, seen = opened(tmp_path), []
    monkeypatch.setattr(
        mapped_array, "crc_bytes", lambda data: (seen.append(1), crc_bytes(data))[1]
    )
    for _ in range(3):
        part.read(0, 1024, 2)
    assert len(seen) == 2


def with_entry(file: Path, number: int, entry: tuple[int, int]) -> None:
    """Change one entry of a chunk index, under a right checksum."""
    data = bytearray(file.read_bytes())
    index = np.frombuffer(data[-4 - 16 * 9 : -4], dtype="<u8").reshape(9, 2).copy()
    index[number] = entry
    flat = index.reshape(-1).view(np.uint8)
    data[-4 - 16 * 9 :] = flat.tobytes() + crc_bytes(flat).tobytes()
    file.write_bytes(data)


def test_a_missing_chunk_is_refused_where_zarr_python_says_zero(tmp_path: Path) -> None:
    arrays = stored("float16")
    write_group(tmp_path, arrays)
    file = tmp_path / "values/c/0/0/0"
    with_entry(file, 4, (2**64 - 1, 2**64 - 1))
    assert not zarr.open_group(str(tmp_path), mode="r")["values"][512:1024, 1].any()
    with pytest.raises(IntegrityError, match="missing, the first is chunk 1 of layer index 1"):
        opened(tmp_path)


def test_an_entry_beyond_the_end_is_refused(tmp_path: Path) -> None:
    write_group(tmp_path, stored("float16"))
    file = tmp_path / "values/c/0/0/0"
    with_entry(file, 8, (9 * CHUNK, CHUNK))
    with pytest.raises(IntegrityError, match="chunks are outside the file"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"),
    [(0, "empty"), (100, "too short for the index"), (5000, "crc32c of its chunk index")],
)
def test_a_short_file_is_refused(tmp_path: Path, keep: int, message: str) -> None:
    write_group(tmp_path, stored("float16"))
    file = tmp_path / "values/c/0/0/0"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=message) as caught:
        opened(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("path", ["zarr.json", "scale/zarr.json", "scale/c/0/0", "values/c/0/0/0"])
def test_a_missing_file_is_refused(own_int8: Path, path: str) -> None:
    cache = open_cache(own_int8)
    group = part_of(cache.commit_record("hidden_int8", 0).parts[0].files[0].path)
    (own_int8 / group / path).unlink()
    with pytest.raises(IntegrityError, match=f"{group}/{path}: missing"):
        cache.dense_shard("hidden_int8", 0)


def test_a_file_that_the_commit_does_not_name_is_not_looked_for(own_int8: Path) -> None:
    def change(tree: dict) -> None:
        tree["parts"][0]["files"] = tree["parts"][0]["files"][1:]  # no scale/c/0/0
        digest = part_digest([FileRecord(**file) for file in tree["parts"][0]["files"]])
        for file in tree["parts"][0]["files"]:
            folder, _, rest = file["path"].split("/", 1)[1].partition("/")
            number = folder.split("-")[0]
            file["path"] = f"hidden_int8/{number}-{digest}.zarr/{rest}"
        (own_int8 / "hidden_int8" / folder).rename(
            own_int8 / "hidden_int8" / f"{number}-{digest}.zarr"
        )

    rewrite(own_int8, "commits/hidden_int8.00000.json", CommitRecord, change)
    with pytest.raises(FormatError, match=r"\.zarr: its commit names no scale/c/0/0"):
        open_cache(own_int8).dense_shard("hidden_int8", 0)


def test_a_part_asks_for_every_file_once_and_for_metadata_whole(tmp_path: Path) -> None:
    write_group(tmp_path, stored("int8"))
    asked: list[tuple[str, bool]] = []
    open_dense_part(reader(tmp_path, asked), "x", 0, 7, record("int8"), ROWS)
    assert asked == [
        ("zarr.json", True),
        ("values/zarr.json", True),
        ("values/c/0/0/0", False),
        ("scale/zarr.json", True),
        ("scale/c/0/0", False),
    ]


def edited(keys: tuple, value: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tree = json.loads(file.read_text())
        node = tree
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        file.write_text(json.dumps(tree))

    return change


INNER = ("codecs", 0, "configuration")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(("shape", 0), 1299), "shape.0: 1299, expected 1300"),
        (edited(("data_type",), "bfloat16"), "data_type: 'bfloat16', expected 'float16'"),
        (edited(("fill_value",), 1.0), "fill_value: 1.0, expected 0.0"),
        (edited((*INNER, "chunk_shape", 1), 3), "chunk_shape.1: 3, expected 1"),
        (edited((*INNER, "index_location"), "start"), "'start', expected 'end'"),
        (edited((*INNER, "codecs", 1), {"name": "zstd"}), "name: 'zstd', expected 'crc32c'"),
        (edited((*INNER, "codecs"), []), "codecs: .*, expected"),
        (edited(("storage_transformers",), [{"name": "x"}]), "storage_transformers"),
        (edited(("a\nb",), 1), "a.b: 1, expected absent"),
        (lambda file: file.write_text("[]"), "not a JSON object"),
        (lambda file: file.write_text("3"), "not a JSON object"),
        (lambda file: file.write_text("[" * 100_000), "not a JSON object"),
        (lambda file: file.write_bytes(b"\xff"), "not a JSON object in UTF-8"),
        (lambda file: file.write_text('{"shape": '), "not a JSON object"),
    ],
)
def test_metadata_of_another_array_are_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    write_group(tmp_path, stored("float16"))
    change(tmp_path / "values/zarr.json")
    with pytest.raises(FormatError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_attributes_are_free(tmp_path: Path) -> None:
    write_group(tmp_path, stored("float16"))
    edited(("attributes",), {"note": {"by": "a person"}})(tmp_path / "values/zarr.json")
    opened(tmp_path)


@pytest.mark.parametrize("signal", DENSE)
def test_a_shard_gives_the_rows_of_samples(kinds: Kinds, signal: str) -> None:
    cache = open_cache(kinds.root)
    fields = kinds.columns[signal]["values"].fields
    expected = truth(fields, cache.signal(signal).values)
    ends = np.cumsum([0, *kinds.rows(signal)])
    for number, plan in enumerate(cache.manifest.shards):
        shard = cache.dense_shard(signal, number)
        assert [part.start for part in shard.parts] == list(range(plan.start, plan.stop, 2))
        assert (
            shard.offsets.tolist() == (ends[plan.start : plan.stop + 1] - ends[plan.start]).tolist()
        )
        for layer in range(expected.shape[1]):
            for start in range(plan.start, plan.stop):
                for stop in range(start + 1, plan.stop + 1):
                    found = shard.decode(start, stop, layer)
                    wanted = expected[ends[start] : ends[stop], layer]
                    np.testing.assert_array_equal(found, wanted)


def test_a_shard_reads_the_parts_it_needs(kinds: Kinds) -> None:
    shard = open_cache(kinds.root).dense_shard("hidden", 0)
    shard.decode(2, 3, 0)
    assert [part.chunks_read for part in shard.parts] == [0, 1]
    for span in ((0, 4), (-1, 2), (2, 2), (2, 1)):
        with pytest.raises(IndexError, match="samples"):
            shard.decode(*span, 0)


def test_attention_is_query_major(kinds: Kinds) -> None:
    shard = open_cache(kinds.root).dense_shard("attention", 0)
    for sample in range(shard.start, shard.stop):
        num = len(kinds.targets[sample])
        values = shard.decode(sample, sample + 1, 1).reshape(num, num, HEADS)
        np.testing.assert_allclose(values.sum(axis=1), 1, atol=0.005)


def test_signals_of_the_other_way_of_keeping_are_refused(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    with pytest.raises(FormatError, match="'beams' is of kind beams, which has no dense arrays"):
        cache.dense_shard("beams", 0)
    with pytest.raises(FormatError, match="'hidden' is of kind hidden, which has no Arrow files"):
        cache.signal_shard("hidden", 0)
