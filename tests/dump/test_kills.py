"""Dumps that are killed, or asked to stop, and started again: the bytes are those of one that was
not. `benchmarks/bench_faults.py` does the same at every step."""

import os
import random
import re
import signal
import time

import pytest

from kdcache.formats.stores import disk
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import CLAIMS
from tests.dump.injection import Injection, Step
from tests.dump.ordeal import look
from tests.dump.verdicts import clear_stop, step_kinds


def chosen(ordeal, name: str, number: int) -> Step:
    """One of the steps of a name, spread over the dump."""
    steps = [step for step in step_kinds(ordeal.steps)[name] if not step.optional]
    return steps[random.Random(f"{name} {number}").randrange(len(steps))]


def test_a_dump_takes_every_kind_of_step(ordeal):
    assert set(step_kinds(ordeal.steps)) == set(disk.STEPS)
    assert ordeal.num_shards == 6
    folders = {step.path.split("/")[0] for step in ordeal.steps}
    assert {"commits", "samples", "signals", "tokenizers", "logits", "hidden", "beams"} <= folders


def last(steps: list[Step], name: str, path: str) -> int:
    """Place of the last step of a name on a path; -1 where there is none."""
    return max((at for at, s in enumerate(steps) if (s.name, s.path) == (name, path)), default=-1)


def test_nothing_has_its_name_before_it_is_durable(ordeal):
    """A kill leaves what the system has in memory; a failing machine does not, so order matters."""
    named = 0
    for at, step in enumerate(ordeal.steps):
        if step.name not in ("rename", "link") or step.optional:
            continue
        before, named = list(ordeal.steps[:at]), named + 1
        folder, _, file = step.path.rpartition("/")
        temporary = f"{folder}/.tmp-{re.sub('-[0-9a-f]{16}', '', file)}".lstrip("/")
        written = {s.path for s in before if s.name == "create" and s.path.startswith(temporary)}
        assert written, step
        for path in written:
            assert -1 < last(before, "write", path) < last(before, "fsync", path), path
        if file.endswith(".zarr"):
            synced = last(before, "sync_folder", temporary)
            assert synced > max(last(before, "fsync", path) for path in written)
        if folder == "commits":
            signal_name, shard, _ = file.split(".")
            parts = [s for s in before if s.path.startswith(f"{signal_name}/{shard}.")]
            assert {s.name for s in parts} == {"rename"}
            synced = last(before, "sync_folder", signal_name)
            assert synced > max(before.index(part) for part in parts)
        if step.name == "link":  # the claim is given back after the name is durable
            after = list(ordeal.steps[at:])
            released = last(after, "unlink", f".locks/{claim_of(folder, file)}")
            assert last(after[:released], "sync_folder", folder or ".") > 0, step
    assert named == 5 * 2 * ordeal.num_shards + 4 + 1 + number_of_tokenizer_files(ordeal)


def claim_of(folder: str, record: str) -> str:
    name = record.removesuffix(".json")
    mine = folder in ("commits", "signals") and not name.startswith("samples.")
    return name if mine else "samples"


def number_of_tokenizer_files(ordeal) -> int:
    return sum(name.startswith("tokenizers/") and name[-1] != "/" for name in ordeal.expected)


@pytest.mark.parametrize("name", disk.STEPS)
def test_killed_before_a_step(name, ordeal):
    problems = ordeal.killed(Injection(chosen(ordeal, name, 0)))
    assert not problems, str(problems)


@pytest.mark.parametrize("number", range(2))
def test_killed_in_the_middle_of_a_write(number, ordeal):
    problems = ordeal.killed(Injection(chosen(ordeal, "write", number + 1), torn=True))
    assert not problems, str(problems)


@pytest.mark.parametrize("path", ["commits/.tmp-logits.00003.json", ".tmp-kdcache.json"])
def test_killed_when_a_record_has_two_names(path, ordeal):
    """Between link and unlink; the sweep must remove the other name and nothing else."""
    out = ordeal.new()
    ended = ordeal.run(out, injection=Injection(Step("unlink", path, 0)))
    assert ended.code == -signal.SIGKILL
    record = out / path.replace(".tmp-", "")
    [temporary] = record.parent.glob(".tmp-*")
    assert temporary.samefile(record)
    problems = ordeal.finished(out, path)
    assert not problems, str(problems)


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(seed, ordeal):
    draw = random.Random(seed)
    delays = [draw.uniform(0, ordeal.seconds) for _ in range(2)]
    problems = ordeal.signalled(signal.SIGKILL, delays)
    assert not problems, str(problems)


def test_stopped_at_random_moments(ordeal):
    draw = random.Random(10)
    delays = [draw.uniform(0.1, ordeal.seconds) for _ in range(2)]
    problems = ordeal.signalled(signal.SIGTERM, delays)
    assert not problems, str(problems)


@pytest.mark.parametrize("claim", ["samples", "hidden", "logits.00002"])
def test_stopped_while_another_process_has_what_it_needs(claim, ordeal):
    """It says where to go on, leaves nothing half done, and the other is left alone."""
    out = ordeal.new()
    held = LocalStore(out).claim(claim)
    fork = ordeal.start(out)
    theirs = out / "logits/.tmp-1-00002.0.arrow"
    if claim == "logits.00002":
        look(theirs.parent.exists)
        theirs.write_bytes(b"of a process that writes")
    before = {"samples": ".status", "hidden": "commits/beams.00005.json"}
    look((out / before.get(claim, "commits/logits.00005.json")).exists)
    time.sleep(0.3)
    fork.send(signal.SIGTERM)
    ended = fork.wait()
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert clear_stop(ended, out)
    assert os.listdir(out / CLAIMS) == [claim]
    assert claim != "logits.00002" or theirs.exists()
    held.release(tidy=False)  # as if it had died
    problems = ordeal.finished(out, claim)
    assert not problems, str(problems)


def test_leftovers_of_other_dumps_are_swept(ordeal):
    """Another machine's bytes have other digests; they and all temporaries go with their claim."""
    out = ordeal.new()
    step = Step("link", "commits/logits.00003.json", 0)
    assert ordeal.run(out, injection=Injection(step)).code == -signal.SIGKILL
    (out / CLAIMS / "hidden.00001").touch()  # committed, and its holder died before it let go
    (out / CLAIMS / "logits.00004").touch()
    planted = [
        "logits/00003.0-0123456789abcdef.arrow",
        "logits/00003.7-0123456789abcdef.arrow",
        "logits/.tmp-77777-00004.0.arrow",
        "commits/.tmp-77777-logits.00004.json",
        "hidden/00001.1-0123456789abcdef.zarr/values/zarr.json",
        "hidden/.tmp-77777-00001.0.zarr/values/c/0/0/0",
        "commits/.tmp-77777-hidden.00001.json",
        ".status/.tmp-77777-00000-of-00001.json",
    ]
    for name in planted:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"left over")
    problems = ordeal.finished(out, "planted leftovers")
    assert not problems, str(problems)


@pytest.mark.slow
def test_the_command_itself_killed(ordeal):
    problems = ordeal.really_killed(random.Random(1))
    assert not problems, str(problems)
