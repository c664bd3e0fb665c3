"""A PyTorch loop on a cache: batches, losses, gradient accumulation, and an exact resume.

    python examples/bare_loop.py --cache CACHE --out RUN --steps 1000

The same command with more steps goes on where the last one stopped, as one that had never stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from student import new_student
from torch import Tensor

import kdcache
from kdcache.errors import KDCacheError
from kdcache.losses import LossTerm, decode, hard_target, linear_losses
from kdcache.train.batches.batch import Batch
from kdcache.train.batches.batches import Batches


def loss_share(
    student: Any, batch: Batch, batches: Batches, num_tokens: int, args: argparse.Namespace
) -> Tensor:
    """What a micro-batch adds to the mean loss over its global batch of `num_tokens` tokens."""
    source, target = (batch.streams[name] for name in batches.streams)
    hidden = student.model(
        input_ids=source.ids,
        attention_mask=source.mask.long(),
        decoder_input_ids=student.prepare_decoder_input_ids_from_labels(target.ids),
    ).last_hidden_state[target.mask]  # [N, D] at the tokens, in the order of target.flat
    weight, bias = student.lm_head.weight, student.final_logits_bias[0]
    row_weight = torch.full((len(target.flat),), 1 / num_tokens, device=hidden.device)
    hard = hard_target(target.flat, len(weight))
    soft = decode(batch.signals[args.signal], args.temperature)  # on the device of the batch
    terms = [
        LossTerm(hard, weight=1 - args.soft, row_weight=row_weight),
        LossTerm(soft, args.temperature, args.soft * args.temperature**2, row_weight),
    ]
    total, _ = linear_losses(hidden, weight, bias, terms)  # the [N, V] logits never exist
    return total


def train(args: argparse.Namespace) -> None:
    """Train to step `args.steps`, from the checkpoint in `args.out` if there is one."""
    cache = kdcache.open_cache(args.cache)
    batches = cache.batches(
        signals=[args.signal],
        batch_tokens=args.batch_tokens,
        accumulate=args.accumulate,
        seed=args.seed,
    )
    student = new_student(
        cache, batches.streams, args.signal, args.size, args.dropout, args.seed
    ).to(args.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=args.lr, betas=(0.9, 0.98), eps=1e-9)
    done = resume(args.out, student, optimizer, batches)
    student.train()
    for number, step in enumerate(islice(batches, args.steps - done), start=done + 1):
        loss = 0.0
        for batch in step.micro:
            share = loss_share(
                student, batch.to(args.device), batches, step.counts[batches.streams[-1]], args
            )
            share.backward()  # shares add up, and so do their gradients
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with open(args.out / "losses.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps({"step": number, "epoch": step.epoch, "loss": loss}) + "\n")
        if number % args.save_every == 0 or number == args.steps:
            save(args.out, number, student, optimizer, batches)
    student.save_pretrained(args.out / "student")


def save(out: Path, number: int, student: Any, optimizer: Any, batches: Batches) -> None:
    """Write all that the next step depends on."""
    state = {
        "step": number,
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "batches": batches.state_dict(),  # a few numbers: the next batch is the one after this
        "random": torch.get_rng_state(),  # dropout; on a GPU torch.cuda.get_rng_state() too
    }
    torch.save(state, out / "checkpoint.tmp")
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")  # whole, or not there


def resume(out: Path, student: Any, optimizer: Any, batches: Batches) -> int:
    """Put a checkpoint back, if there is one; the number of steps that are done."""
    out.mkdir(parents=True, exist_ok=True)
    log, lines, done = out / "losses.jsonl", [], 0
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        batches.load_state_dict(state["batches"])  # refuses the state of other batches
        torch.set_rng_state(state["random"])
        done = state["step"]
        lines = log.read_text("utf-8").splitlines(keepends=True)[:done]
    log.write_text("".join(lines), "utf-8")
    return done


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        train(parser.parse_args(argv))
    except KDCacheError as error:
        sys.exit(f"bare_loop: {error}")


if __name__ == "__main__":
    main()
