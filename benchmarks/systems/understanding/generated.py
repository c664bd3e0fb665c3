"""Texts of the table from the quickstart's grammar, in the form of the real ones."""

from __future__ import annotations

from pathlib import Path

from systems.understanding.texts import COLUMNS, write_both, write_english, write_lines

#: Rows of each split.
SIZES = {"train": 1200, "dev": 120, "test": 120}


def write_generated(folder: Path) -> None:
    """Write every text.

    Args:
        folder: is there.
    """
    from kdcache.quickstart.grammar import corpus

    sides = {}
    for split, pairs in corpus(SIZES).items():
        src, tgt = ([pair[side] for pair in pairs] for side in (0, 1))
        sides[split] = (src, tgt)
        for name, lines in (("brask", src), ("olua", tgt)):
            write_lines(folder / f"pairs.{split}.{name}", lines)
        write_lines(folder / f"wiki.{split}.txt", tgt)
        for name, columns in COLUMNS.items():
            rows = [_row(name, tgt, number) for number in range(len(tgt))]
            lines = ["\t".join(columns.values()), *("\t".join(row) for row in rows)]
            write_lines(folder / f"{name}.{split}.tsv", lines)
    write_both(folder, {split: sides[split] for split in ("train", "dev")})
    (more,) = corpus({"train": SIZES["train"]}, seed=2).values()
    write_english(folder, [tgt for _, tgt in more])


def _row(task: str, texts: list[str], number: int) -> list[str]:
    """A sample whose label follows from its words."""
    text, other = texts[number], texts[number - 1]
    words = text.split()
    if task == "banking77":
        return [text, f"words_{min(len(words) // 3, 3)}"]
    if task == "clinc150":
        return [text, f"verb_{len(words[0]) % 4}"]
    if task == "snli":
        label = ("entailment", "neutral", "contradiction")[number % 3]
        second = (" ".join(words[: len(words) // 2]), " ".join(words[::-1]), other)[number % 3]
        return [text, second, label]
    right = number % 2 == 0
    if task == "qnli":
        label = "entailment" if right else "not_entailment"
        return [" ".join(words[:2]), text if right else other, label]
    kept = number % 6
    mixed = [*words[: len(words) * kept // 5], *other.split()[len(words) * kept // 5 :]]
    return [text, " ".join(mixed), f"{kept}"]
