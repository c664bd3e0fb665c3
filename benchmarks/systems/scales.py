"""How large everything is: the same table in minutes, in hours, or on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Transformer.

    Attributes:
        width: of its states.
        ffn: inner width of its feed-forward layers.
        layers: of the encoder, and of the decoder where it has one.
        heads: of its attention.
        model_type: of an encoder-decoder; with six layers mBART's, which normalises before each,
            learns in far fewer steps than Marian's.
    """

    width: int
    ffn: int
    layers: tuple[int, ...]
    heads: int
    model_type: str = "marian"

    @property
    def sizes(self) -> dict[str, Any]:
        """Keys of a Marian config, or of mBART's."""
        sides = ("encoder", "decoder")
        return {
            "model_type": self.model_type,
            "d_model": self.width,
            **{f"{side}_ffn_dim": self.ffn for side in sides},
            **{f"{side}_attention_heads": self.heads for side in sides},
            **{f"{side}_layers": n for side, n in zip(sides, self.layers, strict=True)},
        }

    @property
    def bert_sizes(self) -> dict[str, Any]:
        """Keys of a BERT config."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers[0],
            "num_attention_heads": self.heads,
        }

    @property
    def gpt2_sizes(self) -> dict[str, Any]:
        """Keys of a GPT-2 config."""
        return {
            "n_embd": self.width,
            "n_inner": self.ffn,
            "n_layer": self.layers[0],
            "n_head": self.heads,
        }


@dataclass(frozen=True)
class Scale:
    """Sizes of one run of the whole table.

    Attributes:
        pairs: training pairs of each language pair; None: all.
        test: test sentences; None: all.
        vocab_size: of each SentencePiece model.
        teacher: of the translation systems; six encoder layers, as the published maps want.
        teacher_steps: optimiser steps of the teacher.
        teacher_lr: its peak learning rate.
        student: of the translation systems; two encoder layers.
        steps: optimiser steps of every student.
        batch_tokens: padded target tokens of a step.
        warmup_steps: of teacher and students.
        every_steps: between validations, and between checkpoints.
        dev_tokens: target tokens of a validation.
        lrs: peak learning rates that the student without a cache is tuned over.
        dropouts: and dropouts.
        tune_steps: steps of each of these runs.
        masked: the masked language models that teach the mask task.
        masked_steps: their optimiser steps.
        masked_batch_tokens: padded tokens of each.
        masked_lr: their peak learning rate.
        masked_vocab_size: of their tokenizer.
        seeds: of the core rows; the others have the first.
        jobs: commands side by side.
    """

    pairs: int | None
    test: int | None
    vocab_size: int
    teacher: Shape
    teacher_steps: int
    teacher_lr: float
    student: Shape
    steps: int
    batch_tokens: int
    warmup_steps: int
    every_steps: int
    dev_tokens: int
    lrs: tuple[float, ...]
    dropouts: tuple[float, ...]
    tune_steps: int
    masked: Shape
    masked_steps: int
    masked_batch_tokens: int
    masked_lr: float
    masked_vocab_size: int
    seeds: tuple[int, ...]
    jobs: int


SCALES = {
    "smoke": Scale(
        pairs=400,
        test=40,
        vocab_size=300,
        teacher=Shape(32, 64, (6, 2), 2, "mbart"),
        teacher_steps=60,
        teacher_lr=5e-3,
        student=Shape(16, 32, (2, 2), 2),
        steps=30,
        batch_tokens=1024,
        warmup_steps=10,
        every_steps=10,
        dev_tokens=400,
        lrs=(5e-3,),
        dropouts=(0.1,),
        tune_steps=10,
        masked=Shape(32, 64, (2,), 2),
        masked_steps=30,
        masked_batch_tokens=4096,
        masked_lr=2e-3,
        masked_vocab_size=300,
        seeds=(1,),
        jobs=2,
    ),
    "laptop": Scale(
        pairs=None,
        test=None,
        vocab_size=4000,
        teacher=Shape(128, 512, (6, 2), 4, "mbart"),
        teacher_steps=3000,
        teacher_lr=4e-3,
        student=Shape(64, 256, (2, 2), 4),
        steps=1500,
        batch_tokens=2048,
        warmup_steps=400,
        every_steps=200,
        dev_tokens=10_000,
        lrs=(2.8e-3, 5.6e-3, 1.12e-2),
        dropouts=(0.1,),
        tune_steps=400,
        masked=Shape(128, 512, (4,), 4),
        masked_steps=2500,
        masked_batch_tokens=4096,
        masked_lr=2e-3,
        masked_vocab_size=6000,
        seeds=(1, 2, 3),
        jobs=2,
    ),
    "gpu": Scale(
        pairs=None,
        test=None,
        vocab_size=8000,
        teacher=Shape(512, 2048, (6, 6), 8, "mbart"),
        teacher_steps=20_000,
        teacher_lr=3.5e-4,
        student=Shape(512, 2048, (2, 2), 8),
        steps=10_000,
        batch_tokens=16_384,
        warmup_steps=2000,
        every_steps=500,
        dev_tokens=20_000,
        lrs=(3.5e-4, 7e-4, 1.4e-3),
        dropouts=(0.1, 0.3),
        tune_steps=3000,
        masked=Shape(512, 2048, (6,), 8),
        masked_steps=20_000,
        masked_batch_tokens=65_536,
        masked_lr=5e-4,
        masked_vocab_size=8000,
        seeds=(1, 2, 3),
        jobs=1,
    ),
}
