"""Reports: what they measure against plain counting, and pages in a real browser."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from kdcache.cli import main
from kdcache.formats.cache import open_cache
from kdcache.report.charts import Reliability
from kdcache.report.commits import committed
from kdcache.report.inspect import inspect_cache
from kdcache.report.label_statistics import label_statistics, reliability_bins
from kdcache.report.report import write_report
from kdcache.train.evaluation.calibration import student_confidence
from kdcache.train.runs.loop import train
from tests.train.browser import find_browser, look
from tests.train.test_loop import metrics

PATHS = ("report", "markdown")


@pytest.fixture(scope="module")
def reports(swept, make_recipe, world, tmp_path_factory):
    """The three kinds of report, and what is said of each."""
    pytest.importorskip("matplotlib")
    root = tmp_path_factory.mktemp("reports")
    planned, done = swept
    without = root / "without"
    train(make_recipe(None, max_steps=6), world.cache, without)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # where the report of a cache goes
        cache = write_report(world.cache)
    assert (root / "cache-report.html").is_file()
    return {
        "run": write_report(done[0]["run"], root / "run.html", beside=[without]),
        "sweep": write_report(planned.out, root / "sweep.html", beside=[without]),
        "cache": {key: str(root / v) if key in PATHS else v for key, v in cache.items()},
    }


@pytest.mark.parametrize("signal", ["threshold", "full", "sampled"])
def test_statistics_of_labels_are_those_of_the_decoded_samples(world, signal):
    cache = open_cache(world.cache)
    commits = committed(cache)[signal]
    found = label_statistics(cache.logits(signal), commits)
    samples = inspect_cache(world.cache, num_samples=cache.num_samples)["samples"]
    rows = {r for n in commits.measured for r in cache.samples(n).row.tolist()}
    labels = [one for s in samples if s["row"] in rows for one in s["labels"][signal]]
    assert len(found.entropy) == len(labels) > 300
    assert found.entropy == pytest.approx([one["entropy_nats"] for one in labels])
    assert found.target == pytest.approx([one["target_probability"] for one in labels])
    if signal == "sampled":
        assert found.head is None
        assert found.entries.tolist() == [one["num_drawn"] for one in labels]
        return
    exact = [one["exact"] for one in labels]  # most probable first
    assert found.head == pytest.approx([sum(w for _, w in one) for one in exact], abs=1e-5)
    firsts = [one[0] if one else (None, 0.0) for one in exact]
    assert found.sure == pytest.approx([weight for _, weight in firsts], abs=1e-6)
    hits = [name == one["target"] for (name, _), one in zip(firsts, labels, strict=True)]
    # Two ids of one weight may come either way round.
    assert (found.hit == hits).mean() > 0.99
    for k in (1, 3, 8):
        mean = np.mean([sum(weight for _, weight in one[:k]) for one in exact])
        assert found.kept[k - 1] == pytest.approx(mean, abs=1e-6)


def test_reliability_by_hand():
    sure, hit = np.array([0.05, 0.15, 0.11, 1.0]), np.array([True, False, True, True])
    bins = reliability_bins(sure, hit)
    assert bins == [(0.05, 1.0, 1), (pytest.approx(0.13), 0.5, 2), (1.0, 1.0, 1)]
    assert Reliability("x", bins, "").error == pytest.approx((0.95 + 2 * 0.37) / 4)


def test_confidence_of_a_student_is_that_of_plain_transformers(swept, world):
    planned, done = swept
    run, cache = Path(done[0]["run"]), open_cache(world.cache)
    section = planned.runs[0].recipe.train
    found = student_confidence(run, section, cache, [1, 0], 400)
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "best").eval()
    sure, hits = [], 0
    for number in (1, 0):
        shard, taken = cache.samples(number), 0
        streams = {name: (s.offsets, s.fields["id"]) for name, s in shard.streams.items()}
        for n in range(len(shard.row)):
            src, tgt = (
                torch.tensor(ids[offsets[n] : offsets[n + 1]].astype(np.int64))[None]
                for offsets, ids in (streams["src"], streams["tgt"])
            )
            with torch.no_grad():
                logits = model(input_ids=src, labels=tgt).logits[0]
            best = logits.softmax(-1).max(-1)
            sure += best.values.tolist()
            hits += int((best.indices == tgt[0]).sum())
            taken += tgt.shape[1]
            if taken > 200:
                break
    assert sorted(found.sure.tolist()) == pytest.approx(sorted(sure), abs=1e-5)
    assert int(found.hit.sum()) == hits


def test_pages_in_a_browser(reports, tmp_path):
    browser = find_browser()
    if browser is None:
        pytest.skip("no browser here")
    pages = [Path(said["report"]) for said in reports.values()]
    found, console = look(browser, pages, tmp_path)
    assert console == []
    for said, page in zip(reports.values(), found, strict=True):
        assert len(page["pictures"]) == said["pictures"] > 2
        for picture in page["pictures"]:
            assert picture["width"] > 200
            assert picture["height"] > 60
            assert picture["drawn"] > 5
            assert len(picture["alt"]) > 20
            assert len([text for text in picture["texts"] if text]) > 4
            assert picture["fonts"] == ["system-ui, sans-serif"]
        assert page["overflow"] <= 0  # what is wide scrolls within its card
        assert page["twice"] == []
        assert page["fetched"] == 0
    run, sweep, cache = (page["text"] for page in found)
    assert "Learning curves" in run
    assert "Dashed: without a teacher" in run
    assert "± is the standard deviation" in sweep
    assert "Size against fidelity" in cache


def test_pages_need_no_network_and_are_small(reports):
    for said in reports.values():
        text = Path(said["report"]).read_text("utf-8")
        assert said["bytes"] == len(text.encode()) < 3 << 20
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+", text))
        assert addresses <= {"http://www.w3.org"}  # the name of SVG's namespace
        assert not re.search(r"<(?:script|link|img|iframe)\b|@import", text)
        for color in ("#2a6fb0", "#1c2026", "#dfe2e7"):  # as a variable's fallback alone
            loose = re.findall(rf"(?<!, ){color}", text[text.index("</style>") :])
            assert not loose


def test_the_twin_shows_the_same_pictures(reports, swept):
    for said in reports.values():
        twin = Path(said["markdown"])
        text = twin.read_text("utf-8")
        shown = re.findall(r"^!\[(.+)\]\((.+)\)$", text, re.MULTILINE)
        assert len(shown) == said["pictures"]
        for alt, path in shown:
            assert len(alt) > 20
            assert (twin.parent / path).read_bytes().startswith(b"\x89PNG")
    _, done = swept
    text = Path(reports["sweep"]["markdown"]).read_text("utf-8")
    best = min(done, key=lambda run: run["summary"]["best_dev_loss"])
    assert f"Run {best['name']}" in text
    assert all(run["summary"]["parameters"] == 6144 and "6,144" in text for run in done)
    assert "```yaml\nname: test" in text
    assert "version:" in text  # sacreBLEU's signature
    rows = re.findall(r"^\| \**([13])\** \|", text, re.MULTILINE)
    assert sorted(rows[:2]) == ["1", "3"]


def test_what_has_no_report_is_said_in_a_line(swept, world, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    _, done = swept
    for words, line in (
        (["nothing"], "nothing: there is nothing; give what"),
        ([str(tmp_path)], "neither a run, a sweep nor a cache"),
        ([str(world.cache), "--beside", done[0]["run"]], "go with a run or a sweep"),
        ([done[0]["run"], "--out", "page.pdf"], "--out page.pdf: the page is HTML"),
        ([done[0]["run"], "--beside", "nothing"], "nothing: not a run of `kdcache train`"),
    ):
        assert main(["report", *words]) == 1
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1


def test_a_missing_matplotlib_is_one_line(swept, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(swept[0].out)]) == 1
    error = capsys.readouterr().err
    assert 'pip install "kdcache[report]"' in error
    assert error.count("\n") == 1


def test_a_missing_tensorboard_is_one_line(make_recipe, world, tmp_path, monkeypatch, capsys):
    from kdcache.recipe import dump_recipe

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe(log="tensorboard")))
    out = tmp_path / "run"
    words = ["train", str(tmp_path / "recipe.yaml"), "--cache", str(world.cache)]
    assert main([*words, "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert 'pip install "kdcache[tensorboard]"' in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_tensorboard_has_the_numbers_of_the_metrics(make_recipe, world, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(make_recipe(log="tensorboard", max_steps=6), world.cache, run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = metrics(run)
    for tag, of in (
        ("loss", lambda line: line.get("loss")),
        ("terms/forward_kl", lambda line: line.get("terms", {}).get("forward_kl")),
        ("dev_loss", lambda line: line.get("dev_loss")),
    ):
        expected = [(line["step"], of(line)) for line in lines if of(line) is not None]
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert "step" not in events.Tags()["scalars"]
