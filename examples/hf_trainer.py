"""transformers' Trainer on a cache: a mixin computes the losses, the Trainer does the rest.

    python examples/hf_trainer.py --cache CACHE --out RUN --steps 1000

The same command with more steps goes on from the last checkpoint. Over two GPUs:

    torchrun --nproc-per-node 2 examples/hf_trainer.py --cache CACHE --out RUN --steps 1000
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from student import new_student
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import kdcache
from kdcache.errors import KDCacheError
from kdcache.hf import DistillationMixin


class Distiller(DistillationMixin, Seq2SeqTrainer):
    """A Seq2SeqTrainer on batches of a cache."""


def train(args: argparse.Namespace) -> None:
    """Train to step `args.steps`, from the last checkpoint in `args.out` if there is one."""
    cache = kdcache.open_cache(args.cache)
    batches = cache.batches(
        signals=[args.signal],
        batch_tokens=args.batch_tokens,
        accumulate=args.accumulate,
        seed=args.seed,
        rank=int(os.environ.get("RANK", "0")),
        world=int(os.environ.get("WORLD_SIZE", "1")),
    )
    trainer = Distiller(
        model=new_student(cache, batches.streams, args.signal, args.size, args.dropout, args.seed),
        args=Seq2SeqTrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.98,
            adam_epsilon=1e-9,
            logging_steps=args.log_every,
            logging_nan_inf_filter=False,  # a loss that is not finite shall be seen
            save_steps=args.save_every,
            seed=args.seed,
            use_cpu=args.device == "cpu",
            disable_tqdm=True,
            report_to=[],
        ),
        train_dataset=batches,
        objective=[
            {"loss": "cross_entropy", "weight": 1 - args.soft},
            {
                "loss": "forward_kl",
                "weight": args.soft,
                "signal": args.signal,
                "temperature": args.temperature,
            },
        ],
    )
    args.out.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.out)))
    trainer.save_model(str(args.out / "student"))
    trainer.save_state()


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
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of losses")
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--size", type=int, default=256, help="width of the student")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    try:
        train(parser.parse_args(argv))
    except KDCacheError as error:
        sys.exit(f"hf_trainer: {error}")


if __name__ == "__main__":
    main()
