"""`kdcache compile` on the command line, and what other commands say of its caches."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from kdcache.cli import main, make_parser
from kdcache.commands.compile import options_of
from kdcache.compile.options import CompileOptions, Condition, Targets
from kdcache.formats.cache import open_cache
from tests.compile.universe import LOGITS, PAIRS


def test_arguments_become_options():
    words = ["compile", "a", "s3://b/c", "--out", "d", "--signals", "x", "y", "--missing", "drop"]
    words += ["--filter", "x.loss < 3", "--filter", "tgt.length<=5", "--ids", "list"]
    words += ["--fraction", "1/4", "--seed", "7", "--mix", "1", "0.5", "--targets", "beams=sampled"]
    words += ["--codec", "x={name: topk, k: 3}", "--codec", "y={name: threshold, c: 1/8}"]
    words += ["--rename", "x=z", "--shard-tokens", "100", "--bleu-tokenizer", "char"]
    arguments = make_parser().parse_args(words)
    assert arguments.caches == ["a", "s3://b/c"]
    assert options_of(arguments) == CompileOptions(
        signals=["x", "y"],
        missing="drop",
        filters=[Condition("x", "loss", "<", 3.0), Condition("tgt", "length", "<=", 5.0)],
        ids="list",
        fraction=0.25,
        seed=7,
        mix=[1.0, 0.5],
        targets=Targets("beams", "sampled"),
        codecs={"x": {"name": "topk", "k": 3}, "y": {"name": "threshold", "c": "1/8"}},
        rename={"x": "z"},
        shard_tokens=100,
        bleu_tokenizer="char",
    )
    plain = options_of(make_parser().parse_args(["compile", "a", "--out", "b"]))
    assert plain == CompileOptions(filters=[])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--filter", "loss"], "filter 'loss': expected one such as"),
        (["--targets", "beams"], "targets 'beams': expected the name"),
        (["--codec", "x"], "codec 'x': expected NAME=VALUE"),
        (["--codec", "x={name: [}"], "not YAML"),
        (["--codec", "x={name: topk}"], "codec of 'x': topk.k: Field required"),
        (["--rename", "x"], "rename 'x': expected NAME=VALUE"),
        (["--fraction", "half"], "'half' is no number or fraction"),
        (["--fraction", "0.5", "--count", "3"], "not allowed with argument"),
    ],
)
def test_bad_usage(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compile", "a", "--out", "b", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_it_prints_what_came_of_it(whole, tmp_path, capsys):
    words = ["compile", str(whole), "--out", str(tmp_path / "out"), "--signals", LOGITS]
    words += ["--filter", "tgt.length > 2", "--json"]
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    kept = [tgt for _, tgt in PAIRS if len(tgt) > 1]
    assert summary["samples"] == len(kept) == open_cache(tmp_path / "out").num_samples
    assert summary["left_out"] == {"tgt.length > 2": len(PAIRS) - len(kept)}
    assert summary["tokens"]["tgt"] == sum(len(tgt) + 1 for tgt in kept)
    labels = summary["signals"][LOGITS]
    assert (labels["kind"], labels["labels"]) == ("logits", summary["tokens"]["tgt"])
    data = sum(
        path.stat().st_size
        for folder in ("samples", LOGITS)
        for path in (tmp_path / "out" / folder).iterdir()
    )
    assert summary["bytes"] == data
    assert main(words[:-1]) == 0
    shown = capsys.readouterr().out
    assert ["left", "out.tgt.length", ">", "2", str(len(PAIRS) - len(kept))] in [
        line.split() for line in shown.splitlines()
    ]


def test_a_refusal_is_one_line(whole, tmp_path, capsys):
    assert main(["compile", str(whole), "--out", str(tmp_path / "o"), "--signals", "no"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kdcache: signals: no cache has a signal 'no'")
    assert error.count("\n") == 1


def test_inspect_shows_where_a_cache_came_from(whole, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["compile", str(whole), "--out", out, "--signals", LOGITS, "--count", "3"]) == 0
    assert main(["verify", out]) == 0
    capsys.readouterr()
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert f"compiled from  {whole} (12 samples)" in shown
    assert 'signals (kept: ["logits"]; missing: "refuse"), subset (count: 3; seed: 0)' in shown
    assert main(["inspect", out, "--json"]) == 0
    lineage = json.loads(capsys.readouterr().out)["lineage"]
    assert lineage["sources"][0]["corpus"] == open_cache(whole).manifest.corpus.digest
    assert lineage["operations"][1] == {"operation": "subset", "count": 3, "seed": 0}
    assert main(["inspect", str(whole), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lineage"] is None


def test_audit_says_where_to_look(whole, tmp_path, capsys):
    assert main(["compile", str(whole), "--out", str(tmp_path / "out")]) == 0
    assert main(["audit", str(tmp_path / "out")]) == 1
    assert f"a compiled cache has no teacher of its own; audit {whole}" in capsys.readouterr().err


def test_the_commands_of_the_docs_are_commands():
    page = Path(__file__).parents[2] / "docs" / "compile.md"
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(commands) > 15
    for name, *words in commands:
        assert name == "kdcache"
        arguments = make_parser().parse_args(words)
        options_of(arguments).check(len(arguments.caches))
