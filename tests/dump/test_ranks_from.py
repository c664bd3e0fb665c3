"""Which part of a dump is a process's, as its launcher says."""

from __future__ import annotations

import pytest

from kdcache.dump.ranks import Ranks, parse_ranks, ranks_from
from kdcache.errors import RecipeError

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "MASTER_ADDR": "node7"}
BATCH = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
SRUN = {**BATCH, "SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "6",
    "SLURM_ARRAY_TASK_COUNT": "4",
}


@pytest.mark.parametrize(
    ("environment", "rank", "world", "source"),
    [
        ({}, 0, 1, "one process"),
        ({"LOCAL_RANK": "3", "SLURM_JOB_ID": "77"}, 0, 1, "one process"),
        (TORCHRUN, 2, 8, "RANK, WORLD_SIZE"),
        ({**SRUN, **ARRAY, **TORCHRUN}, 2, 8, "RANK, WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 0, 1, "RANK, WORLD_SIZE"),
        (SRUN, 3, 4, "SLURM_PROCID, SLURM_NTASKS"),
        # A batch script is one process, whatever the job may start.
        (BATCH, 0, 1, "one process"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, 0, 1, "SLURM_PROCID, SLURM_NTASKS"),
        # sbatch --array=3-6
        ({**ARRAY, **BATCH}, 2, 4, "SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT"),
        # sbatch --array=0-9:3
        (
            {
                "SLURM_ARRAY_TASK_ID": "9",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "3",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            3,
            4,
            "SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT",
        ),
        # The third of four jobs, the fourth of its four tasks.
        (
            {**ARRAY, **SRUN},
            2 * 4 + 3,
            4 * 4,
            "SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT; SLURM_PROCID, SLURM_NTASKS",
        ),
    ],
)
def test_launchers(environment: dict[str, str], rank: int, world: int, source: str) -> None:
    found = ranks_from(environment)
    assert (found.rank, found.world, found.source) == (rank, world, source)
    assert str(found) == f"rank {rank} of {world} ({source})"


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("tasks", [1, 4])
def test_an_array_of_sruns_is_every_rank_once(jobs: int, tasks: int) -> None:
    found = [
        ranks_from(
            {
                "SLURM_ARRAY_TASK_ID": str(10 + 5 * job),
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "5",
                "SLURM_ARRAY_TASK_COUNT": str(jobs),
                "SLURM_PROCID": str(task),
                "SLURM_NTASKS": str(tasks),
                "SLURM_STEP_ID": "1",
            }
        )
        for job in range(jobs)
        for task in range(tasks)
    ]
    assert [ranks.rank for ranks in found] == list(range(jobs * tasks))
    assert {ranks.world for ranks in found} == {jobs * tasks}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2"}, "WORLD_SIZE is not set, expected a number"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, expected a number"),
        ({"RANK": "two", "WORLD_SIZE": "8"}, "RANK is 'two', expected a number"),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, "RANK is '-1', expected a number"),
        ({"RANK": "", "WORLD_SIZE": "8"}, "RANK is '', expected a number"),
        ({"RANK": "8", "WORLD_SIZE": "8"}, r"rank 8 of 8 \(RANK, WORLD_SIZE\)"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, r"rank 0 of 0 \(RANK, WORLD_SIZE\)"),
        ({**SRUN, "SLURM_PROCID": "1.5"}, "SLURM_PROCID is '1.5', expected a number"),
        ({**SRUN, "SLURM_PROCID": "4"}, r"rank 4 of 4 \(SLURM_PROCID, SLURM_NTASKS\)"),
        ({"SLURM_ARRAY_TASK_ID": "5"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        # sbatch --array=1,5,7 has no ranks that count on.
        (
            {**ARRAY, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1"},
            r"rank 6 of 4 \(SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT\)",
        ),
    ],
)
def test_what_launchers_do_not_say(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        ranks_from(environment)
    assert str(caught.value).startswith("environment: ")
    assert str(caught.value).endswith("give --rank R/WORLD")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_every_shard_belongs_to_one_rank(world: int) -> None:
    owners = {shard: rank for rank in range(world) for shard in Ranks(rank, world).own(7)}
    assert owners == {shard: shard % world for shard in range(7)}
    assert sum(len(Ranks(rank, world).own(7)) for rank in range(world)) == 7


def test_a_rank_by_hand() -> None:
    found = parse_ranks("3/12")
    assert (found.rank, found.world) == (3, 12)
    assert str(found) == "rank 3 of 12 (--rank)"


@pytest.mark.parametrize("text", ["", "3", "3/", "/3", "3/3", "4/3", "-1/3", "a/3", "1/2/3", "0/0"])
def test_what_is_no_rank(text: str) -> None:
    with pytest.raises(ValueError, match="expected R/WORLD"):
        parse_ranks(text)
