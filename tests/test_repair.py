"""Repair from a mirror: exactly what is broken or missing is fetched again, and checked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from kdcache.cli import main
from kdcache.errors import FormatError, StorageError
from kdcache.formats.checks.verify import verify_cache
from kdcache.formats.codec import ThresholdCodec
from kdcache.formats.manifest import CommitRecord
from kdcache.formats.record import decode_record, encode_record
from kdcache.repair import repair_cache
from tests.formats.damage import files_by_kind
from tests.formats.kinds import make_kinds

SIGNALS = ["masks", "beams", "masked_hidden", "attention", "classes", "at_masked", "every"]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with signals of all kinds; not to be changed."""
    codecs = {"logits": ThresholdCodec(c=1 / 8)}
    folder = tmp_path_factory.mktemp("mirror")
    cut = {"shard_tokens": 36, "part_samples": 3}
    return make_kinds(folder / "cache", only=SIGNALS, codecs=codecs, **cut).root


@pytest.fixture
def own(mirror: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(mirror, tmp_path / "own")
    return tmp_path / "own"


def contents(root: Path) -> dict[str, bytes]:
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file() and ".locks" not in file.parts
    }


def stamps(root: Path, but: set[str]) -> dict[str, tuple[int, int]]:
    """When each file was written, and which it is."""
    found = {name: (root / name).stat() for name in contents(root) if name not in but}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "a bit":
        half = len(data) // 2
        file.write_bytes(data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()


HOWS = ["a bit", "cut", "missing"]


@pytest.mark.parametrize("how", HOWS)
def test_every_kind_of_file_is_fetched_again(mirror: Path, own: Path, how: str) -> None:
    for kind, paths in files_by_kind(mirror).items():
        path = paths[-1]
        damage(own / path, how)
        before = stamps(own, {path})
        report = repair_cache(own, mirror)
        assert (report.verified.faults, report.verified.unfinished) == ([], []), kind
        assert (report.failed, report.repaired) == ([], [f"{path}: fetched from {mirror}"])
        assert report.faults
        assert contents(own) == contents(mirror)
        assert stamps(own, {path}) == before


@pytest.mark.parametrize("how", HOWS)
def test_every_file_at_once(mirror: Path, own: Path, how: str) -> None:
    paths = {path for paths in files_by_kind(mirror).values() for path in paths}
    kept = {path for number, path in enumerate(sorted(paths)) if number % 3 == 0} | {"kdcache.json"}
    if how == "missing":  # a signal of which nothing is left is no part of the cache
        kept |= {path for path in paths if path.startswith("signals/")}
    for path in paths - kept:
        damage(own / path, how)
    before = stamps(own, paths - kept)
    report = repair_cache(own, mirror)
    assert (report.verified.faults, report.failed) == ([], [])
    assert {line.split(": ")[0] for line in report.repaired} == paths - kept
    assert contents(own) == contents(mirror)
    assert stamps(own, paths - kept) == before


@pytest.mark.parametrize(
    "kind", ["commit of a signal", "signal record", "Zarr metadata", "samples"]
)
def test_exchanged_files_are_put_right(mirror: Path, own: Path, kind: str) -> None:
    first, *_, last = files_by_kind(mirror)[kind]
    shutil.copy(mirror / first, own / last)
    shutil.copy(mirror / last, own / first)
    report = repair_cache(own, mirror)
    assert (report.verified.faults, report.failed) == ([], [])
    assert contents(own) == contents(mirror)


@pytest.mark.parametrize(
    "path", ["signals/logits.json", "commits/logits.00001.json", "kdcache.json"]
)
def test_records_of_another_cache_are_put_right(mirror: Path, own: Path, path: str) -> None:
    codecs = {"logits": ThresholdCodec(c=1 / 9)}
    sentences = {"src": ["ab"] * 8, "tgt": ["ba"] * 8} if path == "kdcache.json" else None
    cut = {"shard_tokens": 36, "part_samples": 3, "sentences": sentences}
    other = make_kinds(own.parent / "other", only=[], codecs=codecs, **cut).root
    shutil.copy(other / path, own / path)
    assert verify_cache(own).faults
    report = repair_cache(own, mirror)
    assert (report.verified.faults, report.failed) == ([], [])
    assert contents(own) == contents(mirror)


def test_a_commit_that_alone_disagrees_with_its_record_is_put_right(
    mirror: Path, own: Path
) -> None:
    path = "commits/logits.00001.json"
    record = decode_record(CommitRecord, (own / path).read_bytes(), path)
    (own / path).write_bytes(encode_record(record.model_copy(update={"record": "0" * 32})))
    report = repair_cache(own, mirror)
    assert (report.verified.faults, report.failed) == ([], [])
    assert report.repaired == [f"{path}: fetched from {mirror}"]


def test_a_link_out_of_the_cache_is_replaced(mirror: Path, own: Path) -> None:
    (file,) = own.glob("logits/00001.0-*.arrow")
    outside = file.rename(own.parent / "outside")
    file.symlink_to(outside)
    report = repair_cache(own, mirror)
    assert (report.verified.faults, report.failed) == ([], [])
    assert not file.is_symlink()
    assert outside.read_bytes() == file.read_bytes()


def test_nothing_is_written_through_a_folder_that_lies_elsewhere(mirror: Path, own: Path) -> None:
    outside = (own / "logits").rename(own.parent / "outside")
    (own / "logits").symlink_to(outside)
    damage(next(outside.glob("00001.0-*.arrow")), "cut")
    before = contents(outside)
    report = repair_cache(own, mirror)
    assert "a link that leads out of the cache" in report.failed[0]
    assert contents(outside) == before


def test_a_strange_file_in_a_group_is_removed(mirror: Path, own: Path) -> None:
    (group,) = own.glob("attention/00001.0-*.zarr")
    (group / "values" / "c" / "note").write_text("x")
    before = stamps(own, set())
    report = repair_cache(own, None)
    assert report.verified.faults == report.failed == []
    assert contents(own) == contents(mirror)
    assert stamps(own, set()).items() <= before.items()


def test_a_commit_beyond_the_plan_is_removed(mirror: Path, own: Path) -> None:
    record = decode_record(
        CommitRecord, (own / "commits/masks.00001.json").read_bytes(), "x"
    ).model_copy(update={"shard": 7, "parts": []})
    (own / "commits/masks.00007.json").write_bytes(encode_record(record))
    report = repair_cache(own)
    assert report.repaired == ["commits/masks.00007.json: removed, it belongs to nothing"]
    assert report.verified.faults == []
    assert contents(own) == contents(mirror)


def test_places_on_an_object_store(mirror: Path, tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(mirror), "/repair/own", recursive=True)
    files.put(str(mirror), "/repair/mirror", recursive=True)
    paths = sorted(paths[-1] for paths in files_by_kind(mirror).values())
    for path in paths:
        data = files.cat_file(f"/repair/own/{path}")
        files.pipe_file(f"/repair/own/{path}", data[:-1] + bytes([data[-1] ^ 1]))
    report = repair_cache("memory://repair/own", "memory://repair/mirror")
    assert (report.verified.faults, report.failed) == ([], [])
    assert [line.split(": ")[0] for line in sorted(report.repaired)] == paths
    for path, data in contents(mirror).items():
        assert files.cat_file(f"/repair/own/{path}") == data


def test_a_mirror_that_is_damaged_too(mirror: Path, own: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(mirror, copy)
    paths = files_by_kind(mirror)
    broken = [paths[kind][-1] for kind in ("logits (Arrow)", "commit of samples", "samples")]
    for path in broken:
        damage(own / path, "a bit")
        damage(copy / path, "a bit")
    sound = paths["beams (Arrow)"][0]
    damage(own / sound, "cut")
    half = contents(own)
    report = repair_cache(own, copy)
    assert report.repaired == [f"{sound}: fetched from {copy}"]
    assert len(report.failed) == 2
    assert any("damaged there too" in line for line in report.failed)
    assert not any("\n" in line for line in report.failed)
    assert contents(own) == {**half, sound: contents(mirror)[sound]}
    assert report.verified.faults


def test_a_mirror_of_something_else_is_refused(own: Path, tmp_path: Path) -> None:
    other = make_kinds(tmp_path / "other", only=[], sentences={"src": ["a"], "tgt": ["b"]}).root
    damage(next(own.glob("logits/00001.0-*.arrow")), "cut")
    half = contents(own)
    report = repair_cache(own, other)
    assert "the mirror is of another cache: corpus.digest" in report.failed[0]
    assert contents(own) == half
    with pytest.raises(StorageError, match="--mirror names the cache itself"):
        repair_cache(own, own)
    with pytest.raises(FormatError, match="nothing there"):
        repair_cache(tmp_path / "none", own)


def test_a_shard_in_another_form_takes_what_was_made_from_it_with_it(
    mirror: Path, own: Path
) -> None:
    """The masks of one shard are others here, though sound: the mirror's need its own signals."""
    path = "commits/masks.00001.json"
    record = decode_record(CommitRecord, (own / path).read_bytes(), path)
    (file,) = own.glob("masks/00001.0-*.arrow")
    changed = record.model_copy(update={"tokens": record.tokens + 1})
    (own / path).write_bytes(encode_record(changed))  # the count is wrong, so it is a fault
    report = repair_cache(own, mirror)
    assert (report.verified.faults, report.failed) == ([], [])
    assert report.repaired == [f"{path}: fetched from {mirror}"]
    assert contents(own) == contents(mirror)
    for signal in ("at_masked", "masked_hidden"):
        path = f"commits/{signal}.00001.json"
        record = decode_record(CommitRecord, (own / path).read_bytes(), path)
        inputs = {"masks": "0" * 32}
        (own / path).write_bytes(encode_record(record.model_copy(update={"inputs": inputs})))
    damage(file, "cut")
    assert repair_cache(own, mirror).verified.faults == []
    assert contents(own) == contents(mirror)


def test_the_command(mirror: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = own.glob("logits/00001.0-*.arrow")
    path = file.relative_to(own).as_posix()
    damage(file, "cut")
    assert main(["verify", str(own)]) == 1
    capsys.readouterr()
    assert main(["verify", str(own), "--repair", "--mirror", str(mirror)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{path}: fetched from {mirror}"
    assert out[1].startswith(f"{own}: sound, ")
    damage(file, "cut")
    assert main(["verify", str(own), "--repair", "--mirror", str(mirror), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["repaired"] == [f"{path}: fetched from {mirror}"]
    assert document["failed"] == []
    assert path in document["found"][0]


def test_what_cannot_be_repaired_exits_1(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(next(own.glob("logits/00001.0-*.arrow")), "cut")
    before = contents(own)
    assert main(["verify", str(own), "--repair"]) == 1
    done = capsys.readouterr()
    assert "not repaired" in done.out
    assert "it does not say how it was dumped; name what it was made with by --recipe" in done.out
    assert done.err.endswith("1 fault found\n")
    assert contents(own) == before


@pytest.mark.parametrize(
    "words",
    [
        ["--mirror", "x"],
        ["--recipe", "x"],
        ["--dump.seed", "3"],
        ["--repair", "--quick"],
        ["--repair", "--mirror", "x", "--recipe", "y"],
        ["--repair", "--mirror", "x", "--dump.seed", "3"],
    ],
)
def test_options_that_do_not_go_together(
    own: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(own), *words])
    assert caught.value.code == 2
    assert "argument --" in capsys.readouterr().err


def test_a_mirror_needs_no_torch(mirror: Path, own: Path) -> None:
    import subprocess
    import sys

    damage(next(own.glob("logits/00001.0-*.arrow")), "cut")
    code = (
        "import sys; from kdcache.repair import repair_cache; "
        f"r = repair_cache({str(own)!r}, {str(mirror)!r}); "
        "assert not r.verified.faults; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
