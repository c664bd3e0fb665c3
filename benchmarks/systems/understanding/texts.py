"""The texts of the table: of `KDCACHE_DATA`, or generated ones in the same files."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from setting import log

from systems.work import SPLITS, Pair, note_source

#: Of each task: the columns that a recipe's fields are.
COLUMNS = {
    "banking77": {"text": "sentence", "label": "label"},
    "clinc150": {"text": "sentence", "label": "label"},
    "snli": {"text": "sentence1", "pair": "sentence2", "label": "label"},
    "qnli": {"text": "sentence1", "pair": "sentence2", "label": "label"},
    "stsb": {"text": "sentence1", "pair": "sentence2", "label": "score"},
}
#: Folder and test file of each; those without a development set lend it every tenth row.
_FILES = {
    "banking77": ("banking77", "test"),
    "clinc150": ("clinc150", "test"),
    "snli": ("snli_10k", "dev"),
    "qnli": ("qnli_10k", "glue_dev"),
    "stsb": ("stsb_ccbysa", "test"),
}
_LENT = ("banking77", "snli")
#: Most words of a line of running text: longer paragraphs are cut after a sentence.
LINE_WORDS = 64


@dataclass(frozen=True)
class Texts:
    """All text of a table.

    Attributes:
        tasks: name to split to a tsv.
        wiki: split to lines of running text, in WikiText's form.
        english: split to lines that BERT and GPT-2 read before their tasks.
        pairs: translations.
        both: split to lines of both of their languages, which MASS reads before them.
        generated: whether all of it is made up.
    """

    tasks: Mapping[str, Mapping[str, Path]]
    wiki: Mapping[str, Path]
    english: Mapping[str, Path]
    pairs: Pair
    both: Mapping[str, Path]
    generated: bool


def task_section(name: str, path: Path, limit: int | None = None) -> str:
    """A task of a corpus, as YAML.

    Args:
        name: of the task.
        path: of its file.
        limit: rows; None: all.
    """
    fields = ", ".join(f"{field}: {column}" for field, column in COLUMNS[name].items())
    end = "" if limit is None else f", limit: {limit}"
    return f"{{format: tsv, path: {path}, fields: {{{fields}}}{end}}}"


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
        from systems.understanding.generated import write_generated

        write_generated(folder)
        pair = ("brask", "olua")
    else:
        data = Path(root).resolve() / "data"
        try:
            _rewrite(data, folder)
        except FileNotFoundError as error:
            sys.exit(
                f"KDCACHE_DATA={root}: found no {error.filename}; unset it to run on generated text"
            )
        pair = ("tr", "en")
    return Texts(
        tasks={name: {s: folder / f"{name}.{s}.tsv" for s in SPLITS} for name in COLUMNS},
        wiki={split: folder / f"wiki.{split}.txt" for split in SPLITS},
        english={split: folder / f"english.{split}.txt" for split in ("train", "dev")},
        pairs=Pair(
            "-".join(pair),
            {s: (folder / f"pairs.{s}.{pair[0]}", folder / f"pairs.{s}.{pair[1]}") for s in SPLITS},
        ),
        both={split: folder / f"both.{split}.txt" for split in ("train", "dev")},
        generated=root is None,
    )


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text, a line each."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_both(folder: Path, sides: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    """Write the lines of both languages in turns, so that the first lines have both.

    Args:
        folder: of the texts.
        sides: split to the lines of each language.
    """
    for split, (src, tgt) in sides.items():
        both = [line for pair in zip(src, tgt, strict=True) for line in pair]
        write_lines(folder / f"both.{split}.txt", both)


def write_english(folder: Path, lines: Sequence[str]) -> None:
    """Write everyday English; every hundredth line is for development."""
    dev = lines[::100]
    write_lines(folder / "english.train.txt", [line for n, line in enumerate(lines) if n % 100])
    write_lines(folder / "english.dev.txt", dev)


def spread(lines: Sequence[str]) -> list[str]:
    """The same lines in an order that mixes them: every 7th from the first on, then the next."""
    return [line for start in range(7) for line in lines[start::7]]


def _rewrite(data: Path, folder: Path) -> None:
    """Write every text of the table, unless it is there."""
    made: list[tuple[str, Callable[[Path, Path], None]]] = [
        ("stsb.test.tsv", _tasks),
        ("wiki.test.txt", _wiki),
        ("english.dev.txt", _english),
        ("both.dev.txt", _pairs),
    ]
    for last, make in made:
        if not (folder / last).is_file():
            make(data, folder)


def _lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    return text.removesuffix("\n").split("\n")


def _tasks(data: Path, folder: Path) -> None:
    """Rows in a mixed order, since some files have one class after the other."""
    for name, (source, test) in _FILES.items():
        head, *rows = _lines(data / source / "train.tsv")
        dev = rows[9::10] if name in _LENT else _lines(data / source / "dev.tsv")[1:]
        if name in _LENT:
            rows = [row for number, row in enumerate(rows) if number % 10 != 9]
        found = {"train": rows, "dev": dev, "test": _lines(data / source / f"{test}.tsv")[1:]}
        for split, those in found.items():
            mixed = those if name == "qnli" and split == "train" else spread(those)
            write_lines(folder / f"{name}.{split}.tsv", [head, *mixed])


def _wiki(data: Path, folder: Path) -> None:
    for split, file in {"train": "train.txt.gz", "dev": "valid.txt", "test": "test.txt"}.items():
        paragraphs = [line.strip() for line in _lines(data / "wikitext-2" / file)]
        # Headings are no sentences.
        kept = [line for line in paragraphs if line and not line.startswith("=")]
        write_lines(folder / f"wiki.{split}.txt", [part for line in kept for part in cut(line)])


def cut(paragraph: str) -> list[str]:
    """A paragraph in lines of whole sentences, at most `LINE_WORDS` words where they are shorter.

    Args:
        paragraph: words and marks apart, as WikiText has them.
    """
    lines: list[list[str]] = [[]]
    for sentence in paragraph.replace(" . ", " .\n").split("\n"):
        words = sentence.split()
        if lines[-1] and len(lines[-1]) + len(words) > LINE_WORDS:
            lines.append([])
        lines[-1] += words
    return [" ".join(words) for words in lines]


def _english(data: Path, folder: Path) -> None:
    """Everyday sentences and Shakespeare, mixed."""
    plays = [line for line in _lines(data / "tinyshakespeare" / "input.txt") if line.strip()]
    mixed = spread([*_lines(data / "tatoeba_deen" / "train.en.gz"), *plays])
    write_english(folder, mixed)


def _pairs(data: Path, folder: Path) -> None:
    sides = {}
    for split in SPLITS:
        src, tgt = (_lines(data / "tatoeba_tren" / f"{split}.tok.{end}") for end in ("tr", "en"))
        for end, lines in (("tr", src), ("en", tgt)):
            write_lines(folder / f"pairs.{split}.{end}", lines)
        sides[split] = (src, tgt)
    write_both(folder, {split: sides[split] for split in ("train", "dev")})
