"""What each of several ranks does in the tests: `python -m tests.train.many_ranks FOLDER`.

FOLDER/jobs.json lists [function, keywords] to be called one after another in one process group,
since each process takes seconds to import what it needs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache.formats.cache import open_cache
from kdcache.recipe import parse_recipe
from kdcache.recipe.tree import read_yaml
from kdcache.train.families import encoder_decoder
from kdcache.train.runs import checkpoint, loop, trainer
from kdcache.train.runs.checkpoint import tied_weights
from kdcache.train.runs.parallel import Ranks, joined, whole
from kdcache.train.runs.stages import train_stages
from kdcache.train.students.distillation import Distillation


class Double(Distillation):
    """In float64, so that ranks can be compared with one."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.double()


def own_ranks() -> Ranks:
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def steps(tree: dict, cache: str, out: str, count: int) -> list[dict[str, Tensor]]:
    """Losses, gradients and weights of some steps in float64."""
    encoder_decoder.Distillation = Double  # type: ignore[misc]
    ranks, found = own_ranks(), []
    made = trainer.Trainer(parse_recipe(tree).train, open_cache(cache), ranks)
    real = made.optimizer.step
    gradients: dict[str, Tensor] = {}

    def keep_and_step() -> None:
        for name, parameter in made.distillation.named_parameters():
            if parameter.grad is not None:
                gradients[f"gradient {name}"] = whole(parameter.grad).clone()
        real()

    made.optimizer.step = keep_and_step  # type: ignore[method-assign]
    with closing(iter(made.stream)) as batches:
        for _ in range(count):
            gradients.clear()
            batch = next(batches)
            made.step(batch)
            values = torch.tensor(made.state.sums, dtype=torch.float64)
            made.state.sums = []
            weights = tied_weights(made.distillation, True)
            weights = {name: tensor.clone() for name, tensor in weights.items()}
            parts = torch.tensor([len(batch.micro), len(batch.spare), len(batch.rows)])
            found.append({"values": values, "parts": parts} | gradients | weights)
    encoder_decoder.Distillation = Distillation  # type: ignore[misc]
    torch.save(found, f"{out}.{ranks.rank}")
    return found


def train(
    tree: dict, cache: str, out: str, stop: int | None = None, overflow: int | None = None
) -> dict | None:
    """A run, or the beginning of one; gradients of one step may overflow on the last rank."""
    real, backward = trainer.Trainer.step, trainer.Trainer.backward

    def step(self, batch):
        if self.state.step == stop:
            raise KeyboardInterrupt
        real(self, batch)

    def overflowing(self, batch):
        values = backward(self, batch)
        if self.state.step + 1 == overflow and own_ranks().rank == own_ranks().world - 1:
            gradient = self.parameters[0].grad
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            local.view(-1)[0] = torch.inf
        return values

    trainer.Trainer.step, trainer.Trainer.backward = step, overflowing
    try:
        return loop.train(parse_recipe(tree), cache, out)
    except KeyboardInterrupt:
        return None
    finally:
        trainer.Trainer.step, trainer.Trainer.backward = real, backward


def stages(recipe: str, caches: dict[str, str], out: str, share: str) -> None:
    """A run of several stages, the first of which others may begin with too."""
    train_stages(parse_recipe(read_yaml(recipe)), caches, out, share)


def refused(tree: dict, cache: str, out: str, message: str, fault: str = "") -> None:
    """A run that cannot be: each rank says why."""
    real, forward = checkpoint.save_file, Distillation.forward

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def poisoned(self, *inputs):
        total, values = forward(self, *inputs)
        return (total * torch.nan if own_ranks().rank == 1 else total), values

    try:
        if fault == "disk":
            checkpoint.save_file = full
        if fault == "loss":
            Distillation.forward = poisoned
        loop.train(parse_recipe(tree), cache, out)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        Path(f"{message}.{own_ranks().rank}").write_text(text)
    finally:
        checkpoint.save_file, Distillation.forward = real, forward


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_ranks(folder: Path, jobs: Sequence[tuple[str, dict[str, Any]]], world: int = 2) -> None:
    """Run jobs on some ranks, and wait for their end."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command, port = [sys.executable, "-m", __name__, str(folder)], free_port()
    running = [
        subprocess.Popen(
            command,
            env=environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [one.communicate(timeout=300)[0] for one in running]
    assert [one.returncode for one in running] == [0] * world, "\n".join(said)[-6000:]


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads((Path(sys.argv[1]) / "jobs.json").read_text())
    with joined(torch.device("cpu")):  # the runs find it there
        for name, keywords in jobs:
            globals()[name](**keywords)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without waiting for the others
