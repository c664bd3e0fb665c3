"""What the quickstart does: sizes, paths and recipes, nothing run yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.recipe import Recipe, parse_recipe

SPLITS = ("test", "dev", "train")
SIDES = ("src", "tgt")


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        pairs: sentence pairs per split.
        student_pairs: the first of the training pairs, which are all that students see; the
            teacher learns from all of them.
        vocab_size: of the SentencePiece model both languages share.
        teacher: keys of its transformers config.
        teacher_steps: optimiser steps of the teacher.
        teacher_lr: its peak learning rate.
        student: keys of the students' transformers config.
        student_steps: optimiser steps of every student.
        student_lrs: peak learning rates that are tried without the cache.
        batch_tokens: target tokens of a step.
        validations: times the dev set is scored in a run.
    """

    pairs: dict[str, int]
    student_pairs: int
    vocab_size: int
    teacher: dict[str, Any]
    teacher_steps: int
    teacher_lr: float
    student: dict[str, Any]
    student_steps: int
    student_lrs: tuple[float, ...]
    batch_tokens: int
    validations: int


def _marian(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    """Config keys of an encoder-decoder."""
    sides = ("encoder", "decoder")
    return {
        "model_type": "marian",
        "d_model": width,
        **{f"{side}_layers": layers for side in sides},
        **{f"{side}_attention_heads": heads for side in sides},
        **{f"{side}_ffn_dim": inner for side in sides},
        "dropout": 0.1,
        "activation_function": "relu",
        "scale_embedding": True,
        "max_position_embeddings": 128,
    }


FULL = Size(
    pairs={"test": 300, "dev": 300, "train": 5000},
    student_pairs=1000,
    vocab_size=512,
    teacher=_marian(128, 2, 4, 512),
    teacher_steps=700,
    teacher_lr=2e-3,
    student=_marian(64, 1, 4, 128),
    student_steps=600,
    student_lrs=(4e-3, 8e-3, 1.6e-2),
    batch_tokens=1536,
    validations=10,
)
QUICK = Size(
    pairs={"test": 12, "dev": 12, "train": 200},
    student_pairs=80,
    vocab_size=160,
    teacher=_marian(32, 1, 2, 64),
    teacher_steps=8,
    teacher_lr=2e-3,
    student=_marian(16, 1, 2, 32),
    student_steps=6,
    student_lrs=(1e-3, 2e-3),
    batch_tokens=512,
    validations=2,
)


@dataclass(frozen=True)
class Paths:
    """Where everything lies."""

    out: Path

    def text(self, split: str, side: str) -> Path:
        """One side of a split, a sentence a line."""
        return self.out / "corpus" / f"{split}.{side}"

    def recipe(self, name: str) -> Path:
        """A recipe that `kdcache` commands can run again."""
        return self.out / "recipes" / f"{name}.yaml"

    def run(self, name: str) -> Path:
        """A run of `kdcache train`."""
        return self.out / "runs" / name

    @property
    def tokens(self) -> Path:
        """The cache of tokenised samples the teacher learns from."""
        return self.out / "tokens"

    @property
    def cache(self) -> Path:
        """The cache of soft labels."""
        return self.out / "cache"

    @property
    def report(self) -> Path:
        """The page."""
        return self.out / "report.html"


def student_name(lr: float) -> str:
    """Name of the run without the cache at one learning rate."""
    return f"no-kd-lr-{lr:g}"


def teacher_recipe(paths: Paths, size: Size) -> Recipe:
    """Samples alone under a SentencePiece model of their own, and a model trained on them."""
    tokenizer = {"kind": "sentencepiece", "vocab_size": size.vocab_size}
    return _recipe(
        paths,
        size,
        "teacher",
        "The quickstart's teacher, trained on the references.",
        dump={
            "tokenizers": {"joint": tokenizer},
            "streams": {
                "src": {"field": "src", "tokenizer": "joint"},
                "tgt": {"field": "tgt", "tokenizer": "joint", "target": True},
            },
        },
        train=_train(paths, size, size.teacher, size.teacher_steps, size.teacher_lr),
    )


def student_recipe(paths: Paths, size: Size, lr: float, distil: bool) -> Recipe:
    """A student of the cache, trained with its soft labels or without.

    Args:
        paths: where everything lies.
        size: how large everything is.
        lr: peak learning rate.
        distil: whether the cached labels are used; nothing else differs.
    """
    train = _train(paths, size, size.student, size.student_steps, lr)
    if distil:
        train["objective"] = [
            {"loss": "cross_entropy", "weight": 0.5},
            {"loss": "forward_kl", "weight": 0.5, "signal": "logits", "temperature": 1.0},
        ]
    return _recipe(
        paths,
        size,
        "word-level" if distil else student_name(lr),
        "The quickstart's student with the cache: references and soft labels."
        if distil
        else "The quickstart's student without the cache: references alone.",
        dump={
            "teacher": {"path": str(paths.run("teacher") / "best"), "device": "cpu"},
            # The students read few pairs many times, and what was drawn stays as it was drawn.
            "signals": {"logits": {"codec": {"name": "threshold", "c": 1 / 256}}},
        },
        train=train,
        corpus={**_corpus(paths, "train"), "limit": size.student_pairs},
    )


def _train(
    paths: Paths, size: Size, model: dict[str, Any], steps: int, lr: float
) -> dict[str, Any]:
    """The train section all runs share but for the model, its steps and its learning rate."""
    every = max(1, steps // size.validations)
    return {
        "student": {"config": model},
        "objective": [{"loss": "cross_entropy", "weight": 1.0}],
        "max_steps": steps,
        "batch_tokens": size.batch_tokens,
        "optimizer": {"name": "adam", "lr": lr},
        "schedule": {"name": "cosine", "warmup_steps": max(1, steps // 10)},
        "device": "cpu",
        "validation": {"corpus": _corpus(paths, "dev"), "every_steps": every},
        "checkpoints": {"every_steps": every, "average_last": 0},
        "log_every": max(1, every // 2),
    }


def _recipe(paths: Paths, size: Size, name: str, description: str, **sections: Any) -> Recipe:
    return parse_recipe(
        {
            "name": name,
            "description": description,
            "corpus": _corpus(paths, "train"),
            **sections,
            "evaluate": {
                "corpus": _corpus(paths, "test"),
                "device": "cpu",
                "latency_sentences": min(20, size.pairs["test"]),
            },
        },
        where=f"quickstart {name}",
    )


def _corpus(paths: Paths, split: str) -> dict[str, Any]:
    """The corpus section of a split."""
    return {"fields": {side: str(paths.text(split, side)) for side in SIDES}}
