"""Training: a recipe, a cache and a student become a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError
from kdcache.models.loading import resolve_device
from kdcache.progress import progress
from kdcache.recipe import Recipe
from kdcache.train.batches.stream import GlobalBatch
from kdcache.train.evaluation.metrics import lower_is_better
from kdcache.train.losses.schedule import learning_rate
from kdcache.train.runs.board import Board, check_installed
from kdcache.train.runs.checkpoint import (
    average_weights,
    checkpoints,
    drop_checkpoints,
    load_checkpoint,
    load_weights,
    recover,
    save_checkpoint,
)
from kdcache.train.runs.memory import machine_of
from kdcache.train.runs.parallel import Ranks, joined
from kdcache.train.runs.run import RunDirectory, locked, place_of
from kdcache.train.runs.shared import Shared
from kdcache.train.runs.trainer import Trainer
from kdcache.versions import versions_of

logger = logging.getLogger(__name__)

#: Global batches at the start of every process that the canary looks at.
CANARY_BATCHES = 3
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")


def train(
    recipe: Recipe,
    cache_path: str | Path | None,
    out: str | Path,
    start: Mapping[str, Any] | None = None,
    shared: Shared | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Train a student from a cache; go on where an interrupted run stopped.

    Under torchrun the processes train one student together, and each returns the same.

    Args:
        recipe: what to train; its `train` section is used.
        cache_path: the cache, or its URL; None where the recipe names its caches.
        out: the run directory.
        start: what the student begins as, as plain values, where its path does not say it: a
            resumed run's must be the same.
        shared: what earlier runs of this process left for this one.
        wait: where another process trains this run, until it has.

    Returns:
        run, steps, epochs (begun), tokens, parameters, loss (mean of the last line of metrics),
        best_step, best_dev_loss (of the best weights; best_dev_METRIC beside it where another
        score chose them), of the last validation dev_loss, dev_loss_shuffled and
        dev_accuracy, with `while_dumping` shards (of the last epoch), and seconds (of the
        process that finished the run).

    Raises:
        RecipeError: the recipe does not fit the cache.
        IdentityError: `out` holds another run.
        TrainingError: the loss is not finite, labels do not belong to their targets, memory ran
            out, or another rank has stopped.
    """
    recipe.single()
    if (cache_path is None) != bool(recipe.train.caches):
        raise RecipeError(
            f"cache is {cache_path} and train.caches has {len(recipe.train.caches)}; give one or "
            "the other"
        )
    paths = [share.path for share in recipe.train.caches] or [str(cache_path)]
    shared = shared or Shared()
    run = Path(out)
    for path in paths:  # what is wrong with one is said before ranks meet
        shared.cache(path)
    if recipe.train.student is None:
        raise RecipeError("train.student is not set; give train.student.config or .path")
    if recipe.train.log is not None:
        check_installed()
    with joined(resolve_device(recipe.train.device)) as ranks:
        return _train(recipe, paths, run, start, shared, ranks, wait)


def _train(
    recipe: Recipe,
    paths: list[str],
    run: Path,
    start: Mapping[str, Any] | None,
    shared: Shared,
    ranks: Ranks,
    wait: bool,
) -> dict[str, Any]:
    """What `train` does among its ranks; apart, since the trainer must end before they part."""
    with ExitStack() as held:
        trainer = Trainer(recipe.train, [shared.cache(path) for path in paths], ranks, shared)
        identity = trainer.identity() | ({"start": dict(start)} if start else {})
        places = [place_of(path) for path in paths]
        about = (run, recipe, identity, versions_of(LIBRARIES), places)
        with ranks.together():
            if ranks.main:
                held.enter_context(locked(run, wait))
                directory = RunDirectory(*about)
                if directory.summary is None:
                    recover(run)
        with ranks.together():
            if not ranks.main:  # it finds what the main one has written
                directory = RunDirectory(*about, writes=False)
        if directory.summary is None:
            summary = ranks.from_main(Loop(trainer, directory).fit())
            with ranks.together():
                directory.finish(summary, machine_of(trainer.device))
        assert directory.summary is not None
        return directory.summary


class Loop:
    """Steps of a trainer, with their metrics and checkpoints in a run directory."""

    def __init__(self, trainer: Trainer, run: RunDirectory) -> None:
        self.trainer, self.run = trainer, run
        self.section = trainer.section
        self._since = (0.0, 0)
        self._epochs: dict[int, int] = {}  # by cache
        self._board: Board | None = None

    def fit(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint of the run if it has one."""
        trainer = self.trainer
        self._resume()
        if not trainer.state.step:
            self._check_metric()
        if self.section.log is not None and trainer.ranks.main:
            self._board = Board(self.run.path, trainer.state.step)
        began = time.perf_counter()
        self._since = (began, trainer.state.tokens)
        seen = 0
        with (
            progress(trainer.total_steps, "train", "step", not trainer.ranks.main) as bar,
            closing(iter(trainer.stream)) as batches,
        ):
            bar.update(trainer.state.step)
            while trainer.state.step < trainer.total_steps:
                batch = next(batches)
                self._say_epoch(batch)
                if seen < CANARY_BATCHES:
                    with trainer.ranks.together():
                        for micro in batch.micro:
                            trainer.family.check_labels(micro, trainer.objective)
                trainer.step(batch)
                seen += 1
                self._after(batch)
                bar.update()
        if self._board is not None:
            self._board.close()
        self._export()
        return self._summary(time.perf_counter() - began)

    def _after(self, batch: GlobalBatch) -> None:
        """Log, validate and save where that is due."""
        section, trainer, state = self.section, self.trainer, self.trainer.state
        last = state.step == trainer.total_steps
        if last or state.step % section.log_every == 0:
            self._log(batch)
        if trainer.dev is not None and (last or state.step % section.validation.every_steps == 0):
            scores = trainer.validate()
            self._note({"step": state.step} | scores)
            value = scores[section.validation.metric]
            if self._better(value):
                state.best_step, state.best_value = state.step, value
                state.best_loss = scores["dev_loss"]
                trainer.save_model(self.run.path / "best")
        if last or state.step % section.checkpoints.every_steps == 0:
            trainer.settle()
            state.scaler = trainer.scaler.state_dict()
            parts = (trainer.distillation, trainer.optimizer, self._keep, trainer.ranks)
            save_checkpoint(self.run.path, state, *parts)

    def _check_metric(self) -> None:
        """Refuse a metric that the development set does not have, before the first step.

        Raises:
            RecipeError: with those that it has.
        """
        metric = self.section.validation.metric
        if self.trainer.dev is None or metric == "dev_loss":
            return
        known = self.trainer.validate()
        if metric not in known:
            raise RecipeError(
                f"train.validation.metric: the development set has no {metric!r}; its scores are "
                f"{', '.join(known)}"
            )

    def _better(self, value: float) -> bool:
        """Whether a score by the recipe's metric is above the best one."""
        best = self.trainer.state.best_value
        if best is None:
            return True
        lower = lower_is_better(self.section.validation.metric)
        return value < best if lower else value > best

    def _note(self, line: dict[str, Any]) -> None:
        """A line of metrics for all who read them."""
        self.run.log(line)
        if self._board is not None:
            self._board.log(line)

    @property
    def _keep(self) -> int:
        """Checkpoints that stay."""
        return max(1, self.section.checkpoints.average_last)

    def _say_epoch(self, batch: GlobalBatch) -> None:
        """Where a dump may be on its way, say how much of the cache an epoch is drawn from."""
        if self.section.while_dumping and batch.epoch != self._epochs.get(batch.cache):
            total = self.trainer.caches[batch.cache].num_shards
            logger.info("epoch %d: %d of %d shards", batch.epoch, batch.shards, total)
        self._epochs[batch.cache] = batch.epoch

    def _log(self, batch: GlobalBatch) -> None:
        """A line of metrics: means over the steps since the last one."""
        trainer, state, section = self.trainer, self.trainer.state, self.section
        trainer.settle()
        now, (then, tokens) = time.perf_counter(), self._since
        means = [total / state.num_summed for total in state.sums[:-1]]
        names = trainer.objective.names
        gated = {} if trainer.gate is None else {"gated": means.pop()}
        moved = state.num_summed - state.num_skipped
        peak, total_steps = section.optimizer.lr, trainer.total_steps
        self._note(
            {
                "step": state.step,
                "epoch": batch.epoch,
                **({"cache": batch.cache} if len(trainer.caches) > 1 else {}),
                **({"shards": batch.shards} if section.while_dumping else {}),
                "loss": means[0],
                "terms": dict(zip(names, means[1:], strict=True)),
                **gated,
                "lr": learning_rate(section.schedule, peak, state.step, total_steps),
                "grad_norm": state.sums[-1] / moved if moved else None,
                **({"skipped": state.num_skipped} if trainer.scaler.is_enabled() else {}),
                "tokens": state.tokens,
                "tokens_per_second": (state.tokens - tokens) / max(now - then, 1e-9),
            }
        )
        state.sums, state.num_summed, state.num_skipped = [], 0, 0
        self._since = (now, state.tokens)

    def _resume(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        trainer, folders = self.trainer, checkpoints(self.run.path)
        if folders:
            state = load_checkpoint(folders[-1], trainer.distillation, trainer.optimizer)
            state.order.check(trainer.stream.state.digest, self.section.seed)
            trainer.state, trainer.stream.state = state, state.order
            if state.scaler:
                trainer.scaler.load_state_dict(state.scaler)
            if trainer.ranks.main:
                logger.info("%s: going on after step %d", self.run.path, state.step)
        with trainer.ranks.together():
            if trainer.ranks.main:
                drop_checkpoints(self.run.path, self._keep)
                self.run.rewind(trainer.state.step)

    def _export(self) -> None:
        """Write the last weights, the best if no validation chose them, and the averaged ones."""
        trainer, run = self.trainer, self.run.path
        trainer.save_model(run / "last")
        if trainer.dev is None:
            trainer.save_model(run / "best")
        if self.section.checkpoints.average_last:
            load_weights(trainer.distillation, average_weights(checkpoints(run)))
            trainer.save_model(run / "averaged")

    def _summary(self, seconds: float) -> dict[str, Any]:
        """What `train` returns."""
        state, last = self.trainer.state, self.run.last_values()
        return {
            "run": str(self.run.path),
            "steps": state.step,
            "epochs": last.pop("epoch", -1) + 1,
            "tokens": state.tokens,
            "parameters": sum(
                p.numel() for p in self.trainer.model.parameters() if p.requires_grad
            ),
            "loss": last.get("loss"),
            "best_step": state.step if state.best_step is None else state.best_step,
            "best_dev_loss": state.best_loss,
            f"best_{self.section.validation.metric}": state.best_value,
            **{k: value for k, value in last.items() if k == "shards" or k.startswith("dev_")},
            "seconds": seconds,
        }
