"""The table of MKD, LightPAFF and BERT's students: what its rows need, and what they came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from setting import log

from systems.graph import Step, ordered
from systems.understanding.rows import CORE, ROWS, Row
from systems.understanding.scales import SCALES, Scale
from systems.understanding.table import results, shown
from systems.understanding.teachers import Teachers
from systems.understanding.texts import COLUMNS, Texts, find_texts, task_section
from systems.work import Command, Overrides, Workshop

__all__ = ["CORE", "ROWS", "SCALES", "make_story"]

#: The layers of the BERT that MKD's Transformer begins with.
FIRST_LAYERS = (1, 2, 3)


class Story:
    """All commands of a table, each with those that it wants before it.

    Args:
        folder: where everything lies.
        scale: how large it is.
        texts: what it is made of.
        rows: of the table.
    """

    def __init__(self, folder: Path, scale: Scale, texts: Texts, rows: Sequence[Row]) -> None:
        self.folder, self.scale, self.texts, self.rows = folder, scale, texts, rows
        self.made = Teachers(folder, scale, texts)
        self.steps = dict(self.made.steps)
        self.tests: list[str] = []
        for seed in scale.seeds:
            for row in rows:
                if seed in self.seeds(row):
                    self._plan(row, seed)

    def seeds(self, row: Row) -> Sequence[int]:
        """Seeds of a row."""
        most = self.scale.mkd_seeds if row.group == "mkd" else None
        return self.scale.seeds[:most] if row.core else self.scale.seeds[:1]

    def runs(self, row: Row, seed: int) -> dict[str, str]:
        """Names of the runs of a row: one of all tasks under an empty name, or one of each."""
        if row.teacher:
            return {"": row.teacher}
        name = "".join(letter if letter.isalnum() else "-" for letter in row.name)
        run = f"runs/{name}-{seed}"
        return {task: f"{run}-{task}" for task in COLUMNS} if row.apart else {"": run}

    def phases(self) -> Iterator[list[Command]]:
        """All commands; each knows those that it comes after."""
        yield ordered(self.steps, self.tests)

    def result(self) -> dict[str, Any]:
        """What the table came to, once all is done; it is shown too."""
        runs = {
            row.name: [
                {task: self.folder / run for task, run in self.runs(row, seed).items()}
                for seed in self.seeds(row)
            ]
            for row in self.rows
        }
        references = self.texts.pairs.references(self.scale.test)
        found = results(self.rows, runs, references)
        log(shown(found["rows"]))
        return {
            "generated_data": self.texts.generated,
            "lr": self.scale.lr,
            "mkd_lr": self.scale.mkd_lr,
            "lstm_lr": self.scale.lstm_lr,
            **found,
        }

    def _plan(self, row: Row, seed: int) -> None:
        """Add a row's training and its test."""
        base = None if row.base is None else self.runs(ROWS[row.base], seed)[""]
        for task, run in self.runs(row, seed).items():
            self._train(row, seed, task, run)
            needs = (run, *([f"tests/{base}"] if base else []))
            self.steps[f"tests/{run}"] = Step(self._testing(row, run, base), needs)
            self.tests.append(f"tests/{run}")

    def _train(self, row: Row, seed: int, task: str, run: str) -> None:
        """Add a training, and first that of the row that it begins with."""
        if run in self.steps:  # a teacher, or a row that another begins with
            return
        needs = [f"caches/{cache}" for cache in row.cache]
        more = self._of_tasks(row, task) if row.group == "mkd" else self._of_stages(row)
        if row.after is not None:
            first = ROWS[row.after]
            before = self.runs(first, seed)[""]
            self._train(first, seed, "", before)
            needs.append(before)
            more |= {
                "train.student.config": "null",
                "train.student.path": self.folder / before / "best",
                "train.optimizer.lr": self._lr(row) / 10,
                "train.max_epochs": max(1, self.scale.epochs // 4),
            }
        elif row.pretrained:
            needs.append("runs/bert")
        last = self.scale.teacher.layers[0]
        own = {k: v.format(half=last // 2, last=last) for k, v in row.overrides.items()}
        words = ("train", row.recipe, "--out", str(self.folder / run), *self._caches(row))
        if len(row.cache) > 1:
            words = (*words, "--share", str(self.folder / "shared"))
        command = Command(words, {**more, "train.seed": seed, **own})
        self.steps[run] = Step(command, tuple(needs))

    def _caches(self, row: Row) -> list[str]:
        """The words that name the caches of a row, by stage where it has two."""
        paths = [str(self.folder / "caches" / cache) for cache in row.cache]
        if len(paths) == 1:
            return ["--cache", paths[0]]
        stages = ("pretraining", "finetuning")
        return [
            word
            for stage, path in zip(stages, paths, strict=True)
            for word in ("--cache", f"{stage}={path}")
        ]

    def _lr(self, row: Row) -> float:
        """Peak learning rate on five tasks."""
        return self.scale.lstm_lr if row.name.startswith("BiLSTM") else self.scale.mkd_lr

    def _of_tasks(self, row: Row, task: str) -> dict[str, object]:
        """Overrides of a student of five tasks, or of one of them."""
        scale, made = self.scale, self.made
        found = made.task_training(max(1, scale.epochs // row.epochs_part))
        found |= {"train.student.head_size": scale.head, "train.optimizer.lr": self._lr(row)}
        if task:
            found["train.tasks"] = f"[{task}]"
            found["train.schedule.warmup_steps"] = max(1, scale.warmup_steps // 10)
        if row.pretrained:
            found |= {
                "train.student.config": "null",
                "train.student.path": made.path("runs/bert") / "best",
                "train.student.layers.encoder": str(list(FIRST_LAYERS)),
            }
        elif row.recipe.startswith("mkd-bilstm"):
            width = scale.lstm
            names = ("embedding_size", "feed_forward_size", "lstm_size")
            sizes = dict.fromkeys(names, width) | {"hidden_size": 2 * width}
            found |= {f"train.student.config.{key}": value for key, value in sizes.items()}
        elif row.after is None:
            sizes = {**scale.teacher.bert_sizes, "num_hidden_layers": len(FIRST_LAYERS)}
            found |= {f"train.student.config.{key}": value for key, value in sizes.items()}
        return found

    def _of_stages(self, row: Row) -> dict[str, object]:
        """Overrides of a student of one task, with its pre-training or without."""
        scale, made, group = self.scale, self.made, row.group
        shape = scale.mass if group == "mass" else scale.student
        sizes: Overrides = {
            "bert": shape.bert_sizes,
            "gpt2": shape.gpt2_sizes,
            "mass": shape.sizes if group == "mass" else {},
        }[group]
        found: dict[str, object] = {
            "train.validation.every_steps": scale.every_steps,
            "train.validation.limit_tokens": scale.dev_tokens,
            "train.checkpoints.every_steps": scale.every_steps,
            **{f"train.student.config.{key}": value for key, value in sizes.items()},
        }
        lengths = {
            "pretraining": {
                "batch_tokens": scale.pretraining_tokens,
                "max_steps": scale.pretraining_steps[group],
                "optimizer.lr": scale.pretraining_lr,
            },
            "finetuning": {
                "batch_tokens": scale.batch_tokens,
                "max_steps": scale.finetuning_steps[group],
                "optimizer.lr": scale.lr,
            },
        }
        corpora: Mapping[str, Overrides] = made.dev_corpora(group)
        both = len(row.cache) > 1
        for stage in lengths if both else ("finetuning",):
            own = {
                **lengths[stage],
                "schedule.warmup_steps": scale.warmup_steps,
                **{f"validation.corpus.{key}": value for key, value in corpora[stage].items()},
            }
            if group == "bert" and stage == "finetuning":
                own["validation.metric"] = "dev_accuracy"
            prefix = f"stages.{stage}.train" if both else "train"
            found |= {f"{prefix}.{key}": value for key, value in own.items()}
        return found

    def _testing(self, row: Row, run: str, against: str | None) -> Command:
        """The command that reads the test set, once."""
        words = ("evaluate", str(self.folder / run))
        if against is not None:
            words = (*words, "--against", str(self.folder / against))
        limit, texts = self.scale.test, self.texts
        some = {} if limit is None else {"evaluate.corpus.limit": limit}
        more: dict[str, object]
        if row.group == "mkd":
            files = {name: task_section(name, s["test"], limit) for name, s in texts.tasks.items()}
            listed = ", ".join(f"{name}: {section}" for name, section in files.items())
            more = {"evaluate.corpus.tasks": f"{{{listed}}}"}
        elif row.group == "mass":
            more = {**texts.pairs.corpus("test", "evaluate.corpus"), **some}
        else:
            corpus = self.made.test_corpus(row.group)
            more = {**{f"evaluate.corpus.{key}": value for key, value in corpus.items()}, **some}
        return Command(words, {"evaluate.latency_sentences": 0, **more})


def make_story(folder: Path, scale: Scale, workshop: Workshop, rows: Sequence[Row]) -> Story:
    """The table of some rows.

    Args:
        folder: where everything lies.
        scale: how large it is.
        workshop: is not needed here.
        rows: with those that they are compared with.
    """
    return Story(folder, scale, find_texts(folder / "texts"), rows)
