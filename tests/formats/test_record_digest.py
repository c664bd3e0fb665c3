"""A commit names the record that says how its bytes are read: one from elsewhere is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kdcache.errors import IntegrityError
from kdcache.formats.cache import open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import ThresholdCodec
from kdcache.formats.manifest import CommitRecord
from kdcache.formats.signals import SignalRecord
from tests.formats.labels import make_cache
from tests.formats.test_cache import rewrite


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"recipe": {"a": 1}, "versions": {"torch": "9"}}, True),
        ({"seed": 2}, False),
        ({"codec": ThresholdCodec(c=1 / 9)}, False),
        ({"temperatures": (1.0,)}, False),
        ({"vocab_size": 13}, False),
        ({"stream": "src"}, False),
        ({"at": "positions"}, False),
    ],
    ids=str,
)
def test_the_digest_is_over_all_that_labels_depend_on(
    tiny_cache: Path, change: dict, same: bool
) -> None:
    record = open_cache(tiny_cache).signal("logits")
    other = record.model_copy(update=change)
    assert (other.digest == record.digest) == same
    assert type(record).model_validate(record.model_dump()).digest == record.digest


@pytest.mark.parametrize("depth", ["teacher", "member"])
@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("path", "x", True),
        ("revision", "v2", True),
        ("digest", "0" * 32, False),
        ("dtype", "x", False),
    ],
)
def test_where_a_teacher_lay_does_not_matter(
    tiny_cache: Path, depth: str, key: str, value: str, same: bool
) -> None:
    record = open_cache(tiny_cache).signal("logits")
    assert record.teacher is not None

    def spoken_by(**change: str) -> SignalRecord:
        assert record.teacher is not None
        teacher = record.teacher.model_copy(update=change)
        if depth == "member":
            teacher = record.teacher.model_copy(update={"members": [teacher]})
        return record.model_copy(update={"teacher": teacher})

    assert (spoken_by(**{key: value}).digest == spoken_by().digest) == same


def test_a_record_with_another_codec_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    # The same schema: nothing but the digest tells that the codes mean something else.
    other = make_cache(tmp_path / "other", {"logits": ThresholdCodec(c=1 / 9)})
    path = "signals/logits.json"
    shutil.copy(other / path, tiny_cache / path)
    cache = open_cache(tiny_cache)
    with pytest.raises(
        IntegrityError, match=f"{path}: .*, commits/logits.00000.json was made under"
    ):
        cache.signal_shard("logits", 0)
    faults = verify_cache(tiny_cache).faults
    assert len(faults) == 3
    assert all(path in fault for fault in faults)


def test_a_commit_without_it_is_refused(tiny_cache: Path) -> None:
    path = "commits/logits.00001.json"
    rewrite(tiny_cache, path, CommitRecord, lambda tree: tree.update(record=None))
    with pytest.raises(IntegrityError, match=f"{path} was made under None"):
        open_cache(tiny_cache).signal_shard("logits", 1)


def test_samples_name_none(tiny_cache: Path) -> None:
    cache = open_cache(tiny_cache)
    assert cache.commit_record("samples", 0).record is None
    assert cache.commit_record("logits", 0).record == cache.signal("logits").digest
