"""Lightning on a cache: a module for the losses, a data module for the batches.

    python examples/lightning_module.py --cache CACHE --out RUN --steps 1000

The same command with more steps goes on from the last checkpoint. `--devices 2` runs DDP.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from student import new_student
from torch import Tensor
from torch.utils.data import DataLoader

import kdcache
from kdcache.errors import KDCacheError
from kdcache.formats.cache import Cache
from kdcache.losses import LossTerm, decode, fused_loss, hard_target
from kdcache.train.batches.stream import GlobalBatch


class CacheData(lightning.LightningDataModule):
    """Micro-batches of a cache, and where they stand."""

    def __init__(self, cache: Cache, args: argparse.Namespace) -> None:
        super().__init__()
        self.cache, self.args = cache, args
        self.state: dict[str, Any] | None = None

    def train_dataloader(self) -> DataLoader[GlobalBatch]:
        """Made when the ranks are known; from the checkpoint's state on, if there was one."""
        batches = self.cache.batches(
            signals=[self.args.signal],
            batch_tokens=self.args.batch_tokens,
            accumulate=self.args.accumulate,
            seed=self.args.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        if self.state is not None:
            batches.load_state_dict(self.state)
        return DataLoader(batches.micro_batches(), batch_size=None)

    def transfer_batch_to_device(
        self, step: GlobalBatch, device: torch.device, dataloader_idx: int
    ) -> GlobalBatch:
        """Move a batch; Lightning fetches one ahead, so only this one counts as used."""
        self.state = asdict(step.state)
        return step.to(device)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        return {"batches": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called before the batches are made."""
        self.state = state["batches"]


class Distiller(lightning.LightningModule):
    """A student and its losses."""

    def __init__(self, student: Any, streams: Sequence[str], args: argparse.Namespace) -> None:
        super().__init__()
        self.student, self.streams, self.args = student, streams, args
        self.loss = 0.0

    def training_step(self, step: GlobalBatch, number: int) -> Tensor | None:
        """This micro-batch's share of the mean over its global batch."""
        if number % self.args.accumulate == 0:
            # Lightning keeps no random state, so dropout is a function of the step.
            torch.manual_seed(self.args.seed * 1_000_003 + self.global_step)
        if not step.micro:  # fewer samples than micro-batches: nothing to add, but a gradient
            return torch.stack([one.sum() * 0.0 for one in self.parameters()]).sum()
        (batch,) = step.micro
        source, target = (batch.streams[name] for name in self.streams)
        logits = self.student(
            input_ids=source.ids,
            attention_mask=source.mask.long(),
            decoder_input_ids=self.student.prepare_decoder_input_ids_from_labels(target.ids),
        ).logits[target.mask]  # [N, V] at the tokens, in the order of target.flat
        args = self.args
        num_tokens = step.counts[self.streams[-1]]
        row_weight = torch.full((len(target.flat),), 1 / num_tokens, device=logits.device)
        hard = hard_target(target.flat, logits.shape[1])
        soft = decode(batch.signals[args.signal], args.temperature)
        terms = [
            LossTerm(hard, weight=1 - args.soft, row_weight=row_weight),
            LossTerm(soft, args.temperature, args.soft * args.temperature**2, row_weight),
        ]
        total, _ = fused_loss(logits, terms, inplace=True)
        self.loss += total.item()
        # Lightning divides by the micro-batches, DDP by the ranks; shares only add up.
        return total * (args.accumulate * self.trainer.world_size)

    def on_train_batch_end(self, outputs: Any, step: GlobalBatch, number: int) -> None:
        """Write the loss of a whole step; after a crash some steps stand twice, the last counts."""
        if (number + 1) % self.args.accumulate:
            return
        mine = torch.tensor(self.loss, dtype=torch.float64, device=self.device)
        loss = self.trainer.strategy.reduce(mine, reduce_op="sum").item()  # of all ranks
        self.loss = 0.0
        if self.trainer.is_global_zero:
            line = {"step": self.global_step, "epoch": step.epoch, "loss": loss}
            with open(self.args.out / "losses.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as the Transformer papers set it."""
        return torch.optim.Adam(self.parameters(), lr=self.args.lr, betas=(0.9, 0.98), eps=1e-9)


def train(args: argparse.Namespace) -> None:
    """Train to step `args.steps`, from the last checkpoint in `args.out` if there is one."""
    cache = kdcache.open_cache(args.cache)
    record = cache.logits(args.signal)
    streams = [str(record.source), record.stream]
    student = new_student(cache, streams, args.signal, args.size, args.dropout, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    last = args.out / "last.ckpt"
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,  # the batches are made for their rank
        callbacks=[ModelCheckpoint(args.out, save_last=True, every_n_train_steps=args.save_every)],
        logger=False,
        enable_progress_bar=False,
    )
    module = Distiller(student, streams, args)
    trainer.fit(module, CacheData(cache, args), ckpt_path=last if last.exists() else None)
    student.save_pretrained(args.out / "student")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", required=True, help="a cache with soft labels")
    parser.add_argument("--out", required=True, type=Path, help="where the run goes")
    parser.add_argument("--steps", type=int, default=1000, help="last step of the run")
    parser.add_argument("--signal", default="logits", help="name of the soft labels")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--soft", type=float, default=0.5, help="share of the soft labels' loss")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a step, padded")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--size", type=int, default=256, help="width of the student")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="of Lightning: cpu, gpu or auto")
    parser.add_argument("--devices", type=int, default=1)
    try:
        train(parser.parse_args(argv))
    except KDCacheError as error:
        sys.exit(f"lightning_module: {error}")


if __name__ == "__main__":
    main()
