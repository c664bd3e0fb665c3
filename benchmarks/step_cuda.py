"""The part of bench_step that wants a GPU: tokens/s of a step, and the loss alone beside others.

Other libraries are taken as they are installed; what is not there is left out with a word why.
"""

# N positions, D hidden, V vocabulary, E entries

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from setting import log
from step_cases import SIZES, VARIANTS, Cached, Lean, Plain, marian, plain_batches
from torch import Tensor

from kdcache.labels.sparse_target import SparseTarget
from kdcache.losses import LossTerm, hard_target, linear_losses

#: N, V, D, E of the loss alone.
SHAPE = (8192, 152_000, 2048, 64)
STEPS = 20  # of a turn


def measure_cuda(work: Path, sizes: list[str], turns: int) -> dict[str, Any] | None:
    """Tokens/s and losses on the first GPU; None where there is none.

    Args:
        work: folder with the caches of the sizes.
        sizes: names of sizes.
        turns: of each variant.
    """
    if not torch.cuda.is_available():
        log("cuda: left out, this machine has no GPU that torch can use")
        return None
    found = {
        "tokens_per_second": {name: step_speeds(work, name, turns) for name in sizes},
        "loss": compare_losses("cuda", SHAPE, turns),
    }
    log(f"cuda {found}")
    return found


def step_speeds(work: Path, name: str, turns: int) -> dict[str, int]:
    """Tokens/s of each variant under bfloat16 autocast, plain batches already on the device."""
    size, cache, device = SIZES[name], work / name, torch.device("cuda")
    batches = [batch.to(device) for batch in plain_batches(size, cache, STEPS)]
    tokens = sum(batch.num_tokens for batch in batches)
    model = marian(size.vocab_size, size.student).to(device)
    variants = {
        "cached": Cached(size, cache, "cuda"),
        "plain": Plain(copy.deepcopy(model), batches),
        "lean": Lean(copy.deepcopy(model), batches),
    }
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(turns + 1):
        for variant, taken in times.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                variants[variant].step()
            torch.cuda.synchronize()
            if turn:
                taken.append(time.perf_counter() - began)
    variants["cached"].close()
    return {variant: round(tokens / statistics.median(taken)) for variant, taken in times.items()}


class LossCase:
    """Hidden states, a projection, labels, and a teacher as entries and as dense logits.

    Args:
        device: where they lie.
        shape: N, V, D, E.
    """

    def __init__(self, device: str, shape: tuple[int, int, int, int]) -> None:
        rows, vocab_size, width, entries = shape
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        draw = torch.Generator(device).manual_seed(1)
        made = {"generator": draw, "device": device, "dtype": dtype}
        self.hidden = torch.randn(rows, width, **made).requires_grad_()
        self.weight = (torch.randn(vocab_size, width, **made) / width**0.5).requires_grad_()
        first = torch.randint(vocab_size, (rows, 1), generator=draw, device=device)
        step = torch.arange(entries, device=device) * max(1, vocab_size // entries)
        ids = ((first + step) % vocab_size).sort(1).values  # [N, E], no id twice
        values = torch.full((rows * entries,), 1 / entries, device=device)
        self.vocab_size, self.labels = vocab_size, first.flatten()
        self.target = SparseTarget(
            rows=torch.arange(rows, device=device).repeat_interleave(entries),
            ids=ids.flatten(),
            values=values,
            uniform=None,
            bucket=None,
            constant=torch.full((rows,), -1.0, device=device),
        )

    def kdcache(self) -> Tensor:
        """Cross-entropy and forward KL, fused with the projection."""
        hard = LossTerm(hard_target(self.labels, self.vocab_size), 1.0, 0.5)
        return linear_losses(self.hidden, self.weight, None, [hard, LossTerm(self.target, 1, 0.5)])[
            0
        ]

    def torch_cross_entropy(self) -> Tensor:
        """Cross-entropy alone, projected in one piece."""
        return F.cross_entropy(F.linear(self.hidden, self.weight).float(), self.labels)

    def liger_linear_cross_entropy(self) -> Tensor:
        """Liger's fused linear cross-entropy: no teacher."""
        kernel = import_module("liger_kernel.transformers")
        loss: Tensor = kernel.LigerFusedLinearCrossEntropyLoss()(
            self.weight, self.hidden, self.labels
        )
        return loss

    def trl_jsd(self) -> Tensor:
        """TRL's generalised divergence on dense logits."""
        try:
            trainer = import_module("trl.experimental.gkd").GKDTrainer
        except ImportError:
            trainer = import_module("trl").GKDTrainer
        logits = F.linear(self.hidden, self.weight)
        loss: Tensor = trainer.generalized_jsd_loss(logits[None], self._teacher(logits)[None])
        return loss

    def torchtune_forward_kl(self) -> Tensor:
        """Forward KL of torchtune on dense logits."""
        module = import_module("torchtune.modules.loss")
        logits = F.linear(self.hidden, self.weight)
        loss: Tensor = module.ForwardKLLoss()(logits, self._teacher(logits), self.labels)
        return loss

    def _teacher(self, logits: Tensor) -> Tensor:
        """[N, V] logits such as a teacher in memory would give; they count as its loss's memory."""
        return logits.detach().clone()


LOSSES = (
    "kdcache",
    "torch_cross_entropy",
    "liger_linear_cross_entropy",
    "trl_jsd",
    "torchtune_forward_kl",
)


def compare_losses(device: str, shape: tuple[int, int, int, int], turns: int) -> dict[str, Any]:
    """Milliseconds, forward and backward, and peak bytes of each loss that can be had."""
    case = LossCase(device, shape)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    found: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    for name in LOSSES:
        try:
            peaks[name] = loss_peak(case, name, device)
        except (ImportError, AttributeError) as error:
            found[name] = f"left out: {error}"
            log(f"loss {name}: {found[name]}")
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
    times: dict[str, list[float]] = {name: [] for name in peaks}
    for _ in range(turns):
        for name, taken in times.items():
            wait()
            began = time.perf_counter()
            one_step(case, name)
            wait()
            taken.append((time.perf_counter() - began) * 1e3)
    for name, taken in times.items():
        bounds = [round(bound(taken), 3) for bound in (min, max)]
        middle = round(statistics.median(taken), 3)
        found[name] = {"milliseconds": middle, "turns": bounds, "peak_bytes": peaks[name]}
    return found


def one_step(case: LossCase, name: str) -> None:
    """Forward and backward pass of one loss."""
    case.hidden.grad = case.weight.grad = None
    getattr(case, name)().backward()


def loss_peak(case: LossCase, name: str, device: str) -> int:
    """Bytes that a step takes beside its inputs; 0 off the GPU."""
    one_step(case, name)  # what is compiled is compiled now
    if device != "cuda":
        return 0
    case.hidden.grad = case.weight.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one_step(case, name)
    return torch.cuda.max_memory_allocated() - before
