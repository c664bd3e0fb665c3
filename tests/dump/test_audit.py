import shutil

import pytest
import torch

from kdcache.cli import main
from kdcache.dump.audit import AuditPlan, audit, verdicts
from kdcache.dump.runner import dump
from kdcache.dump.signals import logits as logits_module
from kdcache.errors import IdentityError, RecipeError
from kdcache.recipe import parse_recipe
from tests.dump.world import THRESHOLD

SIGNALS = {
    "soft": {"kind": "logits", "codec": THRESHOLD},
    "top": {"kind": "logits", "codec": {"name": "topk", "k": 12}},
    "whole": {"kind": "logits", "codec": {"name": "full", "values": "float32"}},
    "drawn": {"kind": "logits", "codec": {"name": "sampled", "n": 30}},
    "states": {"kind": "hidden", "side": "encoder", "stream": "src"},
    "coarse": {"kind": "hidden", "side": "encoder", "stream": "src", "values": "int8"},
    "looks": {"kind": "attention", "side": "encoder", "stream": "src", "heads": "all"},
    "best": {"kind": "beams", "num_beams": 2, "max_length": 12},
}
ALL = AuditPlan(fraction=1.0)


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    return dumped(world, tmp_path_factory.mktemp("audit") / "cache", SIGNALS)


def dumped(world, out, signals, teacher="marian"):
    path = teacher if "/" in str(teacher) else str(world.root / teacher)
    recipe = parse_recipe(
        {
            "name": "audited",
            "corpus": {"fields": {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}},
            "dump": {
                "shard_tokens": 500,
                "batch_tokens": 200,
                "teacher": {"path": str(path), "device": "cpu"},
                "signals": signals,
            },
        }
    )
    dump(recipe, out)
    return out


def test_a_sound_cache_passes_and_is_as_faithful_as_the_teacher_to_itself(cache):
    result = audit(cache, ALL)
    assert result["passed"]
    assert result["samples"] == 60
    assert not list(verdicts(result))
    for name, signal in result["signals"].items():
        faithful = signal["faithfulness"]
        assert faithful["deterministic"], name
        assert faithful["difference"] <= max(4 * faithful["own_noise"], 1e-3), name


def test_truncation_is_what_the_codecs_cut(cache):
    signals = audit(cache, ALL)["signals"]
    assert signals["best"]["truncation"] is None
    loss = {name: s["truncation"]["loss"] for name, s in signals.items() if s["truncation"]}
    assert loss["whole"] < 1e-6
    assert loss["soft"] < 0.1 < loss["top"]  # unbiased labels lack nothing on average
    assert 1e-4 < loss["coarse"] < 0.01
    assert loss["states"] < 1e-3
    assert signals["whole"]["truncation"]["lost_kl_nats"] == pytest.approx(0, abs=1e-5)
    assert signals["top"]["truncation"]["lost_kl_nats"] > 0.01
    assert signals["soft"]["truncation"]["noise"] > signals["top"]["truncation"]["noise"]


@pytest.mark.parametrize("name", ["soft", "top", "whole"])
def test_labels_of_other_logits_are_found_out(world, tmp_path, monkeypatch, name):
    encode = logits_module.encode_logits

    def wrong(logits, *rest):
        return encode(logits + 0.3 * torch.sin(torch.arange(logits.shape[1])), *rest)

    monkeypatch.setattr(logits_module, "encode_logits", wrong)
    out = dumped(world, tmp_path / "cache", {name: SIGNALS[name]})
    monkeypatch.undo()
    result = audit(out, ALL)
    assert not result["passed"]
    assert "stored labels differ from the teacher's" in " ".join(verdicts(result))
    assert audit(out, AuditPlan(fraction=1.0, tolerance=5.0))["signals"][name]["passed"]


def test_states_of_another_layer_are_found_out(world, tmp_path, monkeypatch):
    from kdcache.dump.signals.hidden import HiddenEncoder

    describe = HiddenEncoder.describe
    monkeypatch.setattr(HiddenEncoder, "describe", lambda *args: describe(*args).flip(1))
    out = dumped(world, tmp_path / "cache", {"states": SIGNALS["states"]})
    monkeypatch.undo()
    found = audit(out, ALL)["signals"]["states"]["faithfulness"]
    assert not found["passed"]
    assert set(found["by_layer"]) == {"0", "1"}


def test_a_teacher_that_is_not_deterministic_is_named(world, tmp_path, monkeypatch):
    from kdcache.dump.teachers.encoder_decoder import EncoderDecoderTeacher

    out = dumped(world, tmp_path / "cache", {"top": SIGNALS["top"]})
    plain = EncoderDecoderTeacher.logits_in_pieces

    def restless(self, *args):
        for piece in plain(self, *args):
            yield piece + 0.05 * torch.randn(piece.shape)

    monkeypatch.setattr(EncoderDecoderTeacher, "logits_in_pieces", restless)
    result = audit(out, ALL)
    assert not result["passed"]
    assert "outputs are not deterministic" in next(verdicts(result))


def test_a_moved_teacher_is_named_and_another_refused(world, cache, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(world.root / "marian", moved)
    plan = AuditPlan(fraction=0.1, signals=("top",), teacher=str(moved))
    assert audit(cache, plan)["passed"]
    other = AuditPlan(fraction=0.1, signals=("top",), teacher=str(world.root / "bart"))
    with pytest.raises(IdentityError, match="name the right one with --teacher"):
        audit(cache, other)


def test_an_ensemble_that_moved_is_named_member_by_member(world, cache, tmp_path, capsys):
    for name in ("one", "two", "new-one", "new-two"):
        shutil.copytree(world.root / "marian", tmp_path / name)
    recipe = parse_recipe(
        {
            "name": "ensemble",
            "corpus": {"fields": {"src": str(world.root / "src"), "tgt": str(world.root / "tgt")}},
            "dump": {
                "teacher": {"path": [str(tmp_path / "one"), str(tmp_path / "two")]},
                "signals": {"top": SIGNALS["top"]},
            },
        }
    )
    dump(recipe, tmp_path / "cache")
    for name in ("one", "two"):
        shutil.rmtree(tmp_path / name)
    moved = [word for name in ("new-one", "new-two") for word in ("--teacher", tmp_path / name)]
    words = ["audit", tmp_path / "cache", *moved]
    assert main([str(word) for word in words]) == 0
    assert main([str(word) for word in words[:4]]) == 1
    assert "name the right one with --teacher" in capsys.readouterr().err


def test_a_signal_that_is_not_there_is_refused(cache):
    with pytest.raises(RecipeError, match="no signal 'bottom'; it has"):
        audit(cache, AuditPlan(signals=("bottom",)))


def test_few_samples_are_at_least_thirty_two(cache):
    assert 32 <= audit(cache, AuditPlan(signals=("top",)))["samples"] < 60


def test_the_command_passes_and_fails(cache, capsys):
    words = ["audit", str(cache), "--signal", "top", "--signal", "states"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "passed" in text
    assert "states" in text
    assert "soft" not in text
    assert main([*words, "--truncation", "0.0001"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "coding loses" in error


def test_a_fraction_outside_its_range_is_bad_usage(cache, capsys):
    with pytest.raises(SystemExit):
        main(["audit", str(cache), "--fraction", "2"])
    assert "within 0 and 1" in capsys.readouterr().err
