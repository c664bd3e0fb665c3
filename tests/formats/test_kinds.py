"""Signals of every kind in one cache: read in windows, tied to what they were made from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import FormatError, IntegrityError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.dense import SCALE, VALUES
from kdcache.formats.manifest import CommitRecord
from kdcache.formats.replicas import by_replica
from kdcache.formats.signals import HiddenRecord, LogitsRecord, MasksRecord
from kdcache.formats.window import WindowReader
from tests.formats.kinds import DENSE, Kinds
from tests.formats.test_cache import rewrite


def test_windows_gather_every_kind_that_is_kept_in_arrow(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    names = [name for name in cache.signals if name not in DENSE]
    assert len(names) == 10
    window = WindowReader(cache, [2, 0], ["tgt"], names)
    order = np.array([6, 7, 0, 1, 2])
    rows = np.array([4, 0, 3, 3, 1])
    for name in names:
        found = window.take_signal(name, rows)
        assert set(found) == set(kinds.columns[name])
        for column, whole in kinds.columns[name].items():
            wanted = whole.take(order[rows])
            assert found[column].offsets.tolist() == wanted.offsets.tolist()
            for field, values in wanted.fields.items():
                np.testing.assert_array_equal(found[column].fields[field], values)


def test_windows_gather_every_kind_that_is_kept_in_zarr(kinds: Kinds) -> None:
    window = WindowReader(open_cache(kinds.root), [2, 0], [], DENSE)
    order = np.array([6, 7, 0, 1, 2])
    rows = np.array([4, 0, 3, 3, 1])
    for name in DENSE:
        wanted = kinds.columns[name][VALUES].take(order[rows])
        layers = [1, 0] if name != "pooled" else [2]
        values, scale, counts = window.take_dense(name, rows, layers)
        np.testing.assert_array_equal(counts, wanted.lengths)
        np.testing.assert_array_equal(values, wanted.fields[VALUES][:, layers])
        np.testing.assert_array_equal(window.counts(name), np.array(kinds.rows(name))[order])
        assert (scale is None) == (SCALE not in wanted.fields)
        if scale is not None:
            np.testing.assert_array_equal(scale, wanted.fields[SCALE][:, layers])


def test_records_are_counted(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    names = [name for name in cache.signals if name not in ("beams", "masks")]
    window = WindowReader(cache, [1, 2], ["src"], names)
    for name in names:
        assert window.counts(name).tolist() == kinds.rows(name)[3:], name


def test_only_logits_are_logits(kinds: Kinds) -> None:
    cache = open_cache(kinds.root)
    assert isinstance(cache.logits("best"), LogitsRecord)
    with pytest.raises(FormatError, match=r"'masks' is of kind masks, expected logits; those are"):
        cache.logits("masks")
    with pytest.raises(FormatError, match="cache has no signal 'x'"):
        cache.logits("x")


def test_replicas_that_do_not_add_up_are_refused(kinds: Kinds) -> None:
    record = open_cache(kinds.root).signal("at_masked")
    counts = np.array([[len(replica) for replica in one] for one in kinds.masked])
    assert by_replica(record, kinds.columns["at_masked"], counts)["tokens"].lengths.sum() > 0
    counts[2, 1] += 1
    with pytest.raises(IntegrityError, match=r"'tokens': the replicas of sample 2 of a part"):
        by_replica(record, kinds.columns["at_masked"], counts)


def other_masks(root: Path) -> None:
    """The commit of one shard of the masks, over other files' digests."""

    def change(tree: dict) -> None:
        file = tree["parts"][0]["files"][0]
        file["path"] = file["path"].replace(file["xxh3"], "0" * 16)
        file["xxh3"] = "0" * 16

    rewrite(root, "commits/masks.00001.json", CommitRecord, change)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("masked_hidden", Cache.dense_shard),
        ("masked_classes", Cache.signal_shard),
        ("at_masked", Cache.signal_shard),
    ],
)
def test_a_signal_made_from_other_masks_is_refused(
    own_kinds: Kinds, name: str, read: Callable
) -> None:
    old = open_cache(own_kinds.root).commit_record("masks", 1).digest
    other_masks(own_kinds.root)
    cache = open_cache(own_kinds.root)
    new = cache.commit_record("masks", 1).digest
    message = f"{name!r} shard 1 was made from 'masks' of digest {old}, the cache has {new}"
    with pytest.raises(IntegrityError, match=message):
        read(cache, name, 1)
    if name == "at_masked":
        with pytest.raises(IntegrityError, match=message):
            WindowReader(cache, [0, 1], [], [name])
    read(open_cache(own_kinds.root), "hidden" if name in DENSE else "classes", 1)


@pytest.mark.parametrize("inputs", [{}, {"beams": "0" * 32}], ids=["none", "others"])
def test_a_commit_names_the_inputs_that_its_signal_names(own_kinds: Kinds, inputs: dict) -> None:
    def change(tree: dict) -> None:
        tree["inputs"] = inputs

    rewrite(own_kinds.root, "commits/at_masked.00000.json", CommitRecord, change)
    with pytest.raises(IntegrityError, match="'at_masked' shard 0 was made from 'masks' of digest"):
        open_cache(own_kinds.root).signal_shard("at_masked", 0)
    rewrite(own_kinds.root, "commits/classes.00000.json", CommitRecord, lambda tree: None)
    open_cache(own_kinds.root).signal_shard("classes", 0)


def test_a_commit_with_an_input_that_its_signal_does_not_name_is_refused(own_kinds: Kinds) -> None:
    def change(tree: dict) -> None:
        tree["inputs"] = {"masks": "0" * 32}

    rewrite(own_kinds.root, "commits/classes.00000.json", CommitRecord, change)
    with pytest.raises(
        IntegrityError, match="'classes' shard 0 was made from 'masks' of digest 00"
    ):
        open_cache(own_kinds.root).signal_shard("classes", 0)


def renamed(role: str, name: str) -> Callable[[dict], None]:
    def change(tree: dict) -> None:
        tree[role] = name

    return change


@pytest.mark.parametrize(
    ("path", "kind", "change", "message"),
    [
        ("signals/at_masked.json", LogitsRecord, renamed("masks", "x"), "'x' .* is missing"),
        ("signals/at_masked.json", LogitsRecord, renamed("masks", "beams"), "is of kind beams"),
        ("signals/best.json", LogitsRecord, renamed("hypotheses", "masks"), "is of kind masks"),
        ("signals/hidden.json", HiddenRecord, renamed("masks", "hidden"), "is of kind hidden over"),
    ],
    ids=["missing", "masks that are beams", "hypotheses that are masks", "itself"],
)
def test_inputs_must_be_there_and_of_their_kind(
    own_kinds: Kinds, path: str, kind, change: Callable[[dict], None], message: str
) -> None:
    rewrite(own_kinds.root, path, kind, change)
    with pytest.raises(FormatError, match=message) as caught:
        open_cache(own_kinds.root)
    assert "\n" not in str(caught.value)


def test_masks_of_another_stream_are_refused(own_kinds: Kinds) -> None:
    src = open_cache(own_kinds.root).stream("src").digest

    def change(tree: dict) -> None:
        tree.update(stream="src", stream_digest=src)

    rewrite(own_kinds.root, "signals/masks.json", MasksRecord, change)
    with pytest.raises(FormatError, match="over stream 'tgt'; that signal is of kind masks over"):
        open_cache(own_kinds.root)


def test_a_part_that_is_kept_in_the_other_way_is_refused(own_kinds: Kinds) -> None:
    root = own_kinds.root
    hidden = open_cache(root).signals["hidden"]
    assert isinstance(hidden, HiddenRecord)
    tree = hidden.model_dump(mode="json") | {"name": "classes"}
    (root / "signals/classes.json").unlink()
    from kdcache.formats.record import encode_record

    (root / "signals/classes.json").write_bytes(encode_record(HiddenRecord.model_validate(tree)))
    with pytest.raises(
        FormatError, match=r"a part of 'classes', whose kind hidden is kept as \.zarr"
    ):
        open_cache(root).dense_shard("classes", 0)


@pytest.mark.parametrize("signal", ["masks", "masked_classes", "at_masked", "best"])
def test_labels_of_another_number_than_they_must_have_are_refused(
    own_kinds: Kinds, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    from kdcache.formats import window

    real = window.label_counts

    def other(cache, record, shard):
        counts = real(cache, record, shard).copy()
        counts[1] += 1
        return counts

    monkeypatch.setattr(window, "label_counts", other)
    with pytest.raises(IntegrityError, match=f"{signal!r} shard 0: 1 samples have another number"):
        WindowReader(open_cache(own_kinds.root), [0], [], [signal])
