"""Many processes and one cache: its bytes are those of a dump by one."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from kdcache.dump.ranks import Ranks, parse_ranks, ranks_from
from kdcache.errors import RecipeError
from kdcache.formats.stores.local import LocalStore
from kdcache.formats.stores.store import CLAIMS
from kdcache.formats.writer import CacheWriter
from tests.dump.injection import Injection, Step
from tests.dump.ordeal import look

ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}
TASK = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({}, 0, 1),
        ({"RANK": "2", "WORLD_SIZE": "5"}, 2, 5),
        ({"RANK": "2", "WORLD_SIZE": "5", **TASK}, 2, 5),
        (TASK, 1, 3),
        ({"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}, 0, 1),
        (ARRAY, 2, 4),
        (ARRAY | TASK, 7, 12),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}, 1, 2),
    ],
    ids=["none", "torchrun", "torchrun in SLURM", "srun", "sbatch", "array", "both", "from 0"],
)
def test_the_rank_that_a_launcher_gives(environment, rank, world):
    found = ranks_from(environment)
    assert (found.rank, found.world) == (rank, world)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, expected a number"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', expected a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2 .* below the world"),
        (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, "rank 2 of 2 .SLURM_ARRAY_TASK_ID"),
    ],
)
def test_what_is_no_rank(environment, message):
    with pytest.raises(RecipeError, match=message) as caught:
        ranks_from(environment)
    assert "--rank R/WORLD" in str(caught.value)


def test_every_shard_belongs_to_one_rank():
    for world in (1, 2, 3, 5, 9):
        own = [Ranks(rank, world).own(6) for rank in range(world)]
        assert sorted(shard for shards in own for shard in shards) == list(range(6))
        assert all(shard % world == rank for rank in range(world) for shard in own[rank])
    assert parse_ranks("1/4") == Ranks(1, 4, "--rank")
    for text in ("4/4", "1", "1/", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="is no rank; expected R/WORLD"):
            parse_ranks(text)


@pytest.mark.parametrize(
    ("sizes", "in_turn"),
    [([3], False), ([5, 2], False), ([2, 3], True), ([9], False)],
    ids=["3 at once", "5 killed, then 2", "2 killed, then 3, in turn", "more than shards"],
)
def test_any_number_of_ranks(sizes, in_turn, ordeal):
    problems = ordeal.worlds(sizes, random.Random(str(sizes)), in_turn)
    assert not problems, str(problems)


def committed(out: Path, signal_name: str) -> set[int]:
    return {int(path.name.split(".")[1]) for path in out.glob(f"commits/{signal_name}.*.json")}


def test_the_death_of_a_rank_costs_its_current_shard_only(ordeal):
    out = ordeal.new()
    death = Injection(Step("link", "commits/logits.00004.json", 0))
    forks = [
        ordeal.start(
            out,
            injection=death if rank == 1 else None,
            environment={"RANK": str(rank), "WORLD_SIZE": "3"},
        )
        for rank in range(3)
    ]
    assert [fork.wait().code for fork in forks] == [0, -signal.SIGKILL, 0]
    every = {0, 1, 2, 3, 4, 5}
    for name in ("samples", "beams", "best", "hidden"):
        assert committed(out, name) == every, name
    assert committed(out, "logits") == every - {4}
    summaries = [json.loads(ended.out) for ended in ordeal.shared(out, 2, {})]
    written = [s["signals"]["logits"]["shards_written"] for s in summaries]
    assert written == [1, 0]
    assert summaries[0]["complete"]
    problems = ordeal.judged(out, "rank 1 of 3 died")
    assert not problems, str(problems)


@pytest.mark.parametrize("number", [2, 3])
def test_dumps_that_know_nothing_of_each_other(number, ordeal):
    problems = ordeal.together(number, 0.02)
    assert not problems, str(problems)


def test_tasks_of_slurm(ordeal):
    out = ordeal.new()
    environments = [TASK | {"SLURM_PROCID": str(task), "SLURM_NTASKS": "2"} for task in range(2)]
    found = [ordeal.run(out, environment=environment) for environment in environments]
    assert [json.loads(ended.out)["rank"] for ended in found] == [0, 1]
    problems = ordeal.judged(out, "srun")
    assert not problems, str(problems)


def test_jobs_of_a_slurm_array(ordeal):
    out = ordeal.new()
    jobs = [ARRAY | {"SLURM_ARRAY_TASK_ID": str(3 + 2 * n)} for n in range(4)]
    forks = [ordeal.start(out, environment=job) for job in reversed(jobs)]
    found = [json.loads(fork.wait().out) for fork in forks]
    assert [(s["rank"], s["world"]) for s in found] == [(3, 4), (2, 4), (1, 4), (0, 4)]
    problems = ordeal.judged(out, "array")
    assert not problems, str(problems)


@pytest.mark.parametrize("dies", [False, True], ids=["tidies up", "dies"])
def test_a_shard_that_another_process_has_is_looked_at_again(dies, ordeal):
    """Whoever sweeps a dead writer's shard has its claim for a moment; it must not be skipped."""
    out = ordeal.new()
    held = LocalStore(out).claim("beams.00001")
    fork = ordeal.start(out)
    look((out / "commits/beams.00005.json").exists)
    time.sleep(0.1)
    assert not (out / "commits/beams.00001.json").exists()
    held.release(tidy=not dies)
    ended = fork.wait()
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["signals"]["beams"]["shards_written"] == 6
    problems = ordeal.judged(out, "held")
    assert not problems, str(problems)


def test_a_sweep_leaves_alone_what_others_write(tiny_cache):
    """The claims of one thing must not remove another's temporaries."""
    (tiny_cache / CLAIMS).mkdir(exist_ok=True)
    (tiny_cache / CLAIMS / "logits").touch()
    (tiny_cache / CLAIMS / "logits.00001").touch()
    theirs = [
        "signals/.tmp-1-hidden.json",
        "commits/.tmp-1-logits.00002.json",
        "logits/.tmp-1-00002.0.arrow",
        "logits/00002.0-0123456789abcdef.arrow",
    ]
    mine = [
        "signals/.tmp-1-logits.json",
        "commits/.tmp-1-logits.00001.json",
        "logits/.tmp-1-00001.0.arrow",
        "logits/00001.0-0123456789abcdef.arrow",
    ]
    for name in theirs + mine:
        (tiny_cache / name).write_bytes(b"")
    with CacheWriter(tiny_cache) as writer:
        for shard in (None, 1):
            with writer.claimed("logits", shard) as got:
                assert got
    assert [name for name in theirs + mine if (tiny_cache / name).exists()] == theirs


def test_a_dump_that_fails_takes_nothing_from_one_that_runs(ordeal, tmp_path):
    """It made the folder, found its own corpus wrong, and leaves while the other begins."""
    recipe = ordeal.recipe.read_text().replace("batch_tokens", "max_tokens: 2\n  batch_tokens")
    (tmp_path / "recipe.yaml").write_text(recipe)
    for pause in (0.0, 0.05):
        out = ordeal.new()
        wrong = ["dump", str(tmp_path / "recipe.yaml"), "--out", str(out)]
        failing = [ordeal.forks.start(wrong, out)]
        time.sleep(pause)
        fork = ordeal.start(out)
        failing += [ordeal.forks.start(wrong, out) for _ in range(2)]
        assert {one.wait().code for one in failing} == {1}
        ended = fork.wait()
        assert ended.code == 0, ended.err
        problems = ordeal.judged(out, "disturbed")
        assert not problems, str(problems)


@pytest.mark.slow
def test_torchrun_and_the_death_of_one_of_its_ranks(ordeal):
    problems = ordeal.under_torchrun()
    assert not problems, str(problems)
