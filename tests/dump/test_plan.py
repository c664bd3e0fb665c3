import json
import re

import numpy as np
import pytest

from kdcache.cli import main
from kdcache.dump.plan import CURVE, pilot_rows, plan
from kdcache.dump.runner import dump
from kdcache.formats.cache import open_cache
from kdcache.formats.dense import dense_row_bytes
from kdcache.recipe import dump_recipe
from kdcache.report.plan_text import plan_page, plan_text
from tests.dump.world import THRESHOLD

SIGNALS = {
    "soft": {"kind": "logits", "codec": THRESHOLD},
    "top": {"kind": "logits", "codec": {"name": "topk", "k": 3}},
    "states": {"kind": "hidden", "side": "encoder", "stream": "src", "values": "int8"},
    "looks": {"kind": "attention", "side": "encoder", "stream": "src"},
    "pooled": {"kind": "hidden", "stream": "src", "layers": [-1], "pool": "mean"},
}


@pytest.fixture(scope="module")
def planned(world):
    from kdcache.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "name": "planned",
            "corpus": {"fields": {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}},
            "dump": {
                "teacher": {"path": str(world.root / "marian"), "device": "cpu"},
                "signals": SIGNALS,
            },
        }
    )
    return recipe, plan(recipe, rows=24)


def test_pilot_rows_are_spread_evenly_over_the_lengths():
    generator = np.random.default_rng(1)
    numbers = np.sort(generator.choice(10_000, 1000, replace=False))
    lengths = generator.integers(1, 500, 1000)
    chosen = pilot_rows(lengths, numbers, 50)
    assert len(set(chosen.tolist())) == 50
    assert set(chosen.tolist()) <= set(numbers.tolist())
    order = sorted(range(1000), key=lambda i: (lengths[i], numbers[i]))
    ranks = sorted(order.index(int(np.flatnonzero(numbers == row)[0])) for row in chosen)
    assert ranks == list(range(10, 1000, 20))  # one in the middle of every twenty
    assert abs(lengths[np.isin(numbers, chosen)].mean() - lengths.mean()) < 5


def test_a_small_corpus_is_its_own_pilot():
    assert pilot_rows(np.array([3, 1, 2]), np.array([0, 4, 9]), 50).tolist() == [0, 4, 9]


def test_a_whole_dump_is_within_a_tenth_of_its_plan(planned, tmp_path):
    recipe, result = planned
    assert result["device"] == "cpu"
    dump(recipe, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    for name in ("samples", *SIGNALS):
        files = [
            file
            for shard in range(cache.num_shards)
            for part in cache.commit_record(name, shard).parts
            for file in part.files
        ]
        found = sum(cache.store.size(file.path) for file in files)
        allowed = 0.1 * found
        if name in ("states", "looks"):  # of files this small much is metadata and padding
            allowed = 4096 + 256 * dense_row_bytes(cache.signal(name))
        elif name == "pooled":  # its rows are known
            allowed = 4096
        assert result["bytes"][name] == pytest.approx(found, abs=allowed), name
    for name, stream in cache.manifest.streams.items():
        assert result["tokens"][name] == pytest.approx(stream.num_tokens, rel=0.1)


def test_codecs_are_ordered_as_their_maths_says(planned):
    rows = planned[1]["codecs"]["soft"]
    noise = [rows[f"threshold 1/{k}"]["noise"] for k in CURVE]
    size = [rows[f"threshold 1/{k}"]["bytes_per_token"] for k in CURVE]
    assert noise == sorted(noise, reverse=True)
    assert size == sorted(size)
    assert all(rows[f"threshold 1/{k}"]["bias_l1"] == 0 for k in CURVE)
    assert rows["topk 8"]["bias_l1"] > rows["topk 12"]["bias_l1"] > 0
    assert rows["topk 8"]["lost_kl_nats"] > rows["topk 12"]["lost_kl_nats"] > 0
    assert (
        rows["the recipe's"]["bytes"]
        == pytest.approx(
            rows["the recipe's"]["bytes_per_token"] * planned[1]["tokens"]["tgt"], rel=0.05
        )
        if "the recipe's" in rows
        else True
    )


def test_a_budget_chooses_the_finest_threshold_that_fits(world, planned):
    from kdcache.dump.plan import recommend

    result = planned[1]
    others = result["bytes"]["total"] - result["bytes"]["soft"]
    row = result["codecs"]["soft"]["threshold 1/16"]
    exactly = recommend(result, others + row["bytes"] + 1)
    assert exactly["overrides"] == {"dump.signals.soft.codec.c": "1/16"}
    assert exactly["fits"]
    little = recommend(result, others / 2)
    assert not little["fits"]
    limit = int(re.search(r"dump (\d+) of the 60 rows", little["text"])[1])
    assert 0 < limit < 60


def test_a_threshold_for_several_temperatures_is_left_as_it_is(planned):
    from kdcache.dump.plan import recommend

    result = json.loads(json.dumps(planned[1]))
    result["codec"]["top"] = "threshold for several temperatures"
    assert list(recommend(result, 1e12)["overrides"]) == ["dump.signals.soft.codec.c"]
    result["codec"]["soft"] = "nucleus"  # nothing to adjust: a threshold is offered to all
    assert len(recommend(result, 1e12)["overrides"]) == 2


def test_without_a_budget_the_noise_decides(planned):
    from kdcache.dump.plan import QUIET, recommend

    result = json.loads(json.dumps(planned[1]))
    rows = result["codecs"]["soft"]
    for k in CURVE:
        rows[f"threshold 1/{k}"]["noise_over_signal"]["1"] = QUIET * 23 / k
    assert recommend(result, None)["overrides"] == {"dump.signals.soft.codec.c": "1/24"}


def test_texts_name_every_signal_and_codec(planned):
    result = planned[1]
    text, page = plan_text(result), plan_page(result, "planned")
    for name in (*SIGNALS, "threshold 1/16", "topk 12", "sampled 50", "full", "recommended"):
        assert name in text
    assert page.count("<svg") == 2
    assert "Plan of planned" in page


def test_the_command_plans_and_writes_no_cache(planned, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(dump_recipe(planned[0]))
    words = ["dump", "r.yaml", "--plan", "--budget", "1GB", "--report", "p.html", "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["recommendation"]["fits"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "r.yaml"]
    monkeypatch.setattr("kdcache.dump.plan.plan", None)  # is not reached
    assert main([*words[:5], "--report", "none/p.html"]) == 1
    assert "none/p.html" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "much", "--plan"], "'much' is no size"),
        (["--budget", "1GB", "--out", "c"], "goes with --plan"),
        (["--report", "x.html", "--out", "c"], "goes with --plan"),
    ],
)
def test_bad_words_are_bad_usage(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["dump", "word-level", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GB", 200e9), ("1.5TiB", 1.5 * 2**40), ("10 mb", 10e6), ("1024", 1024), ("3k", 3000)],
)
def test_sizes(text, size):
    from kdcache.commands.dump import _bytes

    assert _bytes(text) == size
