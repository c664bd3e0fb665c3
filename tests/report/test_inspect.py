"""Inspection: sizes and labels against plain numpy over the same files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fsspec
import numpy as np
import pytest

from kdcache.cli import main
from kdcache.errors import FormatError
from kdcache.formats.cache import Cache, open_cache
from kdcache.formats.codec import Codec, FullCodec, NucleusCodec, SampledCodec, TopKCodec
from kdcache.formats.manifest import MANIFEST_NAME, CommitRecord
from kdcache.formats.record import encode_record
from kdcache.formats.stores.local import LocalStore
from kdcache.report import commits
from kdcache.report.inspect import inspect_cache
from kdcache.report.inspection_text import inspection_text
from tests.formats.labels import make_cache

CODECS: dict[str, Codec] = {
    "topk": TopKCodec(k=3),
    "nucleus": NucleusCodec(p=0.7, values="float16"),
    "sampled": SampledCodec(n=10),
    "full": FullCodec(values="float32"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = make_cache(tmp_path_factory.mktemp("inspect") / "cache", codecs=CODECS)
    return inspect_cache(path, num_samples=8)


def test_json_holds_everything(found: dict) -> None:
    assert json.loads(json.dumps(found))["signals"].keys() == CODECS.keys()


@pytest.mark.parametrize(
    ("name", "bytes_per_entry", "count_bytes"),
    [("topk", 3, 1), ("nucleus", 4, 1), ("sampled", 3, 1), ("full", 4, 0)],
)
def test_label_bytes_are_entries_and_counts(
    name: str, bytes_per_entry: int, count_bytes: int, found: dict
) -> None:
    signal = found["signals"][name]
    (entries,) = signal["entries_per_token"].values()
    assert signal["label_bytes_per_token"] == pytest.approx(entries * bytes_per_entry + count_bytes)
    assert signal["bytes_per_token"] > signal["label_bytes_per_token"]
    files = Path(found["path"]).glob(f"{name}/*.arrow")
    assert signal["bytes"] == sum(file.stat().st_size for file in files) == found["bytes"][name]


def test_teacher_scores_are_means_over_all_positions(found: dict) -> None:
    cache = open_cache(found["path"])
    gold = np.concatenate(
        [
            columns["tokens"].fields["gold"]
            for shard in range(cache.num_shards)
            for _, _, columns in cache.signal_shard("topk", shard).parts
        ]
    ).astype(float)
    signal = found["signals"]["topk"]
    assert signal["measured_tokens"] == len(gold) == signal["num_tokens"]
    assert signal["teacher_loss_nats"] == pytest.approx(((gold / 255) ** 2 * 25).mean(), rel=1e-6)
    assert signal["teacher_perplexity"] == pytest.approx(math.exp(signal["teacher_loss_nats"]))
    assert 0 < signal["entropy_nats"] < math.log(signal["vocab_size"])


def test_labels_of_all_codecs_agree(found: dict) -> None:
    for sample in found["samples"]:
        labels = sample["labels"]
        for full, topk, sampled in zip(
            labels["full"], labels["topk"], labels["sampled"], strict=True
        ):
            truth = dict(full["exact"])
            assert sum(truth.values()) == pytest.approx(1, abs=1e-5)
            assert truth[full["target"]] == pytest.approx(full["target_probability"], rel=0.25)
            best = [weight for _, weight in full["exact"][:3]]
            assert [weight for _, weight in topk["exact"]] == pytest.approx(best, abs=0.05)
            head = sum(weight for _, weight in topk["exact"])
            assert head + topk["tail_mass"] == pytest.approx(1, abs=0.1)
            assert sum(weight for _, weight in sampled["drawn"]) == pytest.approx(1)


def test_samples_are_spread_and_readable(found: dict) -> None:
    assert len({sample["row"] for sample in found["samples"]}) == 8
    sample = found["samples"][0]
    letters = [token for token in sample["tokens"]["src"] if not token.startswith("<")]
    assert "".join(letters) == sample["fields"]["src"]


@pytest.mark.parametrize("num_samples", [0, 1, 100])
def test_number_of_samples(num_samples: int, tiny_cache: Path) -> None:
    assert len(inspect_cache(tiny_cache, num_samples)["samples"]) == min(num_samples, 8)


def test_text_shows_every_signal(found: dict) -> None:
    text = inspection_text(found)
    for name in CODECS:
        assert f"{name}: logits of tgt" in text
    assert "teacher's loss" in text
    assert text.count("tail at temperatures 0.5, 1, 2") == 2
    assert "unfinished" not in text


def test_an_unfinished_signal_is_shown_as_such(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", skip_commits=[("logits", 1)])
    inspection = inspect_cache(path)
    assert "unfinished: 2 of 3 shards" in inspection_text(inspection)
    path = make_cache(tmp_path / "none", skip_commits=[("logits", n) for n in range(3)])
    inspection = inspect_cache(path)
    assert "unfinished: 0 of 3 shards" in inspection_text(inspection)
    assert [sample["labels"] for sample in inspection["samples"]] == [{}] * 3


def test_a_dump_on_its_way_is_reckoned_from_what_is_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_cache(tmp_path / "cache", shard_tokens=8, skip_commits=[("logits", 2)])
    inspection = inspect_cache(path, num_samples=0)
    signal, cache = inspection["signals"]["logits"], open_cache(path)
    done = [n for n in range(cache.num_shards) if n != 2]
    assert len(done) > 3
    assert signal["num_shards_committed"] == signal["num_commits_read"] == len(done)
    assert signal["num_shards_from_first"] == 2
    sizes = [path / "logits" / f"{n:05d}.*" for n in done]
    num_bytes = sum(next(path.glob(f"logits/{s.name}")).stat().st_size for s in sizes)
    lengths = [cache.samples(n).streams["tgt"].lengths.sum() for n in done]
    parts = [cache.signal_shard("logits", n).parts[0][2] for n in done]
    assert signal["bytes"] == num_bytes
    assert signal["num_tokens"] == sum(lengths) == signal["measured_tokens"]
    assert signal["bytes_per_stream_token"] == pytest.approx(num_bytes / sum(lengths))
    entries = sum(int(columns["exact"].offsets[-1]) for columns in parts)
    assert signal["entries_per_token"]["exact"] == pytest.approx(entries / sum(lengths))
    assert inspection["exact"]

    assert main(["inspect", str(path)]) == 0
    total = cache.num_shards
    said = f"(unfinished: {total - 1} of {total} shards, 2 from the first without a gap)"
    assert said in capsys.readouterr().out


def test_signals_that_a_dump_has_not_come_to(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache")
    manifest = open_cache(path).manifest
    recipe = {"dump": {"signals": {"logits": {}, "hidden": {}, "beams": {}}}}
    record = encode_record(manifest.model_copy(update={"recipe": recipe}))
    (path / MANIFEST_NAME).write_bytes(record)
    inspection = inspect_cache(path)
    assert inspection["not_begun"] == ["beams", "hidden"]
    assert "not begun  beams, hidden" in inspection_text(inspection)


def test_many_commits_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_cache(tmp_path / "cache", shard_tokens=1)
    exact = inspect_cache(path, 0)
    assert exact["exact"]
    assert exact["num_shards"] == 8
    read: list[tuple[str, int]] = []
    real, names = Cache.commit_record, LocalStore.names
    listed: list[str] = []

    def commit_record(self: Cache, signal: str, shard: int) -> CommitRecord:
        read.append((signal, shard))
        return real(self, signal, shard)

    monkeypatch.setattr(commits, "READ_COMMITS", 3)
    monkeypatch.setattr(Cache, "commit_record", commit_record)
    monkeypatch.setattr(LocalStore, "names", lambda s, f: listed.append(f) or names(s, f))
    monkeypatch.setattr(LocalStore, "walk", None)  # no folder of data is listed
    found = inspect_cache(path, 0)
    assert set(read) == {(name, n) for name in ("samples", "logits") for n in (0, 3, 6)}
    assert sorted(listed) == ["commits", "signals"]
    assert not found["exact"]
    assert "reckoned from a part of the commits" in inspection_text(found)
    plan = open_cache(path).manifest.shards
    scale = sum(shard.tokens for shard in plan) / sum(plan[n].tokens for n in (0, 3, 6))
    signal, whole = found["signals"]["logits"], exact["signals"]["logits"]
    sizes = [next(path.glob(f"logits/{n:05d}.*")).stat().st_size for n in (0, 3, 6)]
    assert signal["bytes"] == round(scale * sum(sizes))
    for key in ("num_samples", "num_shards_committed", "bytes_per_stream_token"):
        assert signal[key] == pytest.approx(whole[key], rel=0.2), key


def test_little_data_is_read_where_shards_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cache(tmp_path / "cache", shard_tokens=1)
    shard_bytes = inspect_cache(path, 0)["signals"]["logits"]["bytes"] // 8
    opened: list[int] = []
    real = Cache.signal_shard
    monkeypatch.setattr(
        Cache, "signal_shard", lambda self, name, n: opened.append(n) or real(self, name, n)
    )
    for budget, shards in ((1, [0]), (2.5 * shard_bytes, [0, 4]), (99 * shard_bytes, range(8))):
        opened.clear()
        monkeypatch.setattr(commits, "MEASURED_BYTES", int(budget))
        inspect_cache(path, 0)
        assert opened == list(shards)


def test_a_cache_at_a_url(found: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_LOCAL_COPY", str(tmp_path / "copy"))
    store, path = fsspec.filesystem("memory"), Path(found["path"])
    for file in path.rglob("*.*"):
        if file.is_file():
            store.pipe_file(f"/caches/x/{file.relative_to(path).as_posix()}", file.read_bytes())
    try:
        remote = inspect_cache("memory://caches/x", num_samples=8)
    finally:
        store.rm("/caches", recursive=True)
    assert remote == found | {"path": "memory://caches/x"}


def test_samples_alone(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", codecs={})
    inspection = inspect_cache(path, 2)
    assert inspection["signals"] == {}
    assert "stream" in inspection_text(inspection)


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a cache"):
        inspect_cache(tmp_path)
