"""Inspection: sizes and labels against plain numpy over the same files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import FormatError
from kdcache.formats.cache import open_cache
from kdcache.formats.codec import Codec, FullCodec, NucleusCodec, SampledCodec, TopKCodec
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


def test_samples_alone(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", codecs={})
    inspection = inspect_cache(path, 2)
    assert inspection["signals"] == {}
    assert "stream" in inspection_text(inspection)


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a cache"):
        inspect_cache(tmp_path)
