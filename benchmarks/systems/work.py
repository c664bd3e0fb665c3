"""The folder of a table: its texts, caches and runs, and the commands that fill it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import log

from kdcache.processes import worker_pool
from kdcache.train.evaluation.evaluate import HYPOTHESES
from kdcache.train.evaluation.paired import paired_test

SPLITS = ("train", "dev", "test")
Overrides = Mapping[str, object]
#: Of a command: exit status, seconds, the end of what it said.
Outcome = tuple[int, float, str]


class OutOfTimeError(Exception):
    """No more commands are begun; the same command goes on later."""


@dataclass(frozen=True)
class Pair:
    """A language pair: the files of its splits, each source and target.

    Attributes:
        name: as `tr-en`.
        files: split to (source, target), a sentence a line.
    """

    name: str
    files: Mapping[str, tuple[Path, Path]]

    def corpus(self, split: str, section: str, limit: int | None = None) -> dict[str, object]:
        """Overrides that name a split.

        Args:
            split: train, dev or test.
            section: of the recipe, as `evaluate.corpus`.
            limit: rows; None: all.
        """
        found: dict[str, object] = {
            f"{section}.fields.{side}": path
            for side, path in zip(("src", "tgt"), self.files[split], strict=True)
        }
        return found | ({} if limit is None else {f"{section}.limit": limit})

    def references(self, limit: int | None) -> list[str]:
        """Target sides of the test set.

        Args:
            limit: of them; None: all.
        """
        text = self.files["test"][1].read_text(encoding="utf-8")
        return text.removesuffix("\n").split("\n")[:limit]


@dataclass(frozen=True)
class Texts:
    """All text of a table.

    Attributes:
        main: the pair of the translation systems.
        masked: that of the mask-task systems, whose source language the masked teachers know.
        plain: further text in that language, a sentence a line.
        generated: whether all of it is made up.
    """

    main: Pair
    masked: Pair
    plain: Path
    generated: bool


def note_source(folder: Path, *, generated: bool) -> None:
    """Refuse to mix real and generated texts in one folder.

    Args:
        folder: of the texts.
        generated: whether those that are wanted are.

    Raises:
        SystemExit: the folder holds the others.
    """
    mine, other = ("generated", "real")[:: 1 if generated else -1]
    if (folder / other).exists():
        sys.exit(
            f"{folder}: holds {other} texts, {mine} ones are wanted (KDCACHE_DATA is "
            f"{'not ' if generated else ''}set); take another --out"
        )
    (folder / mine).touch()


def find_texts(folder: Path) -> Texts:
    """The texts of `KDCACHE_DATA`, or generated ones.

    Args:
        folder: where what is generated or rewritten lies; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = os.environ.get("KDCACHE_DATA")
    note_source(folder, generated=root is None)
    if root is None:
        log("KDCACHE_DATA is not set: the texts are generated")
        return _generated(folder)
    data = Path(root).resolve() / "data"
    tren, deen = data / "tatoeba_tren", data / "tatoeba_deen"
    main = {s: (tren / f"{s}.tok.tr", tren / f"{s}.tok.en") for s in SPLITS}
    ending = {"train": ".gz", "dev": "", "test": ""}
    masked = {s: (deen / f"{s}.en{ending[s]}", deen / f"{s}.de{ending[s]}") for s in SPLITS}
    wiki = data / "wikitext-2" / "train.txt.gz"
    for path in (
        wiki,
        *(path for pair in (main, masked) for both in pair.values() for path in both),
    ):
        if not path.is_file():
            sys.exit(f"KDCACHE_DATA={root}: found no {path}; unset it to run on generated text")
    plain = folder / "plain.txt"
    if not plain.is_file():
        texts = [gzip.decompress(path.read_bytes()).decode() for path in (wiki, masked["train"][0])]
        lines = [line.strip() for text in texts for line in text.split("\n")]
        # Headings of wikitext are no sentences.
        kept = [line for line in lines if line and not line.startswith("=")]
        plain.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return Texts(Pair("tr-en", main), Pair("en-de", masked), plain, generated=False)


def _generated(folder: Path) -> Texts:
    """A corpus of the quickstart's grammar, read in both directions."""
    from kdcache.quickstart.grammar import corpus

    files: dict[str, tuple[Path, Path]] = {}
    for split, rows in corpus({"train": 6000, "dev": 300, "test": 300}).items():
        files[split] = (folder / f"{split}.brask", folder / f"{split}.olua")
        for path, texts in zip(files[split], zip(*rows, strict=True), strict=True):
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    turned = {split: (target, source) for split, (source, target) in files.items()}
    plain = turned["train"][0]
    return Texts(Pair("brask-olua", files), Pair("olua-brask", turned), plain, generated=True)


@dataclass(frozen=True)
class Command:
    """One `kdcache` command and the file that shows it is done.

    Attributes:
        words: after `kdcache`.
        overrides: of its recipe.
        after: what must be done before it.
    """

    words: tuple[str, ...]
    overrides: Overrides
    after: tuple[Command, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """All of its words."""
        pairs = [(f"--{key}", str(value)) for key, value in self.overrides.items()]
        return [*self.words, *(text for pair in pairs for text in pair)]

    @property
    def text(self) -> str:
        """Its words in a line: by these it is known."""
        return " ".join(self.arguments)


class Workshop:
    """Runs commands, some side by side, and remembers how long each took.

    Args:
        folder: of the table.
        jobs: commands side by side.
        minutes: begin no command after so many; None: go on to the end.
    """

    def __init__(self, folder: Path, jobs: int, minutes: float | None) -> None:
        self._jobs = jobs
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        os.environ.setdefault("OMP_NUM_THREADS", "1" if jobs > 1 else str(os.cpu_count()))
        self._record = folder / "commands.json"
        found = json.loads(self._record.read_text()) if self._record.is_file() else {}
        self.seconds: dict[str, float] = found

    def run(self, commands: Iterable[Command]) -> None:
        """Run what is not done yet, some side by side: the first that need not wait for others.

        Raises:
            OutOfTimeError: the time is up; what runs has been finished.
            SystemExit: a command failed; its own words are shown.
        """
        waiting = [one for one in commands if one.text not in self.seconds]
        if not waiting:
            return
        running: dict[Future[Outcome], Command] = {}
        with worker_pool(self._jobs, _load, ()) as pool:
            while True:
                while len(running) < self._jobs:
                    late = self._end is not None and time.monotonic() > self._end
                    command = None if late else next(filter(self._can_begin, waiting), None)
                    if command is None:
                        break
                    waiting.remove(command)
                    log(f"kdcache {command.text}")
                    running[pool.submit(_run, command.arguments)] = command
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._note(running.pop(future), future.result())
        if waiting:
            raise OutOfTimeError

    def seconds_of(self, command: str, out: Path) -> float:
        """Seconds of the command of this kind that wrote a cache or a run."""
        (found,) = [
            seconds
            for words, seconds in self.seconds.items()
            if words.startswith(f"{command} ") and f"--out {out} " in f"{words} "
        ]
        return found

    def _can_begin(self, command: Command) -> bool:
        """Whether all is done that it comes after."""
        return all(one.text in self.seconds for one in command.after)

    def _note(self, command: Command, outcome: Outcome) -> None:
        """Remember what is done; give up where it failed."""
        code, seconds, said = outcome
        if code:
            sys.exit(f"kdcache {command.text}\nended with {code}:\n{said}")
        self.seconds[command.text] = seconds
        self._record.write_text(json.dumps(self.seconds, indent=1))


def _load() -> None:
    """Import once what all commands of a process need."""
    import kdcache.train.runs.loop  # noqa: F401


def _run(arguments: list[str]) -> Outcome:
    """One command in this process."""
    from kdcache.cli import main

    began, said = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0) if not isinstance(stop.code, str) else 1
    return code, time.perf_counter() - began, said.getvalue()[-2000:]


def train(
    recipe: str, caches: Sequence[Path], run: Path, settings: Overrides, *more: Overrides
) -> Command:
    """A student.

    Args:
        recipe: a built-in recipe.
        caches: that it learns from, in turns where they are several.
        run: its run directory.
        settings: what all students share.
        more: what this one has beside them; the last one counts.
    """
    words, found = ["train", recipe, "--out", str(run)], dict[str, object]()
    for one in (settings, *more):
        found |= one
    if len(caches) == 1:
        words += ["--cache", str(caches[0])]
    else:
        listed = ", ".join(f"{{path: {cache}}}" for cache in caches)
        found["train.caches"] = f"[{listed}]"
    return Command(tuple(words), found)


def evaluation(run: Path) -> dict[str, Any]:
    """What an evaluation said."""
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def bleu_p_value(run: Path, other: Path, references: Sequence[str]) -> float:
    """P-value of the difference in BLEU of two evaluated runs.

    Args:
        run: with its hypotheses.
        other: with its own, of the same sentences.
        references: of both.
    """
    texts = [(one / HYPOTHESES).read_text(encoding="utf-8") for one in (run, other)]
    said = [text.removesuffix("\n").split("\n") for text in texts]
    return float(paired_test(*said, references)["bleu"]["p_value"])


def lowest_dev_loss(run: Path) -> float:
    """Lowest development loss of a run, in nats per token."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return min(row["dev_loss"] for row in rows if "dev_loss" in row)


def median_speed(run: Path) -> float:
    """Target tokens a second of a run, the median over its lines of metrics."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    speeds: Sequence[float] = sorted(r["tokens_per_second"] for r in rows if "tokens" in r)
    return speeds[len(speeds) // 2]
