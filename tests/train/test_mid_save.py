"""A run that is killed at any of the things it does to its files goes on as if it had not been."""

import os
import subprocess
import sys

import pytest

from kdcache.recipe import dump_recipe
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer

#: Runs a recipe over and over from the same half, in forks that are killed at their first, second,
#: third, ... change of a file; then goes on. A new interpreter, so that forks hold no threads.
SCRIPT = """
import itertools, os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
os.fsync = os.fstat  # no power fails here
from kdcache.formats.cache import open_cache
from kdcache.recipe import load_recipe
from kdcache.train.runs import checkpoint
from kdcache.train.runs.loop import train
from kdcache.train.runs.trainer import Trainer
from tests.train.test_loop import metrics, weights

recipe, cache, root = load_recipe(sys.argv[1]), sys.argv[2], sys.argv[3]
half, run, whole = (os.path.join(root, name) for name in ("half", "run", "whole"))
Trainer(recipe.train, open_cache(cache))  # imports what every fork would
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(9)
    return os.waitpid(child, 0)[1]


def killed_at(number):
    left = itertools.count(number, -1)

    def tick(before=lambda: None):
        if next(left) == 0:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, args):
        if event == "open":
            writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if not writes or not str(args[0]).startswith(run):
                return
        elif event not in CHANGES:
            return
        tick()

    def in_half(real):  # Rust writes the tensors; the audit sees nothing of it
        def save_file(tensors, path):
            tick()
            real(tensors, path)
            tick(lambda: os.truncate(path, os.path.getsize(path) // 2))
        return save_file

    def step(self, batch, real=Trainer.step):
        if self.state.step == 3:  # the saves of the last step are enough
            sys.addaudithook(watch)
            checkpoint.save_file = in_half(checkpoint.save_file)
            real_sync = checkpoint.sync
            checkpoint.sync = lambda path: (tick(), real_sync(path))
        real(self, batch)

    Trainer.step = step
    train(recipe, cache, run)


for number in itertools.count(step=int(sys.argv[4])):
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(half, run)
    ended = forked(lambda: killed_at(number))
    if ended == 0:
        break  # it has no such change any more
    assert os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL, (number, ended)
    left = sorted(os.listdir(run)), sorted(os.listdir(os.path.join(run, "checkpoint")))
    assert forked(lambda: train(recipe, cache, run)) == 0, (number, left)
    one, other = Path(run), Path(whole)
    assert metrics(one) == metrics(other), (number, left)
    for folder in ("best", "last", "averaged"):
        assert weights(one / folder) == weights(other / folder), (number, folder, left)
    names = [sorted(p.relative_to(at).as_posix() for p in at.rglob("*")) for at in (one, other)]
    assert names[0] == names[1], (number, left)
print("points", number)
"""


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_change_of_a_file_loses_nothing(
    world, make_recipe, tmp_path, monkeypatch, stride
):
    recipe = make_recipe(dev=False, max_steps=4, checkpoints={"every_steps": 1, "average_last": 2})
    train(recipe, world.cache, tmp_path / "whole")
    real = Trainer.step

    def step(self, batch):
        if self.state.step == 3:
            raise KeyboardInterrupt
        real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, world.cache, tmp_path / "half")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "recipe.yaml"), str(world.cache)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [*command, str(tmp_path), str(stride)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 60
