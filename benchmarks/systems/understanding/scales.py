"""How large everything is: the same table in minutes, in hours, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from systems.scales import Shape
from systems.understanding.texts import COLUMNS


@dataclass(frozen=True)
class Scale:
    """Sizes of one run of the whole table.

    Attributes:
        lines: of every text that is read alone; None: all.
        samples: of the five tasks, those that are named; of the others all.
        pairs: translations that MASS is fine-tuned on; None: all.
        test: of each test set; None: all.
        vocab_size: of each tokenizer.
        words: of the word-level tokenizer.
        teacher: BERT and GPT-2; the body of the teacher of five tasks too.
        teacher_steps: optimiser steps of each teacher on text alone.
        task_steps: and then on its task.
        student: of both; two layers, as PKD's and TinyBERT's have.
        mass_teacher: encoder and decoder.
        mass: their student.
        lstm: width of the BiLSTM, its embeddings and its feed-forward layer.
        head: width of the heads of five tasks.
        pretraining_steps: of a student of LightPAFF: bert, gpt2 and mass.
        finetuning_steps: and on its task.
        epochs: of a student of five tasks, over whatever tasks it has.
        teacher_epochs: of their teacher.
        pretraining_lr: peak learning rate on text alone.
        lr: and on a task of LightPAFF.
        mkd_lr: and on five tasks.
        lstm_lr: there of a BiLSTM.
        pretraining_tokens: padded tokens of a step on text alone.
        batch_tokens: and on a task of LightPAFF.
        mkd_tokens: and on five tasks, where many small steps learn more than a few large ones.
        warmup_steps: of every run; a tenth of it where a run has one task of five.
        every_steps: of `batch_tokens` between validations, and between checkpoints.
        dev_tokens: of a validation.
        replicas: maskings of every text.
        seeds: of the core rows; the others have the first.
        mkd_seeds: of these, how many MKD's rows have.
        jobs: commands side by side.
    """

    lines: int | None
    samples: Mapping[str, int]
    pairs: int | None
    test: int | None
    vocab_size: int
    words: int
    teacher: Shape
    teacher_steps: int
    task_steps: int
    student: Shape
    mass_teacher: Shape
    mass: Shape
    lstm: int
    head: int
    pretraining_steps: Mapping[str, int]
    finetuning_steps: Mapping[str, int]
    epochs: int
    teacher_epochs: int
    pretraining_lr: float
    lr: float
    mkd_lr: float
    lstm_lr: float
    pretraining_tokens: int
    batch_tokens: int
    mkd_tokens: int
    warmup_steps: int
    every_steps: int
    dev_tokens: int
    replicas: int
    seeds: tuple[int, ...]
    mkd_seeds: int
    jobs: int


def _each(steps: int) -> dict[str, int]:
    """As many steps for each student of LightPAFF."""
    return dict.fromkeys(("bert", "gpt2", "mass"), steps)


SCALES = {
    "smoke": Scale(
        lines=400,
        samples=dict.fromkeys(COLUMNS, 120),
        pairs=300,
        test=40,
        vocab_size=300,
        words=400,
        teacher=Shape(32, 64, (4,), 2),
        teacher_steps=40,
        task_steps=40,
        student=Shape(16, 32, (2,), 2),
        mass_teacher=Shape(32, 64, (2, 2), 2),
        mass=Shape(16, 32, (2, 1), 2),
        lstm=16,
        head=16,
        pretraining_steps=_each(15),
        finetuning_steps=_each(20),
        epochs=2,
        teacher_epochs=3,
        pretraining_lr=3e-3,
        lr=3e-3,
        mkd_lr=3e-3,
        lstm_lr=3e-3,
        pretraining_tokens=1024,
        batch_tokens=1024,
        mkd_tokens=1024,
        warmup_steps=10,
        every_steps=10,
        dev_tokens=800,
        replicas=1,
        seeds=(1,),
        mkd_seeds=1,
        jobs=2,
    ),
    "laptop": Scale(
        lines=100_000,
        samples={"banking77": 3000, "clinc150": 3000, "snli": 2500, "qnli": 1200},
        pairs=15_000,
        test=2000,
        vocab_size=4000,
        words=20_000,
        teacher=Shape(128, 512, (4,), 4),
        teacher_steps=2500,
        task_steps=1200,
        student=Shape(96, 384, (2,), 4),
        mass_teacher=Shape(128, 512, (3, 3), 4),
        mass=Shape(96, 288, (2, 2), 4),
        lstm=96,
        head=128,
        pretraining_steps={**_each(1000), "bert": 2000},
        finetuning_steps={**_each(700), "bert": 2000},
        epochs=12,
        teacher_epochs=20,
        pretraining_lr=2e-3,
        lr=1e-3,
        mkd_lr=4e-4,
        lstm_lr=2e-3,
        pretraining_tokens=4096,
        batch_tokens=1024,
        mkd_tokens=256,
        warmup_steps=150,
        every_steps=250,
        dev_tokens=30_000,
        replicas=2,
        seeds=(1, 2, 3),
        mkd_seeds=1,
        jobs=2,
    ),
    "gpu": Scale(
        lines=None,
        samples={},
        pairs=None,
        test=None,
        vocab_size=8000,
        words=30_000,
        teacher=Shape(512, 2048, (6,), 8),
        teacher_steps=20_000,
        task_steps=6000,
        student=Shape(256, 1024, (2,), 8),
        mass_teacher=Shape(512, 2048, (6, 6), 8),
        mass=Shape(256, 1024, (3, 2), 4),
        lstm=256,
        head=512,
        pretraining_steps=_each(10_000),
        finetuning_steps=_each(4000),
        epochs=16,
        teacher_epochs=10,
        pretraining_lr=5e-4,
        lr=3e-4,
        mkd_lr=3e-4,
        lstm_lr=1e-3,
        pretraining_tokens=32_768,
        batch_tokens=8192,
        mkd_tokens=2048,
        warmup_steps=500,
        every_steps=250,
        dev_tokens=100_000,
        replicas=4,
        seeds=(1, 2, 3),
        mkd_seeds=3,
        jobs=1,
    ),
}
