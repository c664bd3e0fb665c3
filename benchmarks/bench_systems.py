r"""The translation systems of the papers, all of them from one dump, in one table.

    KDCACHE_DATA=DIR python benchmarks/bench_systems.py --out WORK [--scale smoke] [--save]

Steps, every one a `kdcache` command that is printed before it runs:

1. Train the teacher, and the masked language models that teach the mask task, from caches that
   hold no labels.
2. `dump` once what all the translation systems need (recipe `nmt-all`), and once what those of
   the mask task need; `compile` what some of them make of it.
3. Tune the student without a cache on the development set, over learning rates and dropouts.
4. Train every row with the winner's settings; the core rows with every seed.
5. Read the test set once for every run: `evaluate`, with a paired bootstrap against the student
   without a cache of the same seed.

A run that is killed, or that ends after --minutes, goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from setting import log, report
from systems.rows import CORE, ROWS, STATEMENTS, Row
from systems.saving import forward_seconds, saving
from systems.scales import SCALES, Scale
from systems.table import judged, row_result, shown
from systems.work import (
    Command,
    OutOfTimeError,
    Overrides,
    Pair,
    Texts,
    Workshop,
    evaluation,
    find_texts,
    lowest_dev_loss,
    median_speed,
    train,
)

from kdcache import open_cache


class Story:
    """All commands of a table; what others need is made before them, once.

    Args:
        folder: where everything lies.
        scale: how large it is.
        texts: what it is made of.
        workshop: runs the commands.
    """

    def __init__(self, folder: Path, scale: Scale, texts: Texts, workshop: Workshop) -> None:
        self.folder, self.scale, self.texts, self.workshop = folder, scale, texts, workshop
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
            "train.optimizer.lr": min(self.scale.lrs),
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
        sizes = {
            "hidden_size": shape.width,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers[0],
            "num_attention_heads": shape.heads,
        }
        settings = {
            "train.validation.corpus.fields.text": self.texts.masked.files["dev"][0],
            **self.lengths(scale.masked_steps),
            **{f"train.student.config.{key}": value for key, value in sizes.items()},
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
        more: dict[str, object] = {"evaluate.latency_sentences": 0}
        if row.masked:  # as its paper does
            more["evaluate.checkpoint"] = "averaged"
        test = self.pair(row).corpus("test", "evaluate.corpus", self.scale.test)
        return Command(words, test | more)

    def seeds(self, row: Row) -> Sequence[int]:
        """Seeds of a row."""
        return self.scale.seeds if row.core else self.scale.seeds[:1]


def _rates(lr: float, dropout: float) -> dict[str, object]:
    return {"train.optimizer.lr": lr, "train.student.config.dropout": dropout}


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
    statements = [one for one in (judged(each, found) for each in STATEMENTS) if one is not None]
    return {"rows": list(found.values()), "statements": statements, "saving": saved(story, rows)}


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


def main() -> None:
    """Run every step, and print one JSON object."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[args.scale]
    scale = replace(scale, seeds=scale.seeds[: args.seeds])
    workshop = Workshop(args.out, scale.jobs, args.minutes)
    texts = find_texts(args.out / "texts")
    story = Story(args.out, scale, texts, workshop)
    rows = _chosen(args)
    try:
        for seed in scale.seeds:
            due = [row for row in rows if seed in story.seeds(row)]
            workshop.run([story.training(row, seed) for row in due])
        for seed in scale.seeds:
            due = [row for row in rows if seed in story.seeds(row)]
            for bases in (True, False):  # others are compared with these
                those = [row for row in due if (row.base is None) == bases]
                workshop.run([story.testing(row, seed) for row in those])
    except OutOfTimeError:
        log("out of time: the same command goes on from here")
        return
    found = {
        "benchmark": "bench_systems",
        "scale": args.scale,
        "generated_data": texts.generated,
        "settings": {key: str(value) for key, value in story.tuned.items()},
        **results(story, rows),
    }
    log(shown(found["rows"]))
    report(found, f"bench_systems_{args.scale}", save=args.save)


def _chosen(args: argparse.Namespace) -> list[Row]:
    """The rows that were asked for, and those that they are compared with."""
    named = args.rows or (list(ROWS) if args.scale == "smoke" else CORE)
    unknown = [name for name in named if name not in ROWS]
    if unknown:
        raise SystemExit(f"--rows {unknown[0]!r}: there is no such row; there are {list(ROWS)}")
    wanted = {name for row in named for name in (row, ROWS[row].base) if name}
    return [row for name, row in ROWS.items() if name in wanted]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for texts, caches and runs")
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="these alone (smoke: all; else the core rows)"
    )
    parser.add_argument("--seeds", type=int, help="the first so many seeds of the core rows")
    parser.add_argument("--minutes", type=float, help="begin no command after so many")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
