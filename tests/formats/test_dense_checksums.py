"""A chunk that is right in itself but stands in another's place: the metadata's checksums tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.integrity import digest_file
from kdcache.formats.manifest import CommitRecord, part_path
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.zarr_layout import CHECKSUMS, CHUNK_ROWS
from tests.formats.kinds import LAYERS, WIDTH, Kinds
from tests.formats.test_cache import rewrite

CHUNK = CHUNK_ROWS * WIDTH * 2 + 4  # float16


def groups(root: Path, signal: str = "hidden") -> list[Path]:
    return sorted(root.glob(f"{signal}/*.zarr"))


def read(cache: Cache, signal: str = "hidden") -> list[np.ndarray]:
    shards = [cache.dense_shard(signal, number) for number in range(cache.num_shards)]
    layers = range(len(LAYERS))
    return [shard.decode(shard.start, shard.stop, layer) for shard in shards for layer in layers]


@pytest.mark.parametrize("signal", ["hidden", "hidden_int8", "attention"])
def test_the_metadata_repeat_the_checksums_of_all_chunks(kinds: Kinds, signal: str) -> None:
    for group in groups(kinds.root, signal):
        for file in sorted(group.glob("*/c/**/0")):
            if not file.is_file():
                continue
            metadata = json.loads(
                (group / file.relative_to(group).parts[0] / "zarr.json").read_text()
            )
            shape = metadata["codecs"][0]["configuration"]["chunk_shape"]
            size = np.dtype(metadata["data_type"]).itemsize * int(np.prod(shape))
            count = int(
                np.prod([-(-n // m) for n, m in zip(metadata["shape"], shape, strict=True)])
            )
            data = file.read_bytes()
            index = np.frombuffer(data[-16 * count - 4 : -4], dtype="<u8").reshape(count, 2)
            found = [google_crc32c.value(data[begin:][:size]) for begin in map(int, index[:, 0])]
            assert metadata["attributes"][CHECKSUMS] == "".join(f"{crc:08x}" for crc in found)


def test_a_file_in_the_place_of_another_is_refused(own_kinds: Kinds) -> None:
    first, second, *_ = groups(own_kinds.root)
    one, other = (group / "values/c/0/0/0" for group in (first, second))
    assert one.stat().st_size == other.stat().st_size
    assert one.read_bytes() != other.read_bytes()
    shutil.copy(other, one)
    with pytest.raises(IntegrityError, match=f"{one}: the crc32c of chunk 0 of layer index 0"):
        read(open_cache(own_kinds.root))


def test_layers_that_changed_places_are_refused(own_kinds: Kinds) -> None:
    file = groups(own_kinds.root)[0] / "values/c/0/0/0"
    data = file.read_bytes()
    file.write_bytes(data[CHUNK : 2 * CHUNK] + data[:CHUNK] + data[2 * CHUNK :])
    with pytest.raises(IntegrityError, match="the crc32c of chunk 0 of layer index 0"):
        read(open_cache(own_kinds.root))


def recommitted(root: Path, attributes: dict) -> None:
    """Other attributes in the first group, under right checksums."""
    group = groups(root)[0]
    file = group / "values/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attributes": attributes}))
    store = LocalStore(group)
    paths = sorted(
        path.relative_to(group).as_posix() for path in group.rglob("*") if path.is_file()
    )
    plain = [digest_file(store, path) for path in paths]
    name = part_path("hidden", 0, 0, plain)
    group.rename(root / name)
    files = [f.model_copy(update={"path": f"{name}/{f.path}"}).model_dump() for f in plain]
    rewrite(
        root,
        "commits/hidden.00000.json",
        CommitRecord,
        lambda tree: tree["parts"][0].update(files=files),
    )


def test_without_them_the_whole_file_is_checked(own_kinds: Kinds) -> None:
    expected = read(open_cache(own_kinds.root))
    recommitted(own_kinds.root, {"note": "another writer's"})
    for found, wanted in zip(read(open_cache(own_kinds.root)), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    first, second, *_ = groups(own_kinds.root)
    shutil.copy(second / "values/c/0/0/0", first / "values/c/0/0/0")
    with pytest.raises(IntegrityError, match="values/c/0/0/0: xxh3"):
        open_cache(own_kinds.root).dense_shard("hidden", 0)


@pytest.mark.parametrize(
    "value", [7, None, "", "0" * 7, "g" * 8 * 3, "A" * 24, "0" * 25, ["0"] * 24]
)
def test_a_list_of_another_form_is_refused(own_kinds: Kinds, value: object) -> None:
    recommitted(own_kinds.root, {CHECKSUMS: value})
    with pytest.raises(FormatError, match=f"zarr.json: attributes.{CHECKSUMS}: expected 24 hex"):
        open_cache(own_kinds.root).dense_shard("hidden", 0)
