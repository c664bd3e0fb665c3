"""The teachers of the table and the caches they write, as steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from systems.graph import Step
from systems.understanding.scales import Scale
from systems.understanding.texts import COLUMNS, Texts, task_section
from systems.work import Command, Overrides

#: The single sentence task that stands for SST-2 in LightPAFF's table.
TASK = "clinc150"
#: Tasks whose classes no recipe names.
UNNAMED = ("banking77", "clinc150")
FIELDS = {"format": "tsv", "fields": "{text: sentence, label: label}", "label": "label"}


def under(section: str, values: Overrides) -> dict[str, object]:
    """Overrides of a section of a recipe.

    Args:
        section: its dotted path.
        values: by key of it.
    """
    return {f"{section}.{key}": value for key, value in values.items()}


def labels_of(path: Path) -> str:
    """The classes of a tsv whose last column is the label, as YAML."""
    _, *rows = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return json.dumps(sorted({row.rpartition("\t")[2] for row in rows}))


class Teachers:
    """Every cache and teacher by name, as `caches/mkd` and `runs/bert`.

    Args:
        folder: where everything lies.
        scale: how large it is.
        texts: what it is made of.

    Attributes:
        steps: what makes them.
    """

    def __init__(self, folder: Path, scale: Scale, texts: Texts) -> None:
        self.folder, self.scale, self.texts = folder, scale, texts
        self.steps: dict[str, Step] = {}
        self._bert()
        self._five_tasks()
        self._gpt2()
        self._mass()

    def path(self, name: str) -> Path:
        """Where a cache or run is."""
        return self.folder / name

    def dev_corpora(self, group: str) -> Mapping[str, Overrides]:
        """Stage to the development set of bert, gpt2 or mass."""
        task: Overrides = {**FIELDS, "path": self.texts.tasks[TASK]["dev"]}
        wiki = self._wiki("dev")
        english: Overrides = {"fields.text": self.texts.english["dev"]}
        src, tgt = self.texts.pairs.files["dev"]
        return {
            "bert": {"pretraining": english, "finetuning": task},
            "gpt2": {"pretraining": english, "finetuning": wiki},
            "mass": {
                "pretraining": {"fields.text": self.texts.both["dev"]},
                "finetuning": {"fields.src": src, "fields.tgt": tgt},
            },
        }[group]

    def test_corpus(self, group: str) -> Overrides:
        """The test set of bert or gpt2."""
        return {
            "bert": {**FIELDS, "path": self.texts.tasks[TASK]["test"]},
            "gpt2": self._wiki("test"),
        }[group]

    def task_training(self, epochs: int) -> dict[str, object]:
        """Overrides that trainings of the five tasks share.

        Args:
            epochs: over the tasks that it has.
        """
        scale = self.scale
        listed = ", ".join(
            f"{name}: {task_section(name, files['dev'])}"
            for name, files in self.texts.tasks.items()
        )
        # Few samples need not have all classes.
        labels = {
            f"train.student.tasks.{name}.labels": labels_of(self.texts.tasks[name]["train"])
            for name in UNNAMED
        }
        every = scale.every_steps * scale.batch_tokens // scale.mkd_tokens
        return {
            "train.validation.corpus.tasks": f"{{{listed}}}",
            **labels,
            **self._lengths(),
            "train.validation.every_steps": every,
            "train.checkpoints.every_steps": every,
            "train.batch_tokens": scale.mkd_tokens,
            "train.max_epochs": epochs,
            "train.max_steps": 1_000_000,  # epochs bound it
            "train.optimizer.lr": scale.mkd_lr,
        }

    def _wiki(self, split: str) -> Overrides:
        """Running text as people write it."""
        return {"fields.text": self.texts.wiki[split], "detokenize": "wikitext"}

    def _lengths(self) -> dict[str, object]:
        """How often a run is looked at, and its batches."""
        scale = self.scale
        return {
            "train.validation.every_steps": scale.every_steps,
            "train.validation.limit_tokens": scale.dev_tokens,
            "train.checkpoints.every_steps": scale.every_steps,
            "train.batch_tokens": scale.batch_tokens,
            "train.schedule.warmup_steps": scale.warmup_steps,
        }

    def _some(self, limit: int | None) -> dict[str, object]:
        """The first rows of a corpus."""
        return {} if limit is None else {"corpus.limit": limit}

    def _dump(self, name: str, recipe: str, needs: tuple[str, ...], more: Overrides) -> None:
        """Add a cache."""
        words = ("dump", recipe, "--out", str(self.path(f"caches/{name}")))
        self.steps[f"caches/{name}"] = Step(Command(words, more), needs)

    def _train(
        self, name: str, recipe: str, cache: str, more: Overrides, start: str | None = None
    ) -> None:
        """Add a teacher, from a cache, that may begin as another."""
        words = ("train", recipe, "--out", str(self.path(f"runs/{name}")))
        words = (*words, "--cache", str(self.path(f"caches/{cache}")))
        needs: tuple[str, ...] = (f"caches/{cache}",)
        scale = self.scale
        found = self._lengths()
        if start is None:
            found |= {
                "train.batch_tokens": scale.pretraining_tokens,
                "train.max_steps": scale.teacher_steps,
                "train.optimizer.lr": scale.pretraining_lr,
            }
        else:
            found |= {
                "train.max_steps": scale.task_steps,
                "train.optimizer.lr": scale.lr,
                "train.student.config": "null",
                "train.student.path": self.path(f"runs/{start}") / "best",
            }
            needs = (*needs, f"runs/{start}")
        self.steps[f"runs/{name}"] = Step(Command(words, {**found, **more}), needs)

    def _labels(
        self, name: str, recipe: str, teacher: str, corpus: Overrides, more: Overrides
    ) -> None:
        """Add a cache of what a teacher says."""
        path = self.path(f"runs/{teacher}") / "best"
        self._dump(
            name, recipe, (f"runs/{teacher}",), {**corpus, "dump.teacher.path": path, **more}
        )

    def _bert(self) -> None:
        """A BERT, that of a task, and what both say."""
        scale, last = self.scale, self.scale.teacher.layers[0]
        text = {"corpus.fields.text": self.texts.english["train"], **self._some(scale.lines)}
        task = {
            **under("corpus", {**FIELDS, "path": self.texts.tasks[TASK]["train"]}),
            **self._some(scale.samples.get(TASK)),
        }
        replicas = {"dump.signals.masks.replicas": scale.replicas}
        pieces = f"{{kind: wordpiece, vocab_size: {scale.vocab_size}}}"
        whole = {**text, **replicas, "dump.tokenizers.pieces": pieces}
        self._dump("bert-text", "masked-lm", (), whole)
        dev = self.dev_corpora("bert")
        sizes = under("train.student.config", scale.teacher.bert_sizes)
        watched = under("train.validation.corpus", dev["pretraining"])
        self._train("bert", "masked-lm", "bert-text", {**sizes, **watched})
        known = {"dump.signals": "{}", "dump.tokenizers.teacher.path": self._best("bert")}
        fine = "lightpaff-bert:finetuning"
        self._dump("bert-gold", fine, ("runs/bert",), {**task, **known})
        gold = {
            "train.objective": "[{loss: label_cross_entropy}]",
            "train.student.labels": labels_of(self.texts.tasks[TASK]["train"]),
            **under("train.validation.corpus", dev["finetuning"]),
        }
        self._train("bert-task", fine, "bert-gold", gold, "bert")
        pre = "lightpaff-bert:pretraining"
        self._labels("bert-pretraining", pre, "bert", text, replicas)
        self._labels("bert-finetuning", fine, "bert-task", task, {})
        cls = {"dump.signals.cls.layers": f"[{last // 2}]"}
        self._labels("bert-pkd", "pkd-bert", "bert-task", task, cls)
        maps = {
            "dump.signals.states.layers": f"[0, {last // 2}, {last}]",
            "dump.signals.attention.layers": f"[{last // 2}, {last}]",
        }
        self._labels("bert-tiny", "tinybert", "bert-task", task, maps)

    def _five_tasks(self) -> None:
        """The teacher of five tasks, and the one cache of all its students."""
        scale = self.scale
        corpus: dict[str, object] = {}
        for name in COLUMNS:
            corpus[f"corpus.tasks.{name}.path"] = self.texts.tasks[name]["train"]
            if name in scale.samples:
                corpus[f"corpus.tasks.{name}.limit"] = scale.samples[name]
        pieces = f"{{kind: pretrained, path: {self._best('bert')}}}"
        gold = {**corpus, "dump.tokenizers.pieces": pieces}
        self._dump("mkd-gold", "mkd-teacher", ("runs/bert",), gold)
        training = self.task_training(scale.teacher_epochs)
        self._train("mkd-teacher", "mkd-teacher", "mkd-gold", training, "bert")
        words = {"dump.tokenizers.words.vocab_size": scale.words}
        self._labels("mkd-all", "mkd-all", "mkd-teacher", corpus, words)
        compiled = ("compile", str(self.path("caches/mkd-all")), "--out")
        command = (*compiled, str(self.path("caches/mkd")), "--filter", "copy.number == 0")
        self.steps["caches/mkd"] = Step(Command(command, {}), ("caches/mkd-all",))

    def _gpt2(self) -> None:
        """A GPT-2, that of a text, and what both say."""
        scale = self.scale
        task = {**under("corpus", self._wiki("train")), **self._some(scale.lines)}
        text = {"corpus.fields.text": self.texts.english["train"], **self._some(scale.lines)}
        size = {"dump.tokenizers.pieces.vocab_size": scale.vocab_size}
        self._dump("gpt2-gold", "causal-lm", (), {**task, **size})
        pieces = self.path("caches/gpt2-gold") / "tokenizers" / "pieces"
        same = {"dump.tokenizers.pieces": f"{{kind: pretrained, path: {pieces}}}"}
        self._dump("gpt2-text", "causal-lm", ("caches/gpt2-gold",), {**text, **same})
        pre, fine = (
            under("train.validation.corpus", dev) for dev in self.dev_corpora("gpt2").values()
        )
        sizes = under("train.student.config", scale.teacher.gpt2_sizes)
        self._train("gpt2", "causal-lm", "gpt2-text", {**sizes, **pre})
        self._train("gpt2-task", "causal-lm", "gpt2-gold", fine, "gpt2")
        self._labels("gpt2-pretraining", "lightpaff-gpt2:pretraining", "gpt2", text, {})
        self._labels("gpt2-finetuning", "lightpaff-gpt2:finetuning", "gpt2-task", task, {})

    def _mass(self) -> None:
        """A MASS, the translator it becomes, and what both say."""
        scale, dev = self.scale, self.dev_corpora("mass")
        pre, fine = "lightpaff-mass:pretraining", "lightpaff-mass:finetuning"
        text = {"corpus.fields.text": self.texts.both["train"], **self._some(scale.lines)}
        task = self.texts.pairs.corpus("train", "corpus", scale.pairs)
        masks = f"{{kind: masks, stream: text, scheme: segment, replicas: {scale.replicas}}}"
        own = f"kind: sentencepiece, vocab_size: {scale.vocab_size}, fields: [text], mask: true"
        alone = {
            "dump.tokenizers.teacher": f"{{{own}}}",
            "dump.signals": f"{{masks: {masks}}}",
        }
        self._dump("mass-text", pre, (), {**text, **alone})
        sizes = under("train.student.config", scale.mass_teacher.sizes)
        watched = under("train.validation.corpus", dev["pretraining"])
        hard = {"train.objective": "[{loss: cross_entropy, masks: masks}]"}
        self._train("mass", pre, "mass-text", {**sizes, **watched, **hard})
        known = {"dump.signals": "{}", "dump.tokenizers.teacher.path": self._best("mass")}
        self._dump("mass-gold", fine, ("runs/mass",), {**task, **known})
        gold = {
            "train.objective": "[{loss: cross_entropy}]",
            **under("train.validation.corpus", dev["finetuning"]),
        }
        self._train("mass-task", fine, "mass-gold", gold, "mass")
        replicas = {"dump.signals.masks.replicas": scale.replicas}
        self._labels("mass-pretraining", pre, "mass", text, replicas)
        self._labels("mass-finetuning", fine, "mass-task", task, {})

    def _best(self, run: str) -> Path:
        return self.path(f"runs/{run}") / "best"
