"""The rows of the table: which recipe, over which cache, and what its paper reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from systems.rows import Statement, weights

#: Figure of a row in its paper, and that of the row that it is compared with.
Published = tuple[float, float]

#: The paper's table is of the BiLSTM; of the Transformer it says the same without figures.
MKD = "MKD, mean of 7 GLUE tasks, BiLSTM (Table 2)"
PAPERS = {
    "bert": "LightPAFF, SST-2 accuracy (Table 7)",
    "gpt2": "LightPAFF, WikiText-2 perplexity (Table 7)",
    "mass": "LightPAFF, En-De BLEU (Table 7)",
}
#: What the rows of a group are judged by, and whether more of it is better.
METRICS = {
    "mkd": ("score", True),
    "bert": ("accuracy", True),
    "gpt2": ("word_perplexity", False),
    "mass": ("bleu", True),
}


@dataclass(frozen=True)
class Row:
    """One system.

    Attributes:
        name: shown in the table, and the name of its runs.
        group: mkd, bert, gpt2 or mass; rows of one are compared.
        recipe: a built-in recipe, with stages where `cache` is of two.
        cache: which cache it is trained on; of two stages the caches in their order.
        core: whether it is trained with every seed.
        base: the row that it is compared with; None for those rows themselves.
        overrides: recipe fields that make the row of the recipe; `{half}` and `{last}` stand for
            layers of the BERT teacher, braces are doubled.
        apart: whether every task has a run of its own.
        after: the row whose run of the same seed it begins with.
        pretrained: whether the body begins as the first layers of the BERT.
        teacher: the run that the row is, if it is a teacher's: nothing is trained for it.
        epochs_part: it has this many times fewer passes over the cache.
        paper: where the published figures are from.
        published: figures; None where the paper has none.
    """

    name: str
    group: str
    recipe: str
    cache: tuple[str, ...]
    core: bool = False
    base: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False
    after: str | None = None
    pretrained: bool = False
    teacher: str = ""
    epochs_part: int = 1
    paper: str = ""
    published: Published | None = None


#: The score of MKD's Table 2, the mean over its tasks; a task with two figures is their mean.
_BILSTM = {"none": 66.2, "single": 68.9, "plain": 74.9, "words": 73.6, "multi": 82.1}


def _mkd(student: str, recipe: str, published: Mapping[str, float]) -> list[Row]:
    base = f"{student}, no distillation"
    gold: dict[str, object] = {"overrides": {"train.objective": "[{{loss: task_loss}}]"}}
    if recipe == "mkd":
        gold = {"recipe": "mkd-no-kd"}

    def row(what: str, key: str = "", cache: str = "mkd", **more: object) -> Row:
        found = (published[key], published["none"]) if key in published else None
        known: dict[str, object] = {
            "group": "mkd",
            "recipe": recipe,
            "cache": (cache,),
            "base": base,
            "pretrained": student == "Transformer",
            "paper": MKD,
            "published": found,
        }
        return Row(f"{student}, {what}", **{**known, **more})  # type: ignore[arg-type]

    multi = "multi-task distillation"
    return [
        row("no distillation", core=True, base=None, published=None, **gold),
        row("no distillation, a run a task", core=True, apart=True, **gold),
        row("single-task distillation", "single", core=True, apart=True),
        row(multi, "multi", core=True),
        row(
            "multi-task, then fine-tuned",
            apart=True,
            after=f"{student}, {multi}",
            pretrained=False,
            **gold,
        ),
        row("multi-task, masked copies", cache="mkd-all", epochs_part=3),
    ]


def _students() -> list[Row]:
    bilstm, multi = "BiLSTM, no distillation", "multi-task distillation"
    transformer = "Transformer, no distillation"
    ablations = {"without bi-attention": "plain", "over words": "words"}
    return [
        *_mkd("Transformer", "mkd", {}),
        Row("Transformer, multi-task, at random", "mkd", "mkd", ("mkd",), base=transformer),
        *_mkd("BiLSTM", "mkd-bilstm", _BILSTM),
        *(
            Row(
                f"BiLSTM {what}, {multi}",
                "mkd",
                f"mkd-bilstm-{key}",
                ("mkd",),
                core=True,
                base=bilstm,
                paper=MKD,
                published=(_BILSTM[key], _BILSTM["none"]),
            )
            for what, key in ablations.items()
        ),
    ]


#: Table 7 in its order.
WAYS = ("FT", "FT + KD", "PT, FT", "PT + KD, FT", "PT, FT + KD", "PT + KD, FT + KD")
_TABLE_7 = {
    "bert": (83.4, 86.9, 89.7, 90.8, 92.0, 92.9),
    "gpt2": (71.6, 34.3, 25.5, 21.6, 22.1, 18.8),
    "mass": (23.8, 26.2, 28.4, 29.5, 31.0, 32.2),
}
NAMES = {"bert": "BERT", "gpt2": "GPT-2", "mass": "MASS"}


def _lightpaff(group: str) -> list[Row]:
    figures, name = _TABLE_7[group], NAMES[group]
    rows = []
    for way, figure in zip(WAYS, figures, strict=True):
        two = way.startswith("PT")
        stages = [("pretraining", way.split(", ")[0])] if two else []
        stages.append(("finetuning", way.split(", ")[-1]))
        hard: dict[str, str] = {}
        for stage, how in stages:
            if "KD" not in how:
                prefix = f"stages.{stage}." if two else ""
                hard |= {f"{prefix}{key}": value for key, value in weights(1, 0).items()}
        first = way == WAYS[0]
        rows.append(
            Row(
                f"{name}, {way}",
                group,
                f"lightpaff-{group}" if two else f"lightpaff-{group}:finetuning",
                tuple(f"{group}-{stage}" for stage, _ in stages),
                core=True,
                base=None if first else f"{name}, {WAYS[0]}",
                overrides=hard,
                paper=PAPERS[group],
                published=None if first else (figure, figures[0]),
            )
        )
    return rows


def _layers() -> list[Row]:
    pkd = {"train.objective.2.layers": "[{{student: 1, teacher: {half}}}]"}
    maps = ("[", "{{student: 0, teacher: 0}}, ", "{{student: 1, teacher: {half}}}, ")
    states = "".join((*maps, "{{student: 2, teacher: {last}}}]"))
    attention = "[{{student: 1, teacher: {half}}}, {{student: 2, teacher: {last}}}]"
    tiny = {"train.objective.0.layers": states, "train.objective.1.layers": attention}
    base = "BERT, FT"
    return [
        Row("pkd-bert", "bert", "pkd-bert", ("bert-pkd",), base=base, overrides=pkd),
        Row("tinybert", "bert", "tinybert", ("bert-tiny",), base=base, overrides=tiny),
    ]


def _teachers() -> list[Row]:
    """What the students learned from."""
    known = {
        "mkd": ("mkd-teacher", "mkd-gold", "of five tasks"),
        "bert": ("lightpaff-bert:finetuning", "bert-gold", "BERT"),
        "gpt2": ("causal-lm", "gpt2-gold", "GPT-2"),
        "mass": ("lightpaff-mass:finetuning", "mass-gold", "MASS"),
    }
    return [
        Row(
            f"teacher, {name}",
            group,
            recipe,
            (cache,),
            teacher="runs/mkd-teacher" if group == "mkd" else f"runs/{group}-task",
        )
        for group, (recipe, cache, name) in known.items()
    ]


ROWS = {
    row.name: row
    for row in [
        *_teachers(),
        *_students(),
        *_lightpaff("bert"),
        *_layers(),
        *_lightpaff("gpt2"),
        *_lightpaff("mass"),
    ]
}
#: The teachers, and the rows that are trained with every seed: what larger scales are about.
CORE = [name for name, row in ROWS.items() if row.core or row.teacher]


def _statements() -> list[Statement]:
    found = []
    single, multi = "single-task distillation", "multi-task distillation"
    for student in ("Transformer", "BiLSTM"):
        none, one, all_ = (f"{student}, {way}" for way in ("no distillation", single, multi))
        found += [
            # Which of both rows without distillation is the paper's is not stated.
            Statement(f"{one} above none", MKD, (one,), f"{none}, a run a task"),
            Statement(f"{all_} above none", MKD, (all_,), none),
            Statement(f"{student}: multi-task above single-task", MKD, (all_,), one),
        ]
    best = f"BiLSTM, {multi}"
    found += [
        Statement("bi-attention above none", MKD, (best,), f"BiLSTM without bi-attention, {multi}"),
        Statement("pieces above words", MKD, (best,), f"BiLSTM over words, {multi}"),
    ]
    orders = (
        ("FT + KD", "FT"),
        ("PT, FT", "FT + KD"),
        ("PT + KD, FT", "PT, FT"),
        ("PT, FT + KD", "PT, FT"),
        ("PT + KD, FT + KD", "PT + KD, FT"),
        ("PT + KD, FT + KD", "PT, FT + KD"),
    )
    for group, name in NAMES.items():
        found += [
            Statement(f"{name}: {a} above {b}", PAPERS[group], (f"{name}, {a}",), f"{name}, {b}")
            for a, b in orders
        ]
    return found


STATEMENTS = _statements()
