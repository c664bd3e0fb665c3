"""`kdcache verify`: sound, broken and unfinished are told apart, in text and in JSON."""

import json
from pathlib import Path

import pytest

from kdcache.cli import main
from tests.formats.labels import make_cache


def verified(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["verify", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_sound(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = verified(capsys, tiny_cache)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tiny_cache}: sound, 16 files, ")
    code, out, err = verified(capsys, tiny_cache, "--quick")
    assert (code, err) == (0, "")
    assert out.startswith(f"{tiny_cache}: sound (sizes alone), 16 files, ")


def test_broken(tiny_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = tiny_cache.glob("logits/00001.*")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, out, err = verified(capsys, tiny_cache)
    assert code == 1
    assert out.splitlines()[0].startswith(f"{file}: xxh3 ")
    assert ": broken, " in out
    assert err == f"kdcache: {tiny_cache}: 1 fault found\n"
    code, out, err = verified(capsys, tiny_cache, "--quick")
    assert (code, err) == (0, "")  # its size is right
    file.write_bytes(data[:-1])
    code, out, err = verified(capsys, tiny_cache, "--quick", "--json")
    found = json.loads(out)
    assert code == 1
    assert (found["ok"], found["quick"]) == (False, True)
    assert found["faults"][0].startswith(f"{file}: {len(data) - 1} bytes, expected {len(data)}")


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_unfinished_is_not_broken(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_cache(tmp_path / "cache", skip_commits=[("logits", 2)])
    code, out, err = verified(capsys, root, *quick)
    assert code == 1
    assert "'logits' is unfinished: 1 of 3 shards are not committed (2)" in out
    assert f"{root}: unfinished" in out
    assert err == f"kdcache: {root}: nothing is broken, but its dump is unfinished\n"
    code, out, err = verified(capsys, root, "--json", *quick)
    found = json.loads(out)
    assert code == 1
    assert (found["ok"], found["faults"]) == (False, [])
    assert len(found["unfinished"]) == 1
