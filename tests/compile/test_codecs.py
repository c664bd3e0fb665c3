"""Re-encoding while compiling: as in one call, whatever shards and blocks are."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.compile import CompileOptions, compile_caches, labels
from kdcache.compile.reencode import reencode, reencoded_record
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import ThresholdCodec, TopKCodec
from kdcache.formats.ragged import Ragged, concat
from kdcache.formats.schema import join_ids
from kdcache.formats.signals import SignalRecord
from tests.compile.universe import LOGITS, PAIRS
from tests.compile.written import write_world

CODECS = {
    LOGITS: ThresholdCodec(c=1 / 2),
    "every": ThresholdCodec(c=1 / 4, values="float16"),
    "at_masked": TopKCodec(k=1),
}


def huge(record: SignalRecord) -> int:
    return 1 << 28


def columns_of(cache: Cache, name: str) -> dict[str, Ragged]:
    parts = [
        {key: column.take(np.arange(stop - start)) for key, column in columns.items()}
        for n in range(cache.num_shards)
        for start, stop, columns in cache.signal_shard(name, n).parts
    ]
    return {key: concat([part[key] for part in parts]) for key in parts[0]}


def same(a: dict[str, Ragged], b: dict[str, Ragged]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].offsets.tolist() == b[key].offsets.tolist()
        and {f: v.tolist() for f, v in a[key].fields.items()}
        == {f: v.tolist() for f, v in b[key].fields.items()}
        for key in a
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("_BLOCK_BYTES", labels._BLOCK_BYTES), ("_BLOCK_BYTES", 50), ("part_row_bytes", huge)],
    ids=["one block", "blocks", "parts of one sample"],
)
def test_shards_parts_and_blocks_do_not_matter(universe, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(labels, name, value)
    a = universe.write(
        tmp_path / "a", range(len(PAIRS)), [LOGITS, "masks", "beams", "every", "at_masked"]
    )
    before = open_cache(a)
    codecs = {name: codec.model_dump() for name, codec in CODECS.items()}
    compile_caches([a], tmp_path / "out", CompileOptions(codecs=codecs, shard_tokens=30))
    after = open_cache(tmp_path / "out")
    assert verify_cache(tmp_path / "out").faults == []
    ids = np.concatenate([before.samples(n).sample_id for n in range(before.num_shards)])
    for name, codec in CODECS.items():
        record = before.logits(name)
        new = reencoded_record(record, codec)
        expected = reencode(columns_of(before, name), record, new, ids, np.arange(len(PAIRS)))
        assert same(columns_of(after, name), expected), name
        assert after.logits(name).codec == codec
    steps = after.manifest.lineage.operations
    assert [step["signal"] for step in steps if step["operation"] == "encode"] == sorted(CODECS)


def test_labels_of_chosen_hypotheses_are_re_encoded(tmp_path):
    (tmp_path / "written").mkdir()
    world = write_world(tmp_path / "written")
    options = CompileOptions(
        targets="beams=best", signals=["all_full"], codecs={"all_full": {"name": "topk", "k": 3}}
    )
    compile_caches([world.root], tmp_path / "out", options)
    found = columns_of(open_cache(tmp_path / "out"), "all_full")
    rows = np.concatenate([np.r_[world.positions(m, 0)] for m in range(len(world.src))])
    top = np.sort(np.argsort(-world.teacher[rows], axis=1)[:, :3], axis=1)
    assert join_ids(found["exact"].fields).reshape(-1, 3).tolist() == top.tolist()


def test_copies_of_a_sample_get_draws_of_their_own(universe, tmp_path):
    """So repeated samples carry more of the teacher than one of them does."""
    a = universe.write(tmp_path / "a", range(len(PAIRS)), ["beams", "every"])
    codec = {"name": "threshold", "c": 0.9}
    options = CompileOptions(mix=[8], signals=["beams", "every"], codecs={"every": codec})
    compile_caches([a], tmp_path / "out", options)
    column = columns_of(open_cache(tmp_path / "out"), "every")["drawn"]
    first = [join_ids(column.take(np.array([12 * copy])).fields).tolist() for copy in range(8)]
    assert len({tuple(ids) for ids in first}) > 1
