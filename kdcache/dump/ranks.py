"""Which part of a dump is this process's: shard i belongs to rank i mod world.

Ranks need no rendezvous: each commits by itself, what is done is read from the cache, and what two
of them should claim at once only one gets. So they may be the processes of one `torchrun`, tasks of
a job array that never run at the same time, or another number of them after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.errors import RecipeError


@dataclass(frozen=True)
class Ranks:
    """One of several processes that dump one cache.

    Attributes:
        rank: number of this one, from 0.
        world: how many there are.
        source: where the numbers come from, for messages.
    """

    rank: int = 0
    world: int = 1
    source: str = "one process"

    def own(self, num_shards: int) -> list[int]:
        """Shards of this process."""
        return list(range(self.rank, num_shards, self.world))

    def __str__(self) -> str:
        """For messages: "rank 2 of 8 (RANK, WORLD_SIZE)"."""
        return f"rank {self.rank} of {self.world} ({self.source})"


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """The rank that the launcher of this process gave it.

    Looked for in this order: RANK and WORLD_SIZE (torchrun, or set by hand); SLURM's tasks
    (SLURM_PROCID, SLURM_NTASKS) and its job arrays (SLURM_ARRAY_TASK_ID and its MIN, COUNT and
    STEP), the tasks of an array's jobs counted together.

    Args:
        environment: of the process.

    Raises:
        RecipeError: a variable is no number, or the rank is not below the world.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        rank, world = (_number(environment, key) for key in ("RANK", "WORLD_SIZE"))
        return _checked(rank, world, "RANK, WORLD_SIZE")
    rank, world, sources = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", 1))
        rank = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // step
        world = _number(environment, "SLURM_ARRAY_TASK_COUNT")
        sources.append("SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT")
    # A batch script has SLURM_NTASKS too, but only what srun starts is one of several tasks.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        tasks = _number(environment, "SLURM_NTASKS", 1)
        rank, world = rank * tasks + _number(environment, "SLURM_PROCID"), world * tasks
        sources.append("SLURM_PROCID, SLURM_NTASKS")
    return _checked(rank, world, "; ".join(sources)) if sources else Ranks()


def parse_ranks(text: str) -> Ranks:
    """The rank that `--rank R/WORLD` names.

    Raises:
        ValueError: it is not of that form.
    """
    rank, slash, world = text.partition("/")
    if not (slash and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"{text!r} is no rank; expected R/WORLD with R below WORLD, as in 0/4")
    return Ranks(int(rank), int(world), "--rank")


def _number(environment: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environment.get(key)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        found = "not set" if text is None else repr(text)
        raise RecipeError(
            f"environment: {key} is {found}, expected a number; set both of rank and world, or "
            "give --rank R/WORLD"
        )
    return int(text)


def _checked(rank: int, world: int, source: str) -> Ranks:
    if rank >= world:
        raise RecipeError(
            f"environment: rank {rank} of {world} ({source}); a rank is below the world: give "
            "--rank R/WORLD"
        )
    return Ranks(rank, world, source)
