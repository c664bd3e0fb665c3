"""Verification in several processes finds what it finds in one; sums are taken in order."""

import os
from concurrent.futures import Future
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import StorageError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks import verify, verify_findings, verify_flight, verify_processes
from kdcache.formats.checks.structure import range_faults
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.checks.verify_findings import Copies, CorpusSums, Findings
from kdcache.formats.ragged import Ragged
from tests.formats.kinds import Kinds
from tests.formats.labels import make_cache


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes start for the smallest cache, and get one shard at a time."""
    monkeypatch.setattr(verify, "FEW_BYTES", 0)
    monkeypatch.setattr(verify_processes, "TASK_BYTES", 1)


@pytest.mark.usefixtures("eager")
def test_several_processes_find_what_one_finds(own_kinds: Kinds) -> None:
    root = own_kinds.root
    assert verify_cache(root, processes=2) == verify_cache(root)
    for pattern in ("samples/00001.0-*", "hidden/00002.0-*/zarr.json", "classes/00000.0-*"):
        (file,) = root.glob(pattern)
        file.write_bytes(file.read_bytes()[:-1])
    (root / "commits/beams.00000.json").write_bytes(b"{}")
    (root / "commits/pooled.00002.json").unlink()
    alone, together = verify_cache(root), verify_cache(root, processes=3)
    assert len(alone.faults) > 3
    assert len(alone.unfinished) == 1
    assert len(alone.leftovers) == 1
    assert together == alone


@pytest.mark.usefixtures("eager")
def test_shards_that_come_out_of_order_do_not_wait_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_flight, "MOST_BYTES", 1)  # one part at a time
    monkeypatch.setattr(verify_flight, "PART_BYTES", 1)
    root = make_cache(tmp_path / "cache", shard_tokens=1)
    assert open_cache(root).num_shards == 8
    assert verify_cache(root, processes=2).faults == []


def test_copies_stay_when_memory_is_used_again(kinds: Kinds) -> None:
    samples = open_cache(kinds.root).samples(0)
    fields = {"id": samples.streams["src"].fields["id"].copy()}
    mine = replace(
        samples,
        sample_id=samples.sample_id.copy(),
        row=samples.row.copy(),
        streams={"src": Ragged(samples.streams["src"].offsets.copy(), fields)},
    )
    pieces: dict = {}
    Copies(pieces.__setitem__).add(0, mine, Future())
    for array in (mine.sample_id, mine.row, mine.streams["src"].offsets, fields["id"]):
        array[:] = 0
    assert np.array_equal(pieces[0].sample_id, samples.sample_id)
    assert np.array_equal(pieces[0].row, samples.row)
    found, column = pieces[0].streams["src"], samples.streams["src"]
    assert np.array_equal(found.offsets, column.offsets)
    assert np.array_equal(found.fields["id"], column.fields["id"])


@pytest.mark.usefixtures("eager")
def test_a_process_that_is_killed_is_told(kinds: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_processes, "_begin", _die)
    with pytest.raises(StorageError, match="was killed, out of memory perhaps; use --processes 1"):
        verify_cache(kinds.root, processes=2)


def _die(location: str, processes: int) -> None:
    os._exit(9)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("copied", [False, True])
def test_sums_do_not_depend_on_the_order_of_shards(
    kinds: Kinds, order: tuple[int, ...], copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_findings, "_TOKENS_AT_ONCE", 3)
    cache = open_cache(kinds.root)
    assert cache.num_shards == 3
    sums, findings = CorpusSums(cache), Findings(cache)
    waits = [Future[None]() for _ in order]
    for shard in order:
        samples = cache.samples(shard)
        if copied:
            pieces: dict = {}
            Copies(pieces.__setitem__).add(shard, samples, Future())
            samples = pieces[shard]
        sums.add(shard, samples, waits[shard])
        come = set(order[: order.index(shard) + 1])
        assert [wait.done() for wait in waits] == [set(range(n + 1)) <= come for n in range(3)]
    sums.compare(findings)
    assert findings.all() == []


def test_sums_say_what_differs(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    sums, findings = CorpusSums(cache), Findings(cache)
    for shard in (0, 2, 1):  # the last two change places
        sums.add({1: 2, 2: 1}.get(shard, shard), cache.samples(shard), Future())
    sums.compare(findings)
    lines = [line for *_, line in findings.all()]
    assert [line.split(": ")[1] for line in lines] == [
        "corpus digest",
        "digest of stream 'src'",
        "digest of stream 'tgt'",
    ]
    sums = CorpusSums(cache)
    for shard in range(3):
        sums.add(shard, cache.samples(shard) if shard else None, Future())
    findings = Findings(cache)
    sums.compare(findings)
    assert findings.all() == []  # nothing can be said of a part


@pytest.mark.parametrize(
    ("low", "high", "vocab_size", "largest"),
    [
        ([3, 9, 4], None, 10, None),
        ([3, 9, 4], None, 9, 9),
        ([], None, 1, None),
        ([65535, 2, 5], [0, 1, 1], 65536 + 6, None),
        ([65535, 2, 5], [0, 1, 1], 65536 + 5, 65541),
        ([65535, 0], [0, 0], 65536, None),
        ([1, 0], [2, 3], 3 * 65536, 3 * 65536),
    ],
)
def test_the_largest_id_is_found(
    low: list[int], high: list[int] | None, vocab_size: int, largest: int | None
) -> None:
    fields = {"id": np.array(low, dtype=np.uint16)}
    if high is not None:
        fields["id_high"] = np.array(high, dtype=np.uint8)
    line = f"x: id {largest}, the vocabulary has {vocab_size}"
    assert range_faults("x", fields, vocab_size) == ([] if largest is None else [line])
