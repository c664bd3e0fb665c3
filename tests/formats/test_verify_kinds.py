"""Verification of every kind: damage in any file, and structure broken under right checksums."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import KDCacheError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.data_files import write_group
from kdcache.formats.dense import SCALE, VALUES
from kdcache.formats.manifest import CommitRecord, part_path
from kdcache.formats.ragged import Ragged, concat
from kdcache.formats.schema import ragged_batch
from kdcache.formats.signals import MasksRecord
from kdcache.formats.window import WindowReader
from tests.formats.kinds import DENSE, LAYERS, Kinds
from tests.formats.test_cache import rewrite
from tests.formats.test_verify import recommitted

FILES = ["zarr.json", "values/zarr.json", "values/c/0/0/0", "scale/zarr.json", "scale/c/0/0"]


def read_dense(root: Path, signal: str) -> None:
    """Every value of a signal."""
    cache = open_cache(root)
    for number in range(cache.num_shards):
        for part in cache.dense_shard(signal, number).parts:
            for layer in range(len(LAYERS)):
                part.decode(0, part.rows, layer)


def group_of(root: Path, signal: str, shard: int = 1) -> Path:
    (folder,) = (root / signal).glob(f"{shard:05d}.0-*.zarr")
    return folder


def faults_of(root: Path) -> list[str]:
    faults = verify_cache(root).faults
    assert not any("\n" in fault for fault in faults)
    return faults


def test_a_whole_cache_of_every_kind_has_no_fault(kinds: Kinds) -> None:
    report = verify_cache(kinds.root)
    assert report.faults == []
    assert report.leftovers == []
    files = [path for path in kinds.root.rglob("*") if path.is_file() and path.name != ".lock"]
    assert report.files == len(files)
    assert report.bytes == sum(path.stat().st_size for path in files)
    for signal in DENSE[:3]:
        read_dense(kinds.root, signal)


@pytest.mark.parametrize("path", FILES)
def test_one_flipped_bit_in_a_group_is_caught(own_int8: Path, path: str) -> None:
    file = group_of(own_int8, "hidden_int8") / path
    data = file.read_bytes()
    places = np.random.default_rng(0).integers(0, 8 * len(data), 5)
    for place in [0, *places.tolist(), 8 * len(data) - 1]:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(flipped))
        (fault,) = faults_of(own_int8)
        assert fault.startswith(f"{file}: xxh3 ")
        with pytest.raises(KDCacheError) as caught:
            read_dense(own_int8, "hidden_int8")
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
    file.write_bytes(data)
    assert faults_of(own_int8) == []


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("keep", [0, 0.5, None], ids=["emptied", "cut in half", "gone"])
def test_a_short_or_missing_file_of_a_group_is_caught(
    own_int8: Path, path: str, keep: float | None
) -> None:
    file = group_of(own_int8, "hidden_int8") / path
    data = file.read_bytes()
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(data[: int(keep * len(data))])
    (fault,) = faults_of(own_int8)
    assert fault.startswith(f"{file}: ")
    with pytest.raises(KDCacheError, match="expected" if keep is not None else "missing"):
        read_dense(own_int8, "hidden_int8")


def test_a_group_that_is_gone_or_a_file_is_caught(own_int8: Path) -> None:
    folder = group_of(own_int8, "hidden_int8")
    folder.rename(folder.with_name("aside"))
    assert len(faults_of(own_int8)) == len(FILES)
    folder.write_bytes(b"not a folder")
    faults = faults_of(own_int8)
    assert len(faults) == len(FILES)
    with pytest.raises(KDCacheError):
        read_dense(own_int8, "hidden_int8")


@pytest.mark.parametrize("path", ["values/c/0/0/1", "notes.txt", "more/zarr.json"])
def test_a_file_too_many_in_a_group_is_caught(own_int8: Path, path: str) -> None:
    file = group_of(own_int8, "hidden_int8") / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"{}")
    (fault,) = faults_of(own_int8)
    assert fault == f"{file}: its commit does not name this file; remove it"


def test_groups_that_no_commit_names_are_left_over(own_kinds: Kinds) -> None:
    root = own_kinds.root
    (root / "commits/hidden.00001.json").unlink()
    (root / "hidden/.tmp-1-00001.0.zarr").mkdir()
    report = verify_cache(root)
    assert [fault for fault in report.faults if "unfinished" not in fault] == []
    assert [path.split("-")[0] for path in report.leftovers] == [
        "hidden/.tmp",
        "hidden/00001.0",
        "hidden/00001.1",
    ]


def regrouped(root: Path, signal: str, arrays: dict[str, np.ndarray], at: str = "") -> None:
    """Put other arrays in place of the first part of shard 1, under right checksums."""
    folder = root / signal / "new"
    files = write_group(folder, arrays)
    path = part_path(signal, 1, 0, files)
    folder.rename(root / path)

    def change(tree: dict) -> None:
        named = [file.model_copy(update={"path": f"{path}/{file.path}"}) for file in files]
        tree["parts"][0]["files"] = [file.model_dump() for file in named]

    rewrite(root, f"commits/{signal}.00001.json", CommitRecord, change)


def arrays_of(kinds: Kinds, signal: str) -> dict[str, np.ndarray]:
    """Copies of the arrays of the first part of shard 1."""
    start = open_cache(kinds.root).manifest.shards[1].start
    column = kinds.columns[signal][VALUES].take(np.arange(start, start + 2))
    return {name: values.copy() for name, values in column.fields.items()}


def put(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][at] = value

    return change


def cut(arrays: dict[str, np.ndarray]) -> None:
    for name in list(arrays):
        arrays[name] = arrays[name][:-1]


def retyped(dtype: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[VALUES] = arrays[VALUES].astype(dtype)

    return change


def without_scale(arrays: dict[str, np.ndarray]) -> None:
    del arrays[SCALE]


@pytest.mark.parametrize(
    ("signal", "change", "message"),
    [
        ("hidden", put(VALUES, (1, 1, 2), np.nan), "layer 2: 1 values are NaN or infinite"),
        ("hidden", put(VALUES, (1, 2, 2), -np.inf), "layer 3: 1 values are NaN or infinite"),
        ("hidden_bf16", put(VALUES, (0, 0, 0), 0x7F80), "layer 0: 1 values are NaN or infinite"),
        ("hidden_int8", put(SCALE, (0, 0), np.nan), "layer 0: 4 values are NaN or infinite"),
        ("hidden_int8", put(SCALE, (0, 1), -1), "layer 2: 1 scales are negative"),
        ("hidden_int8", put(SCALE, (0, 0), 3e38), "layer 0: 4 values are NaN or infinite"),
        ("hidden", cut, "shape.0: "),
        ("hidden", retyped("<u2"), "data_type: 'uint16', expected 'float16'"),
        ("hidden_int8", without_scale, "its commit names no scale/zarr.json"),
        ("attention", put(VALUES, (0, 0, 0), -0.5), "layer 1: 1 attentions are negative"),
        ("attention", put(VALUES, (0, 1, 0), 1.5), "layer 2: attentions of 1 queries do not add"),
        ("attention", put(VALUES, (slice(0, 4), 1), 0), "do not add up to 1, the first 0"),
    ],
)
def test_a_broken_dense_structure_is_caught_under_right_checksums(
    own_kinds: Kinds, signal: str, change: Callable[[dict], None], message: str
) -> None:
    arrays = arrays_of(own_kinds, signal)
    change(arrays)
    regrouped(own_kinds.root, signal, arrays)
    faults = faults_of(own_kinds.root)
    assert len(faults) == 1
    assert message in faults[0]


@pytest.mark.parametrize("block", [1, 7, 30])
def test_a_part_is_checked_block_by_block(
    own_kinds: Kinds, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    from kdcache.formats.checks import structure_dense

    monkeypatch.setattr(structure_dense, "BLOCK_ROWS", block)
    assert faults_of(own_kinds.root) == []
    arrays = arrays_of(own_kinds, "attention")
    arrays[VALUES][-1, 1, 1] = 3
    regrouped(own_kinds.root, "attention", arrays)
    (fault,) = faults_of(own_kinds.root)
    assert "layer 2: attentions of 1 queries do not add up to 1, the first 3." in fault


def test_a_damaged_chunk_under_right_checksums_of_its_file_is_caught(own_kinds: Kinds) -> None:
    from kdcache.formats.integrity import digest_file
    from kdcache.formats.stores.store import open_store

    root = own_kinds.root
    folder = group_of(root, "hidden")
    file = folder / "values/c/0/0/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    record = open_cache(root).commit_record("hidden", 1)
    old = folder.relative_to(root).as_posix()
    files = [digest_file(open_store(root), f.path) for f in record.parts[0].files]
    new = part_path("hidden", 1, 0, files)
    folder.rename(root / new)

    def change(tree: dict) -> None:
        moved = [f.model_copy(update={"path": f.path.replace(old, new)}) for f in files]
        tree["parts"][0]["files"] = [f.model_dump() for f in moved]

    rewrite(root, "commits/hidden.00001.json", CommitRecord, change)
    (fault,) = faults_of(root)
    assert "layer 0: " in fault
    assert "crc32c of chunk 0 of layer index 0" in fault


@pytest.mark.parametrize(
    ("signal", "keys"),
    [
        ("hidden", ("tokens",)),
        ("hidden", ("entries", "values")),
        ("beams", ("tokens",)),
        ("masks", ("entries", "masked")),
        ("classes", ("entries", "scores")),
    ],
)
def test_a_commit_that_counts_otherwise_is_caught(
    own_kinds: Kinds, signal: str, keys: tuple[str, ...]
) -> None:
    def change(tree: dict) -> None:
        node = tree if len(keys) == 1 else tree[keys[0]]
        node[keys[-1]] += 1

    rewrite(own_kinds.root, f"commits/{signal}.00001.json", CommitRecord, change)
    (fault,) = faults_of(own_kinds.root)
    assert f"{keys[0]} in the commit of {signal!r} shard 1" in fault


def edit(column: str, field: str, at: int, value: float) -> Callable[[dict[str, Ragged]], None]:
    def change(columns: dict[str, Ragged]) -> None:
        columns[column].fields[field][at] = value

    return change


def fewer(column: str) -> Callable[[dict[str, Ragged]], None]:
    """The last sample lacks its last record."""

    def change(columns: dict[str, Ragged]) -> None:
        old = columns[column]
        old.offsets[-1] -= 1
        for name in list(old.fields):
            old.fields[name] = old.fields[name][: int(old.offsets[-1])]

    return change


def swap_positions(columns: dict[str, Ragged]) -> None:
    position = columns["masked"].fields["position"]
    counts = columns["replicas"].fields["num_masked"]
    ends = np.cumsum(counts)
    first = next(int(end - count) for end, count in zip(ends, counts, strict=True) if count > 1)
    position[[first, first + 1]] = position[[first + 1, first]]


def repeat_position(columns: dict[str, Ragged]) -> None:
    swap_positions(columns)
    position = columns["masked"].fields["position"]
    at = int(np.flatnonzero(np.diff(position.astype(int)) < 0)[0])
    position[at + 1] = position[at]


def no_hypothesis(columns: dict[str, Ragged]) -> None:
    hypotheses, tokens = columns["hypotheses"], columns["tokens"]
    first = int(hypotheses.offsets[1])
    gone = int(tokens.offsets[1])
    columns["hypotheses"] = Ragged(
        np.maximum(hypotheses.offsets - first, 0),
        {name: values[first:] for name, values in hypotheses.fields.items()},
    )
    columns["tokens"] = Ragged(
        np.maximum(tokens.offsets - gone, 0), {"id": tokens.fields["id"][gone:]}
    )


@pytest.mark.parametrize(
    ("signal", "change", "message"),
    [
        ("beams", edit("tokens", "id", 0, 12), "tokens: id 12, the vocabulary has 12"),
        ("beams", edit("hypotheses", "num_tokens", 0, 99), "do not add up to num_tokens"),
        ("beams", edit("hypotheses", "log_prob", 0, np.nan), "log_prob: 1 values are NaN or"),
        ("beams", edit("hypotheses", "log_prob", 0, 0.5), "log_prob: 1 values are above 0"),
        ("beams", edit("hypotheses", "score", 0, np.inf), "score: 1 values are NaN or"),
        ("beams", no_hypothesis, "is sample 0 of the part: 0, expected 1 to 3"),
        ("beams", fewer("tokens"), "do not add up to num_tokens"),
        ("masks", edit("masked", "id", 0, 12), "masked: id 12, the vocabulary has 12"),
        (
            "masks",
            edit("masked", "position", -1, 4),
            "masked: position 4 of sample 2 of the part, which has 4 tokens",
        ),
        ("masks", edit("replicas", "num_masked", 0, 9), "do not add up to num_masked"),
        ("masks", swap_positions, "of the part do not ascend"),
        ("masks", repeat_position, "of the part do not ascend"),
        ("masks", fewer("replicas"), "is sample 2 of the part: 1, expected 2"),
        ("classes", edit("scores", "value", 0, np.nan), "scores.value: 1 values are NaN or"),
        ("classes", edit("scores", "value", 0, -np.inf), "scores.value: 1 values are NaN or"),
        ("classes", fewer("scores"), "is sample 2 of the part: 2, expected 3"),
        ("masked_classes", fewer("scores"), "is sample 2 of the part: 5, expected 6"),
        ("at_positions", edit("exact", "id", 0, 99), "exact: id 99, the vocabulary has 12"),
        ("every", fewer("tokens"), "samples have another number of records"),
    ],
)
def test_a_broken_structure_is_caught_under_right_checksums(
    own_kinds: Kinds, signal: str, change: Callable[[dict[str, Ragged]], None], message: str
) -> None:
    root = own_kinds.root
    cache = open_cache(root)
    parts = [columns for _, _, columns in cache.signal_shard(signal, 1).parts]
    columns = {}
    for name in parts[0]:
        column = concat([part[name] for part in parts])
        fields = {key: values.copy() for key, values in column.fields.items()}
        columns[name] = Ragged(column.offsets.copy(), fields)
    change(columns)

    def one_part(tree: dict) -> None:
        tree["parts"] = [{**tree["parts"][0], "stop": tree["stop"]}]

    rewrite(root, f"commits/{signal}.00001.json", CommitRecord, one_part)
    recommitted(root, ragged_batch(cache.signal_schema(signal), columns), signal)
    faults = [fault for fault in faults_of(root) if "was made from" not in fault]
    assert any(message in fault for fault in faults), faults


def test_what_was_made_from_masks_of_another_record_is_read_all_the_same(own_kinds: Kinds) -> None:
    def change(tree: dict) -> None:
        tree["seed"] += 1

    rewrite(own_kinds.root, "signals/masks.json", MasksRecord, change)
    (file,) = own_kinds.root.glob("at_masked/00001.0-*")
    file.write_bytes(file.read_bytes()[:-1])
    faults = faults_of(own_kinds.root)
    mine = [fault for fault in faults if "signals/masks.json: its digest is" in fault]
    assert len(mine) == open_cache(own_kinds.root).num_shards
    (other,) = set(faults) - set(mine)
    assert other.startswith(f"{file}: ")


def test_a_signal_over_other_masks_is_caught(own_kinds: Kinds) -> None:
    from tests.formats.test_kinds import other_masks

    other_masks(own_kinds.root)
    faults = faults_of(own_kinds.root)
    made = [fault for fault in faults if "was made from 'masks' of digest" in fault]
    assert len(made) == 4  # masked_hidden, masked_classes, at_masked, at_segment
    with pytest.raises(KDCacheError):
        WindowReader(open_cache(own_kinds.root), [1], [], ["at_segment"])
