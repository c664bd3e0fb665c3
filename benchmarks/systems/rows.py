"""The rows of the table: which recipe, over which cache, and what its paper reports."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Development or test BLEU of the papers: a system's figure and that of its student without one.
Published = tuple[float, float]

CKD = "CKD, Tr-En"
NEMO = "NeMo talk, WMT20 De-En, slim 3x3"
MASK = "mask task, WMT14 En-De"


@dataclass(frozen=True)
class Row:
    """One system.

    Attributes:
        name: shown in the table, and the name of its runs.
        recipe: a built-in recipe.
        cache: which cache it is trained on.
        core: whether it is trained with every seed.
        base: the row that it is compared with; None for those rows themselves.
        overrides: recipe fields that make the row of the recipe; `{last}` stands for the number of
            the teacher's last decoder layer, braces are doubled.
        own_student: whether the recipe says how the student starts, so that no sizes are given.
        paper: where the published figures are from.
        published: figures; None where the paper has none.
        passes: teacher passes over a training batch that the system would take online.
        masked: whether it is one of the mask-task systems, which have a language pair of their own.
    """

    name: str
    recipe: str
    cache: str = "all"
    core: bool = False
    base: str | None = "no-kd"
    overrides: Mapping[str, str] = field(default_factory=dict)
    own_student: bool = False
    paper: str = ""
    published: Published | None = None
    passes: int = 1
    masked: bool = False


def weights(*values: float) -> dict[str, str]:
    """Overrides of the weights of an objective's terms, in their order."""
    return {f"train.objective.{n}.weight": f"{value:g}" for n, value in enumerate(values)}


def _word_level() -> list[Row]:
    hot = "train.objective.1.temperature"
    return [
        Row("word-level", "word-level", core=True),
        Row("word-level, KD alone", "word-level", overrides=weights(0, 1)),
        *(
            Row(f"word-level, T = {t}", "word-level", overrides={hot: t})
            for t in ("0.5", "2", "5", "10")
        ),
        Row("ensemble of two teachers", "word-level", cache="ensemble"),
        Row("two teachers in turn", "word-level", cache="all+second"),
    ]


def _sequence_level() -> list[Row]:
    mixes = {(0.1, 0.9): 30.6, (0.34, 0.66): 30.4, (0.66, 0.34): 30.3, (0.9, 0.1): 29.4}
    (first, *_), name = mixes, "interpolation"
    return [
        Row("sequence-level", "sequence-level", core=True, passes=0),
        Row("sequence-level, greedy", "sequence-level", cache="greedy", passes=0),
        *(
            Row(
                name if pair == first else f"{name}, {pair[0]} and {pair[1]}",
                "sequence-level-interpolation",
                core=pair == first,
                overrides=weights(*pair),
                paper=NEMO,
                published=(bleu, 29.6),
                passes=0,
            )
            for pair, bleu in mixes.items()
        ),
        Row(f"{name}, closest of n", "sequence-level-closest", cache="closest", passes=0),
    ]


def _hybrid() -> list[Row]:
    names = ("NLL", "sequence-level KD", "word-level KD")
    full = (0.34, 0.66, 1.0)
    rows = [Row("hybrid", "hybrid", core=True, passes=2)]
    for on in itertools.product((True, False), repeat=3):
        if any(on) and not all(on):
            kept = [weight if use else 0.0 for weight, use in zip(full, on, strict=True)]
            name = " + ".join(name for name, use in zip(names, on, strict=True) if use)
            rows.append(
                Row(f"hybrid: {name}", "hybrid", overrides=weights(*kept), passes=2 * on[2])
            )
    few, base = "low-data", "no-kd, 5% of the data"
    return [
        *rows,
        Row(base, "no-kd", cache=few, base=None, passes=0),
        Row("hybrid, 5% of the data", "hybrid", cache=few, base=base, passes=2),
    ]


def _distilbert() -> list[Row]:
    names = ("KL", "NLL", "cosine")
    last = {"train.objective.3.layers": "[{{student: 2, teacher: {last}}}]"}
    rows = [Row("distilbert", "distilbert", core=True, overrides=last)]
    for on in itertools.product((True, False), repeat=3):
        if any(on) and not all(on):
            kept = weights(*(float(use) for use in on[:2]), 0.5 * on[2], 0.5 * on[2])
            name = " + ".join(name for name, use in zip(names, on, strict=True) if use)
            passes = int(on[0] or on[2])
            rows.append(
                Row(f"distilbert: {name}", "distilbert", overrides=last | kept, passes=passes)
            )
    start = last | {"train.student.layers": "{{encoder: [3, 6], decoder: [1, {last}]}}"}
    name = "distilbert, teacher's layers"
    return [*rows, Row(name, "distilbert-init", overrides=start, own_student=True)]


#: After the name of a row whose hidden states are compared as in the code that its paper released:
#: the student's projected to the teacher's side by side, both to length 1.
RELEASED = ", released code"


def _layers() -> list[Row]:
    published = {
        "regular-kd": 25.16,
        "pkd": 26.88,
        "ckd-regular": 26.75,
        "ckd-overlap": 26.52,
        "ckd-skip": 26.37,
        "ckd-cross": 27.09,
    }
    core = ("regular-kd", "pkd", "ckd-overlap", "ckd-cross")
    rows = [
        Row(name, name, core=name in core, paper=CKD, published=(bleu, 24.60))
        for name, bleu in published.items()
    ]
    released = {
        "train.objective.2.loss": "hidden_cosine",
        "train.objective.2.weight": "1.4",  # squares of states of length 1: 2 - 2 cos, times 0.7
        "train.objective.2.fuse": "student",
    }
    rows += [
        Row(f"{name}{RELEASED}", name, core=True, overrides=released, paper=CKD)
        for name in ("pkd", "ckd-overlap", "ckd-cross")
    ]
    return [*rows, Row("pkd, self-attention too", "pkd-attention")]


#: What the systems of the mask task are compared with: the same student without a teacher.
MASKED_BASE = "no-kd, masked pair"


def _mask_task() -> list[Row]:
    gate, alpha = "train.gate", "train.objective.1.weight"
    hidden = {gate: "{{terms: [hidden_mse]}}"}
    masked = {"train.objective.1.signal": "masked_hidden"}

    def row(name: str, recipe: str, bleu: float | None = None, **more: Any) -> Row:
        published = None if bleu is None else (bleu, 27.96)
        known = {"cache": "masked", "base": MASKED_BASE, "paper": MASK, "masked": True}
        return Row(name, recipe, published=published, **{**known, **more})

    return [
        row(MASKED_BASE, "mask-task", core=True, base=None, overrides={alpha: "0"}, passes=0),
        row("mask-task", "mask-task", 28.53, core=True),
        row("mask-task, gate", "mask-task-gate", 28.71, core=True),
        row("mask-task, alpha 0.25", "mask-task", overrides={alpha: "0.25"}),
        row("mask-task, alpha 0.75", "mask-task", overrides={alpha: "0.75"}),
        row("mask-task, original input", "mask-task-original", 28.46),
        row("mask-task, SpanBERT, gate", "mask-task-gate", 28.36, cache="masked-span"),
        row("hidden states of BERT", "mask-task-hidden", 28.20),
        row("hidden states of BERT, masked input", "mask-task-hidden", 28.07, overrides=masked),
        row("hidden states of BERT, gate", "mask-task-hidden", 28.44, overrides=hidden),
        row(
            "hidden states of BERT, masked input, gate",
            "mask-task-hidden",
            overrides={**masked, **hidden},
        ),
        row("hidden states of SpanBERT", "mask-task-hidden", 27.67, cache="masked-span"),
    ]


@dataclass(frozen=True)
class Statement:
    """What a paper found, and whether it is so here.

    Attributes:
        text: in words.
        paper: whose finding.
        better: rows, the best of which is meant.
        worse: the row that it is compared with.
        strictly: whether a draw is not enough.
    """

    text: str
    paper: str
    better: tuple[str, ...]
    worse: str
    strictly: bool = True


_COMBINATIONS = ("ckd-regular", "ckd-overlap", "ckd-skip", "ckd-cross")
STATEMENTS = [
    Statement("word-level above no-KD", "Kim & Rush", ("word-level",), "no-kd"),
    Statement("sequence-level above no-KD", "Kim & Rush", ("sequence-level",), "no-kd"),
    Statement("interpolation above no-KD", NEMO, ("interpolation",), "no-kd"),
    Statement("hybrid above no-KD", NEMO, ("hybrid",), "no-kd"),
    Statement(
        "the teacher's layers are no better start", NEMO,
        ("distilbert",), "distilbert, teacher's layers", strictly=False,
    ),
    Statement("regular KD above no-KD", CKD, ("regular-kd",), "no-kd"),
    Statement("PKD above no-KD", CKD, ("pkd",), "no-kd"),
    Statement("the best combination at or above PKD", CKD, _COMBINATIONS, "pkd", strictly=False),
    Statement(
        "the best combination at or above PKD, released code", CKD,
        tuple(f"{name}{RELEASED}" for name in _COMBINATIONS), f"pkd{RELEASED}", strictly=False,
    ),
    Statement("mask task above no-KD", MASK, ("mask-task",), MASKED_BASE),
    Statement(
        "the gate no worse than without", MASK,
        ("mask-task, gate",), "mask-task", strictly=False,
    ),
]  # fmt: skip

ROWS = {
    row.name: row
    for row in [
        Row("no-kd", "no-kd", core=True, base=None, passes=0),
        *_word_level(),
        *_sequence_level(),
        *_hybrid(),
        *_distilbert(),
        *_layers(),
        *_mask_task(),
    ]
}
#: The rows that are trained with every seed, and that the larger scales are about.
CORE = [name for name, row in ROWS.items() if row.core]
