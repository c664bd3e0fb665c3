"""The command line: help, exit codes, and bad input in one line with nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdcache import __version__
from kdcache.cli import main, make_parser
from kdcache.formats.stores.store import STATUS
from kdcache.usage import command_parsers

COMMANDS = sorted(command_parsers(make_parser()))
STUDENT = {
    "model_type": "marian",
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, teacher, recipe and a finished cache, never written to by a test."""
    from tests.dump.conftest import make_lines, make_marian

    root = tmp_path_factory.mktemp("face")
    sides = make_lines(40)
    for name, lines in zip(("src", "tgt"), sides, strict=True):
        (root / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    make_marian(root / "teacher", [line for lines in sides for line in lines])
    corpus = {"fields": {"src": str(root / "src"), "tgt": str(root / "tgt")}}
    recipe = {
        "name": "tiny",
        "corpus": corpus,
        "dump": {
            "teacher": {"path": str(root / "teacher")},
            "shard_tokens": 300,
            "signals": {"logits": {"codec": {"name": "threshold", "c": "1/8"}}},
        },
        "train": {
            "student": {"config": STUDENT},
            "objective": [
                {"loss": "cross_entropy", "weight": 0.5},
                {"loss": "forward_kl", "weight": 0.5},
            ],
            "max_steps": 3,
            "batch_tokens": 64,
            "log_every": 1,
            "device": "cpu",
            "validation": {"corpus": corpus, "every_steps": 3, "limit_tokens": 100},
            "checkpoints": {"every_steps": 3, "average_last": 0},
        },
        "evaluate": {
            "corpus": {**corpus, "limit": 4},
            "num_beams": 2,
            "device": "cpu",
            "bootstrap_samples": 10,
            "latency_sentences": 2,
        },
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["dump", str(root / "recipe.yaml"), "--out", str(root / "cache")]) == 0
    return root


@pytest.fixture
def cache(world: Path, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return Path(shutil.copytree(world / "cache", tmp_path / "cache"))


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that has to fail, and return the one line it says."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    lines = capsys.readouterr().err.strip().split("\n")
    assert [line for line in lines if line.startswith("kdcache: ")] == [lines[-1]], lines
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory; how far a dump is, is none of a cache."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.parent.name != STATUS
    }


# Help and usage


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(text.split("\n")) <= 32
    assert all(len(line) <= 80 for line in text.split("\n"))
    assert [c for c in COMMANDS if c not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "example:\n  " in text
    assert f"kdcache {command}" in text.split("example:\n")[1]
    assert len(text.split("\n")) <= 40
    assert all(len(line) <= 80 for line in text.split("\n"))
    assert "--json" in text
    if command in ("dump", "train", "evaluate"):
        assert "--train.objective.0.weight 0.3" in text
        assert "--print-recipe" in text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nothing"],
        ["dump"],
        ["dump", "word-level"],
        ["train", "word-level", "--out", "x"],
        ["train", "word-level", "--ca", "x", "--out", "y"],
        ["train", "word-level", "--train.max_steps"],
        ["inspect", "x", "--samples", "-1"],
        ["inspect", "x", "--train.max_steps", "1"],
        ["dump", "word-level", "--name", "x", "--out", "y"],
    ],
    ids=lambda words: " ".join(words) or "nothing at all",
)
def test_bad_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(("usage: kdcache", "kdcache: "))
    assert len([line for line in said.splitlines() if line.startswith("kdcache")]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "kdcache: no command given; `kdcache --help` lists them, `kdcache quickstart` shows"),
        ("trian word-level", "kdcache: no command 'trian'; did you mean train? `kdcache --help`"),
        ("zzz", "kdcache: no command 'zzz'; `kdcache --help` lists them"),
        ("--vrsion", "kdcache: no option '--vrsion'; did you mean --version? `kdcache --help`"),
        ("train no-kd --cahce x", "error: no option --cahce; did you mean --cache? `kdcache train"),
        ("train no-kd --cahce=x", "error: no option --cahce; did you mean --cache? `kdcache train"),
        ("inspect a b", "kdcache inspect: error: unexpected 'b'; it takes no more words"),
        ("train no-kd --out r", "kdcache train: error: the following arguments are required: --c"),
        ("recipes --train.max_steps 1", "error: recipes takes no overrides, found --train.max"),
        ("dump word-level --rank 3/2", "argument --rank: "),
    ],
)
def test_bad_usage_says_what_to_do(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_recipe_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for name, near in (("word-levl", "word-level"), ("word-level-smal", "word-level-small")):
        line = fails(capsys, "train", name, "--cache", "x", "--out", "y")
        assert line == (
            f"kdcache: {name}: no such file and no built-in recipe of that name; did you mean "
            f"{near}? `kdcache recipes` lists them"
        )
    assert "of that name; `kdcache recipes`" in fails(capsys, "dump", "zzz.yaml", "--out", "y")


@pytest.mark.parametrize(
    ("package", "words", "said"),
    [
        ("s3fs", "inspect s3://bucket/x", "no driver for s3:// installed; pip install s3fs"),
        (
            "accelerate",
            "dump {world}/recipe.yaml --out {tmp}/c --dump.teacher.device_map auto",
            "needs the accelerate package; install it (pip install accelerate), or leave",
        ),
        (
            "matplotlib",
            "report {world}/cache --out {tmp}/page.html",
            "a report needs the matplotlib package; install it (pip install matplotlib)",
        ),
        (
            "tensorboard",
            "train {world}/recipe.yaml --cache {world}/cache --out {tmp}/run "
            "--train.log tensorboard",
            "needs the tensorboard package; install it (pip install tensorboard), or set",
        ),
    ],
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(
    package: str,
    words: str,
    said: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    assert said in fails(capsys, *words.format(world=world, tmp=tmp_path).split())
    assert not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"kdcache {__version__}\n"


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    for words, code in ((["recipes"], 0), (["verify", str(tmp_path / "no")], 1), (["no"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "kdcache", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert (done.stderr == "") == (code == 0)
        assert "Traceback" not in done.stderr


def test_interrupt_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kdcache.formats.checks.verify.verify_cache", interrupted)
    assert main(["verify", "x"]) == 130
    assert capsys.readouterr().err.startswith("kdcache: interrupted")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m kdcache train word-level --print-recipe | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


# Recipes


def test_print_recipe_takes_overrides_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "word-level", "--print-recipe", "--train.objective.0.weight", "0.3"]
    assert main([*words, "--train.objective.1.temperature=2", "--train.seed", "7"]) == 0
    train = yaml.safe_load(capsys.readouterr().out)["train"]
    assert [term["weight"] for term in train["objective"]] == [0.3, 0.5]
    assert train["objective"][1]["temperature"] == 2
    assert train["seed"] == 7
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["objective"][0]["weight"] == 0.3


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    names = [recipe["name"] for recipe in json.loads(capsys.readouterr().out)]
    assert {"no-kd-paper", "no-kd-small", "word-level-small"} <= set(names)
    assert main(["recipes"]) == 0
    assert "word-level" in capsys.readouterr().out


# The story in small


def test_dump_train_evaluate(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = str(world / "recipe.yaml"), str(tmp_path / "run")
    capsys.readouterr()
    assert main(["dump", recipe, "--out", str(tmp_path / "cache"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 40
    assert tree(tmp_path / "cache") == tree(world / "cache")
    assert main(["dump", recipe, "--out", str(tmp_path / "cache")]) == 0  # nothing left to do
    assert "samples" in capsys.readouterr().out
    assert main(["train", recipe, "--cache", str(tmp_path / "cache"), "--out", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert main(["evaluate", run, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["bleu"]["signature"]
    assert scores["num_sentences"] == 4
    assert main(["evaluate", run, "--evaluate.corpus.limit", "3"]) == 0
    assert "num sentences" in capsys.readouterr().out
    corpus = [f"--evaluate.corpus.fields.{side}={world / side}" for side in ("src", "tgt")]
    teacher = ["evaluate", str(world / "teacher"), *corpus, "--evaluate.corpus.limit", "2"]
    assert main([*teacher, "--evaluate.latency_sentences", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_sentences"] == 2


def test_inspect_shows_text_and_json(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(world / "cache"), "--samples", "2"]) == 0
    text = capsys.readouterr().out
    for words in ("40 of 40 rows", "threshold", "teacher's loss", "bytes per token", "row 20"):
        assert words in text
    assert main(["inspect", str(world / "cache"), "--json", "--samples", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["signals"]["logits"]["label_bytes_per_token"] > 1
    assert len(found["samples"]) == 1


def test_verify_shows_text_and_json(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(world / "cache")]) == 0
    assert "sound" in capsys.readouterr().out
    assert main(["verify", str(world / "cache"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


# Bad input to dump


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def long_line(world: Path) -> bytes:
    lines = (world / "src").read_bytes().split(b"\n")
    return b"\n".join([lines[0], b"the cat sees " * 60, *lines[2:]])


# Each case: what to give besides recipe and output, and what the line has to say.
BAD_DUMPS: dict[str, tuple[Callable[[Path, Path], list[str]], list[str]]] = {
    "missing file": (
        lambda world, tmp: ["--corpus.fields.src", str(tmp / "none.de")],
        ["none.de"],
    ),
    "unequal lengths": (
        lambda world, tmp: ["--corpus.fields.src", write(tmp / "short", b"the cat\nthe dog\n")],
        ["2", "40"],
    ),
    "broken utf-8": (
        lambda world, tmp: [
            "--corpus.fields.src",
            write(tmp / "broken", b"a\nb\xff\n" + b"c\n" * 38),
        ],
        ["broken", "2"],
    ),
    "empty line refused": (
        lambda world, tmp: [
            *("--corpus.fields.src", write(tmp / "gaps", b"the cat\n \n" + b"the dog\n" * 38)),
            *("--corpus.empty", "error"),
        ],
        ["1", "src"],
    ),
    "sample too long": (
        lambda world, tmp: [
            *("--corpus.fields.src", write(tmp / "long", long_line(world))),
            *("--dump.too_long", "error"),
        ],
        ["64", "src"],
    ),
    "recipe typo": (
        lambda world, tmp: ["--dump.shard_token", "10"],
        ["dump.shard_token: unknown key; did you mean shard_tokens?"],
    ),
    "unknown recipe": (lambda world, tmp: ["--corpus.format", "csv"], ["corpus.format"]),
    "no such column": (
        lambda world, tmp: [
            "--corpus",
            f"{{format: tsv, path: {write(tmp / 'a.tsv', b'de	en' + bytes([10]) + b'x	y')}, "
            "fields: {src: de, tgt: fr}}",
        ],
        ["fr", "de", "en"],
    ),
    "signals without a teacher": (lambda world, tmp: ["--dump.teacher", "null"], ["teacher"]),
    "missing teacher": (
        lambda world, tmp: ["--dump.teacher.path", str(tmp / "no-teacher")],
        ["no-teacher"],
    ),
    "damaged teacher": (
        lambda world, tmp: ["--dump.teacher.path", damaged_teacher(world, tmp)],
        ["bad-teacher"],
    ),
}


def damaged_teacher(world: Path, tmp: Path) -> str:
    path = Path(shutil.copytree(world / "teacher", tmp / "bad-teacher"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return str(path)


@pytest.mark.parametrize("case", BAD_DUMPS)
def test_bad_dumps_leave_nothing(
    case: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, expected = BAD_DUMPS[case]
    out = tmp_path / "out"
    given = words(world, tmp_path)
    if given[0] == "--corpus":
        given = [f"--corpus.{k}={v}" for k, v in yaml.safe_load(given[1]).items()]
    line = fails(capsys, "dump", world / "recipe.yaml", "--out", out, *given)
    assert [text for text in expected if text not in line] == [], line
    assert not out.exists()


def test_rows_are_dropped_by_the_stated_rules(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = long_line(world).split(b"\n")
    source = write(tmp_path / "src", b"\n".join([*lines[:3], b"  ", *lines[4:]]))
    words = ["dump", str(world / "recipe.yaml"), "--out", str(tmp_path / "out"), "--json"]
    capsys.readouterr()
    assert main([*words, "--corpus.fields.src", source]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 38
    assert sorted(summary["dropped"].values())[-2:] == [1, 1]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--corpus.limit", "20"], "corpus"),
        (["--dump.signals.logits.codec.c", "1/16"], "codec"),
        (["--dump.seed", "2"], "seed"),
        (["--dump.shard_tokens", "200"], "shard_tokens"),
        (["--dump.teacher.path", "{other}"], "teacher"),
    ],
    ids=["corpus", "codec", "seed", "shards", "teacher"],
)
def test_another_dump_into_a_cache_is_refused_with_both_sides(
    overrides: list[str],
    expected: str,
    world: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "{other}" in overrides:
        other = Path(shutil.copytree(world / "teacher", tmp_path / "other"))
        flip(other / "model.safetensors", 0.99)
        overrides = [overrides[0], str(other)]
    before = tree(cache)
    line = fails(capsys, "dump", world / "recipe.yaml", "--out", cache, *overrides)
    assert expected in line
    assert tree(cache) == before


@pytest.mark.parametrize("kind", ["file", "directory with a file", "below a file"])
def test_outputs_that_are_something_else(
    kind: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    out = place
    if kind == "directory with a file":
        place.mkdir()
        (place / "notes.txt").write_text("mine", encoding="utf-8")
    else:
        place.write_text("mine", encoding="utf-8")
        out = place / "out" if kind == "below a file" else place
    line = fails(capsys, "dump", world / "recipe.yaml", "--out", out)
    assert "place" in line
    kept = place / "notes.txt" if place.is_dir() else place
    assert kept.read_text(encoding="utf-8") == "mine"
    if place.is_dir():
        assert set(tree(place)) <= {"notes.txt"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=["full disk", "read-only"])
@pytest.mark.parametrize("after", [0, 3, 6], ids="after {} writes".format)
def test_a_disk_that_refuses(
    code: int,
    after: int,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    left = [after]
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        left[0] -= 1
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        line = fails(capsys, "dump", world / "recipe.yaml", "--out", out)
    assert {errno.ENOSPC: "disk is full", errno.EROFS: "read-only"}[code] in line.lower()
    # What was written stands; the same command finishes it to the same bytes.
    assert main(["dump", str(world / "recipe.yaml"), "--out", str(out)]) == 0
    assert tree(out) == tree(world / "cache")


# Bad caches


@pytest.mark.parametrize(
    "pattern",
    [
        "kdcache.json",
        "signals/logits.json",
        "commits/samples.00000.json",
        "commits/logits.00000.json",
        "samples/00000.*.arrow",
        "logits/00000.*.arrow",
        "tokenizers/teacher/vocab.json",
        "tokenizers/teacher/source.spm",
    ],
)
def test_one_flipped_bit_is_found(
    pattern: str, world: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(cache.glob(pattern))
    flip(file)
    assert str(cache) in fails(capsys, "verify", cache)
    words = ("train", world / "recipe.yaml", "--cache", cache, "--out", tmp_path / "run")
    line = fails(capsys, *words)
    assert file.name in line or str(cache) in line
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize("column", ["samples", "logits"])
@pytest.mark.parametrize("damage", ["truncated", "missing file", "missing commit"])
def test_damaged_shards(
    column: str,
    damage: str,
    world: Path,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = next((cache / column).glob("00000.*.arrow"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing file":
        file.unlink()
    else:
        (cache / "commits" / f"{column}.00000.json").unlink()
    line = fails(
        capsys, "train", world / "recipe.yaml", "--cache", cache, "--out", tmp_path / "run"
    )
    assert str(cache) in line
    fails(capsys, "verify", cache)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_cache(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "nothing there" in fails(capsys, command, tmp_path / "none")
    assert "not a cache" in fails(capsys, command, tmp_path / "empty")


# Bad input to train and evaluate


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--train.objective.1.signal", "other"], "no signal 'other'"),
        (["--train.objective.1.temperature", "0.2"], "0.2"),
        (["--train.objective.1.tail", "tail"], "train.objective.1.tail"),
        (["--train.source", "source"], "source"),
        (["--train.student", "null"], "student"),
        (["--train.student.config.model_type", "nothing"], "nothing"),
        (["--train.student.config.d_modle", "8"], "d_modle"),
        (["--train.validation.corpus.fields.src", "none.de"], "none.de"),
        (["--train.device", "gpu9"], "gpu9"),
    ],
    ids=lambda value: value[0].removeprefix("--train.") if isinstance(value, list) else "",
)
def test_bad_training(
    overrides: list[str],
    expected: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("train", world / "recipe.yaml", "--cache", world / "cache", "--out", tmp_path / "run")
    assert expected in fails(capsys, *words, *overrides)


def test_a_run_of_another_recipe_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(world / "recipe.yaml"), "--cache", str(world / "cache")]
    words += ["--out", str(tmp_path / "run"), "--train.max_steps", "1"]
    assert main(words) == 0
    before = tree(tmp_path / "run")
    line = fails(capsys, *words, "--train.optimizer.lr", "0.5")
    assert "lr" in line
    assert tree(tmp_path / "run") == before


def test_bad_evaluation(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    corpus = [f"--evaluate.corpus.fields.{side}={world / side}" for side in ("src", "tgt")]
    assert "empty" in fails(capsys, "evaluate", tmp_path / "empty", *corpus)
    assert "evaluate.corpus" in fails(capsys, "evaluate", world / "teacher")
    line = fails(capsys, "evaluate", world / "teacher", *corpus, "--evaluate.num_beam", "2")
    assert "evaluate.num_beam: unknown key; did you mean num_beams?" in line
    line = fails(capsys, "evaluate", world / "teacher", *corpus, "--against", tmp_path / "empty")
    assert "empty" in line
    corpus[0] = (
        f"--evaluate.corpus.fields.src={write(tmp_path / 'short', b'the cat' + bytes([10]))}"
    )
    assert "40" in fails(capsys, "evaluate", world / "teacher", *corpus)
