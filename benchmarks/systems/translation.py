"""The translation table: what its rows need, and what they came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from setting import log

from kdcache import open_cache
from systems.rows import CORE, ROWS, STATEMENTS, Row
from systems.saving import forward_seconds, saving
from systems.scales import SCALES, Scale
from systems.table import judged, row_result, shown, teacher_result
from systems.work import (
    Command,
    Overrides,
    Pair,
    Texts,
    Workshop,
    bleu_p_value,
    evaluation,
    find_texts,
    lowest_dev_loss,
    median_speed,
    train,
)

__all__ = ["CORE", "ROWS", "SCALES", "make_story"]


class Story:
    """All commands of a table; what others need is made before them, once.

    Args:
        folder: where everything lies.
        scale: how large it is.
        texts: what it is made of.
        workshop: runs the commands.
        rows: of the table.
    """

    def __init__(
        self, folder: Path, scale: Scale, texts: Texts, workshop: Workshop, rows: Sequence[Row]
    ) -> None:
        self.folder, self.scale, self.texts = folder, scale, texts
        self.workshop, self.rows = workshop, rows
        self._made: dict[str, Path] = {}
        self._makers: dict[str, Callable[[Path], None]] = {
            "tokens": self._tokens,
            "all": self._all,
            "closest": self._closest,
            "low-data": self._low_data,
            "greedy": self._greedy,
            "plain": lambda path: self._plain(path, "masked-lm"),
            "plain-span": lambda path: self._plain(path, "masked-lm-span"),
            "masked": lambda path: self._masked(path, self.masked_teacher("plain"), "bert"),
            "masked-span": lambda path: self._masked(
                path, self.masked_teacher("plain-span"), "span"
            ),
            "second": self._second,
            "ensemble": self._ensemble,
        }

    def settings(self, pair: Pair, sizes: Overrides) -> dict[str, object]:
        """What all models of a language pair share.

        Args:
            pair: whose development set is watched.
            sizes: keys of the model's config.
        """
        return {
            **pair.corpus("dev", "train.validation.corpus"),
            **self.lengths(self.scale.steps),
            **{f"train.student.config.{key}": value for key, value in sizes.items()},
        }

    def lengths(self, steps: int) -> dict[str, object]:
        """How long a run is, and how often it is looked at."""
        scale = self.scale
        return {
            "train.validation.every_steps": scale.every_steps,
            "train.validation.limit_tokens": scale.dev_tokens,
            "train.checkpoints.every_steps": scale.every_steps,
            "train.max_steps": steps,
            "train.batch_tokens": scale.batch_tokens,
            "train.schedule.warmup_steps": scale.warmup_steps,
        }

    def cache(self, name: str) -> Path:
        """A cache of the table, made if it is not there yet."""
        if name not in self._made:
            path = self.folder / "caches" / name
            self._makers[name](path)
            self._made[name] = path
        return self._made[name]

    @cached_property
    def corpus(self) -> dict[str, object]:
        """What the caches of the main pair are made of."""
        return self.texts.main.corpus("train", "corpus", self.scale.pairs)

    def teacher(self, seed: int = 1) -> Path:
        """A translation teacher, trained on the main pair."""
        run = self.folder / "runs" / f"teacher-{seed}"
        settings = {
            **self.settings(self.texts.main, self.scale.teacher.sizes),
            "train.max_steps": self.scale.teacher_steps,
            "train.optimizer.lr": self.scale.teacher_lr,
            "train.seed": seed,
        }
        self.workshop.run([train("no-kd", [self.cache("tokens")], run, settings)])
        return run / "best"

    def _dump(self, recipe: str, path: Path, teacher: object, **more: object) -> None:
        words = ("dump", recipe, "--out", str(path))
        overrides = {**self.corpus, "dump.teacher.path": teacher, **more}
        self.workshop.run([Command(words, overrides)])

    def _tokens(self, path: Path) -> None:
        size = f"{{kind: sentencepiece, vocab_size: {self.scale.vocab_size}}}"
        joint = {
            "dump.tokenizers.joint": size,
            "dump.streams.src.tokenizer": "joint",
            "dump.streams.tgt.tokenizer": "joint",
        }
        words = ("dump", "no-kd", "--out", str(path))
        self.workshop.run([Command(words, {**self.corpus, **joint})])

    def _all(self, path: Path) -> None:
        layers = {"dump.signals.decoder.layers": f"[{self.scale.teacher.layers[1]}]"}
        self._dump("nmt-all", path, self.teacher(), **layers)

    def _closest(self, path: Path) -> None:
        words = ("compile", str(self.cache("all")), "--out", str(path))
        options = ("--targets", "beams=reference", "--signals")
        self.workshop.run([Command((*words, *options), {})])

    def _low_data(self, path: Path) -> None:
        words = ("compile", str(self.cache("all")), "--out", str(path), "--fraction", "0.05")
        self.workshop.run([Command(words, {})])

    def _greedy(self, path: Path) -> None:
        beams = {"dump.signals.beams": "{kind: beams, source: src, stream: tgt, mode: greedy}"}
        self._dump("sequence-level", path, self.teacher(), **beams)

    def _second(self, path: Path) -> None:
        self._dump("word-level", path, self.teacher(2))

    def _ensemble(self, path: Path) -> None:
        self._dump("word-level", path, f"[{self.teacher()}, {self.teacher(2)}]")

    def _plain(self, path: Path, recipe: str) -> None:
        scale = self.scale
        overrides: dict[str, object] = {
            "corpus.fields.text": self.texts.plain,
            "dump.tokenizers.pieces.vocab_size": scale.masked_vocab_size,
            **({} if scale.pairs is None else {"corpus.limit": scale.pairs}),
        }
        self.workshop.run([Command(("dump", recipe, "--out", str(path)), overrides)])

    def masked_teacher(self, cache: str) -> Path:
        """A masked language model, trained on plain text with the masks of a cache."""
        scale, shape = self.scale, self.scale.masked
        run = self.folder / "runs" / f"teacher-{cache}"
        settings = {
            "train.validation.corpus.fields.text": self.texts.masked.files["dev"][0],
            **self.lengths(scale.masked_steps),
            "train.batch_tokens": scale.masked_batch_tokens,
            "train.optimizer.lr": scale.masked_lr,
            **{f"train.student.config.{key}": value for key, value in shape.bert_sizes.items()},
        }
        self.workshop.run([train("masked-lm", [self.cache(cache)], run, settings)])
        return run / "best"

    def _masked(self, path: Path, teacher: Path, scheme: str) -> None:
        hidden = "{kind: hidden, stream: src, layers: [-2], masks: masks}"
        shared: dict[str, object] = {
            **self.texts.masked.corpus("train", "corpus", self.scale.pairs),
            "dump.teacher.path": teacher,
            "dump.tokenizers.target.vocab_size": self.scale.vocab_size,
            "dump.signals.masks.scheme": scheme,
        }
        more = {"mask-task-hidden": {"dump.signals.masked_hidden": hidden}}
        for recipe in ("mask-task", "mask-task-original", "mask-task-hidden"):
            words = ("dump", recipe, "--out", str(path))
            self.workshop.run([Command(words, shared | more.get(recipe, {}))])

    @cached_property
    def tuned(self) -> dict[str, object]:
        """Learning rate and dropout of all students: the best of the student without a cache."""
        scale, runs = self.scale, {}
        cells = [(lr, dropout) for lr in scale.lrs for dropout in scale.dropouts]
        commands = []
        for lr, dropout in cells:
            run = self.folder / "runs" / f"tune-{lr:g}-{dropout:g}"
            runs[lr, dropout] = run
            settings = self.settings(self.texts.main, scale.student.sizes)
            more = {**_rates(lr, dropout), "train.max_steps": scale.tune_steps}
            commands.append(train("no-kd", [self.cache("all")], run, settings, more))
        self.workshop.run(commands)
        losses = {cell: lowest_dev_loss(run) for cell, run in runs.items()}
        best = min(cells, key=lambda cell: losses[cell])
        log(f"no-kd on the development set: {losses}; the best learning rate and dropout: {best}")
        return _rates(*best)

    def run_of(self, row: Row, seed: int) -> Path:
        """The run of a row."""
        name = "".join(letter if letter.isalnum() else "-" for letter in row.name)
        return self.folder / "runs" / f"{name}-{seed}"

    def training(self, row: Row, seed: int) -> Command:
        """The command that trains a row."""
        sizes = {} if row.own_student else self.scale.student.sizes
        settings = self.settings(self.pair(row), sizes)
        tuned = {"train.seed": seed, **self.tuned}
        if row.own_student:
            tuned.pop("train.student.config.dropout")
            settings["train.student.path"] = self.teacher()
        caches = [self.cache(name) for name in row.cache.split("+")]
        last = self.scale.teacher.layers[1]
        own = {key: value.format(last=last) for key, value in row.overrides.items()}
        return train(row.recipe, caches, self.run_of(row, seed), settings, tuned, own)

    def pair(self, row: Row) -> Pair:
        """The language pair of a row."""
        return self.texts.masked if row.masked else self.texts.main

    def testing(self, row: Row, seed: int) -> Command:
        """The command that reads the test set, once."""
        against = () if row.base is None else ("--against", str(self.run_of(ROWS[row.base], seed)))
        words = ("evaluate", str(self.run_of(row, seed)), *against)
        more = {"evaluate.checkpoint": "averaged"} if row.masked else {}  # as its paper does
        return self._evaluation(words, self.pair(row), more)

    def _evaluation(self, words: tuple[str, ...], pair: Pair, more: Overrides) -> Command:
        test = pair.corpus("test", "evaluate.corpus", self.scale.test)
        return Command(words, {**test, "evaluate.latency_sentences": 0, **more})

    def seeds(self, row: Row) -> Sequence[int]:
        """Seeds of a row."""
        return self.scale.seeds if row.core else self.scale.seeds[:1]

    def phases(self) -> Iterator[list[Command]]:
        """Commands that can run side by side; each list wants those before it done."""
        due = {
            seed: [row for row in self.rows if seed in self.seeds(row)] for seed in self.scale.seeds
        }
        for seed, rows in due.items():
            yield [self.training(row, seed) for row in rows]
        yield [self._evaluation(("evaluate", str(self.teacher().parent)), self.texts.main, {})]
        for seed, rows in due.items():
            for bases in (True, False):  # others are compared with these
                yield [self.testing(row, seed) for row in rows if (row.base is None) == bases]

    def result(self) -> dict[str, Any]:
        """What the table came to, once all is done; it is shown too."""
        found = results(self, self.rows)
        log(shown(found["rows"]))
        return {
            "generated_data": self.texts.generated,
            "settings": {key: str(value) for key, value in self.tuned.items()},
            **found,
        }


def _rates(lr: float, dropout: float) -> dict[str, object]:
    return {"train.optimizer.lr": lr, "train.student.config.dropout": dropout}


def make_story(folder: Path, scale: Scale, workshop: Workshop, rows: Sequence[Row]) -> Story:
    """The table of some rows.

    Args:
        folder: where everything lies.
        scale: how large it is.
        workshop: runs the commands.
        rows: with those that they are compared with.
    """
    return Story(folder, scale, find_texts(folder / "texts"), workshop, rows)


def results(story: Story, rows: Sequence[Row]) -> dict[str, Any]:
    """The table of finished rows, whether the papers' findings held, and what the cache saved."""
    found = {}
    for row in rows:
        runs = [story.run_of(row, seed) for seed in story.seeds(row)]
        base = ROWS[row.base] if row.base else row
        speeds = [
            median_speed(run) / median_speed(story.run_of(base, seed))
            for run, seed in zip(runs, story.seeds(row), strict=True)
        ]
        evaluations = [evaluation(run) for run in runs]
        speed = sum(speeds) / len(speeds)
        found[row.name] = row_result(row, story.seeds(row), evaluations, speed)

    def chance(better: str, worse: str) -> Sequence[float]:
        """P-values of a row against any other, which its evaluation has of its base alone."""
        if ROWS[better].base == worse:
            return found[better]["bleu"]["p_values"]  # type: ignore[no-any-return]
        return p_values(story, ROWS[better], ROWS[worse])

    judgements = [judged(each, found, chance) for each in STATEMENTS]
    statements = [one for one in judgements if one is not None]
    return {
        "teacher": teacher_result(evaluation(story.teacher().parent)),
        "rows": list(found.values()),
        "statements": statements,
        "saving": saved(story, rows),
    }


def p_values(story: Story, better: Row, worse: Row) -> list[float]:
    """P-values of the difference in BLEU of two rows of one pair, of the seeds that both have."""
    references = story.pair(better).references(story.scale.test)
    shared = [seed for seed in story.seeds(better) if seed in story.seeds(worse)]
    return [
        bleu_p_value(story.run_of(better, seed), story.run_of(worse, seed), references)
        for seed in shared
    ]


def saved(story: Story, rows: Sequence[Row]) -> dict[str, Any]:
    """What the one cache of the main pair saved."""
    path, workshop = story.cache("all"), story.workshop
    cache = open_cache(path)
    kinds = [record.kind for record in cache.signals.values()]
    dump = {
        "tokens": cache.manifest.streams["tgt"].num_tokens,
        "passes": sum(kind in ("logits", "hidden", "attention") for kind in kinds),
        "seconds": workshop.seconds_of("dump", path),
    }
    runs = {}
    for row in rows:
        if not row.masked:
            for seed in story.seeds(row):
                summary = json.loads((story.run_of(row, seed) / "run.json").read_text())["summary"]
                seconds = workshop.seconds_of("train", story.run_of(row, seed))
                runs[f"{row.name}, {seed}"] = (summary["tokens"], row.passes, seconds)
    forward = forward_seconds(story.teacher(), path, story.scale.batch_tokens)
    return saving(dump, runs, forward)
