"""Training steps of one student: from a cache, as a transformers user writes them, and online.

All take the same batches. What is not kdcache's is written with torch and transformers alone.
"""

# B samples, T target positions, N target tokens, D hidden, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The objective of the recipe `word-level`.
HARD, SOFT = 0.5, 0.5
LEARNING_RATE, BETAS, EPS, CLIP_NORM = 7e-4, (0.9, 0.98), 1e-9, 1.0
IGNORED = -100  # transformers' label of a position without one


@dataclass(frozen=True)
class Size:
    """A student and its batches.

    Attributes:
        vocab_size: V.
        width: D of the student.
        ffn: inner width of its feed-forward layers.
        batch_tokens: most samples x longest sample of a batch, in each stream.
        steps: of each variant in a turn.
        teacher: config of a teacher for the comparison with online distillation.
    """

    vocab_size: int
    width: int
    ffn: int
    batch_tokens: int
    steps: int
    teacher: dict[str, int]

    @property
    def student(self) -> dict[str, Any]:
        """Config keys of the student, as those of the recipe `word-level`."""
        layers = {"encoder_layers": 2, "decoder_layers": 2}
        return {"d_model": self.width, "dropout": 0.1, **layers, **_both_sides("ffn_dim", self.ffn)}


SIZES = {
    "v8000": Size(
        vocab_size=8000,
        width=192,
        ffn=512,
        batch_tokens=2048,
        steps=4,
        teacher={"d_model": 256, "encoder_layers": 6, "decoder_layers": 3, "ffn_dim": 1024},
    ),
    "v32000": Size(
        vocab_size=32_000,
        width=192,
        ffn=512,
        batch_tokens=2048,
        steps=2,
        teacher={"d_model": 512, "encoder_layers": 6, "decoder_layers": 3, "ffn_dim": 2048},
    ),
}


def _both_sides(key: str, value: int) -> dict[str, int]:
    """A config key of encoder and decoder."""
    return {f"{side}_{key}": value for side in ("encoder", "decoder")}


@dataclass(frozen=True)
class PlainBatch:
    """What a transformers user's collator makes.

    Attributes:
        source: [B, S] int64, padded.
        mask: [B, S] int64, 1 on tokens.
        labels: [B, T] int64, -100 on padding.
    """

    source: Tensor
    mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> PlainBatch:
        """The batch on a device."""
        return PlainBatch(self.source.to(device), self.mask.to(device), self.labels.to(device))

    @property
    def num_tokens(self) -> int:
        """N."""
        return int((self.labels != IGNORED).sum())


def make_trainer(size: Size, cache_path: Path, device: str = "cpu") -> Any:
    """A trainer of the recipe `word-level` with this size's student and batches."""
    from kdcache.formats.cache import open_cache
    from kdcache.recipe import load_recipe
    from kdcache.train.runs.trainer import Trainer

    keys = {
        "batch_tokens": size.batch_tokens,
        "device": device,
        "max_steps": 1_000_000,
        "optimizer.lr": LEARNING_RATE,
        "optimizer.betas": list(BETAS),
        "optimizer.eps": EPS,
        "clip_norm": CLIP_NORM,
        "schedule.warmup_steps": 0,
        "schedule.name": "constant",
        **{f"student.config.{key}": value for key, value in size.student.items()},
    }
    recipe = load_recipe("word-level", [(f"train.{k}", str(v)) for k, v in keys.items()])
    return Trainer(recipe.train, open_cache(cache_path))


def plain_batches(size: Size, cache_path: Path, count: int) -> list[PlainBatch]:
    """The first batches of a trainer's order, as tensors that own their memory."""
    found = []
    with closing(iter(make_trainer(size, cache_path).stream)) as stream:
        for batch in islice(stream, count):
            (micro,) = batch.micro
            source, target = micro.streams["src"], micro.streams["tgt"]
            labels = torch.where(target.mask, target.ids, IGNORED)
            found.append(PlainBatch(source.ids.clone(), source.mask.long(), labels))
    return found


def marian(vocab_size: int, keys: dict[str, Any]) -> Any:
    """A Marian model with transformers' own initialisation."""
    from transformers import MarianConfig, MarianMTModel

    heads = _both_sides("attention_heads", 4)
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    shape = {"activation_function": "relu", "scale_embedding": True}
    shape |= {"max_position_embeddings": 256, "forced_eos_token_id": 2}
    return MarianMTModel(
        MarianConfig(vocab_size=vocab_size, **heads, **special, **shape, **keys)
    ).train()


class Cached:
    """kdcache's step: the batch from the stream's thread, both losses, the trainer's own step."""

    def __init__(self, size: Size, cache_path: Path, device: str = "cpu") -> None:
        self.trainer = make_trainer(size, cache_path, device)
        self._batches: Iterator[Any] = iter(self.trainer.stream)

    def step(self) -> None:
        """One batch."""
        self.trainer.step(next(self._batches))

    def close(self) -> None:
        """End the thread."""
        self._batches.close()  # type: ignore[attr-defined]


class Plain:
    """Cross-entropy as a transformers user writes it: the model makes logits and loss itself.

    Args:
        model: the student, in training mode.
        batches: in memory, taken in turn.
    """

    def __init__(self, model: Any, batches: list[PlainBatch]) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._batches, self._next = batches, 0
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True
        )

    def step(self) -> None:
        """One batch."""
        batch = self._batches[self._next % len(self._batches)].to(self.device)
        self._next += 1
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cpu":
            loss.item()  # a loss that nobody reads is not training

    def loss(self, batch: PlainBatch) -> Tensor:
        """Scalar."""
        loss: Tensor = self.model(
            input_ids=batch.source, attention_mask=batch.mask, labels=batch.labels
        ).loss
        return loss

    def close(self) -> None:
        """Nothing to end."""


class Lean(Plain):
    """Cross-entropy with padding left out of the output projection, by hand."""

    def loss(self, batch: PlainBatch) -> Tensor:
        """Scalar."""
        kept = batch.labels != IGNORED
        return F.cross_entropy(valid_logits(self.model, batch, kept), batch.labels[kept])


class Online(Lean):
    """Both losses with the teacher's forward pass in the step, no logits of padding made.

    Args:
        model: the student.
        batches: in memory.
        teacher: in evaluation mode.
    """

    def __init__(self, model: Any, batches: list[PlainBatch], teacher: Any) -> None:
        super().__init__(model, batches)
        self.teacher = teacher

    def loss(self, batch: PlainBatch) -> Tensor:
        """Scalar."""
        kept = batch.labels != IGNORED
        with torch.no_grad():
            wanted = F.log_softmax(valid_logits(self.teacher, batch, kept), 1)
        log_probs = F.log_softmax(valid_logits(self.model, batch, kept), 1)
        divergence = F.kl_div(log_probs, wanted, reduction="batchmean", log_target=True)
        return HARD * F.nll_loss(log_probs, batch.labels[kept]) + SOFT * divergence


class TeacherForward:
    """The teacher's forward pass alone, with its projection: what a cache spares at the least."""

    def __init__(self, batches: list[PlainBatch], teacher: Any) -> None:
        self.teacher, self._batches, self._next = teacher, batches, 0
        self.device = next(teacher.parameters()).device

    def step(self) -> None:
        """One batch."""
        batch = self._batches[self._next % len(self._batches)].to(self.device)
        self._next += 1
        with torch.no_grad():
            valid_logits(self.teacher, batch, batch.labels != IGNORED)

    def close(self) -> None:
        """Nothing to end."""


def valid_logits(model: Any, batch: PlainBatch, kept: Tensor) -> Tensor:
    """[N, V] logits of the target tokens alone."""
    start = model.config.decoder_start_token_id
    decoder_ids = batch.labels.new_full(batch.labels.shape, start)
    decoder_ids[:, 1:] = batch.labels[:, :-1].clamp(min=0)
    out = model.model(
        input_ids=batch.source,
        attention_mask=batch.mask,
        decoder_input_ids=decoder_ids,
        use_cache=False,
    )
    hidden = out.last_hidden_state[kept]  # [B, T, D] -> [N, D]
    logits: Tensor = model.lm_head(hidden) + model.final_logits_bias
    return logits


VARIANTS = ("cached", "plain", "lean")


def make_variant(name: str, size: Size, folder: Path, model: Any, batches: list[PlainBatch]) -> Any:
    """One of the three that are compared, with a copy of the model where it takes one."""
    if name == "cached":
        return Cached(size, folder)
    return {"plain": Plain, "lean": Lean}[name](copy.deepcopy(model), batches)
