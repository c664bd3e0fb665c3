r"""Why the real run's cached student is worse: two arms that differ from it in one thing each.

    KDCACHE_DATA=DIR python benchmarks/explain_tatoeba.py --runs RUNS [--save]

RUNS is the finished --out of `run_tatoeba.py`, made with its defaults. Two more students are
trained as `word-level` was there, same pairs, steps, settings and seed:

- `better-teacher`: the labels are those of RUNS/no-kd, a teacher of the student's own size that
  translates better than the shared one; all else is equal.
- `temperature-0.5`: the labels are the shared teacher's, sharpened.

All five models translate the development set (the test set is not read). Beside BLEU, its length
ratio and a paired test against `no-kd` stands, by how often a reference word occurs among the
English training lines, how many of those words a translation recalls, and how many words of that
band it writes for each one in the references.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sacrebleu
from run_tatoeba import kdcache, parser_of_run, shortened, train_arguments
from setting import find_setting, log, report

#: Words by their number of occurrences in the training lines: [from, to).
BANDS = {
    "0": (0, 1),
    "1-9": (1, 10),
    "10-99": (10, 100),
    "100-999": (100, 1000),
    "1000-": (1000, 0),
}


def words(line: str) -> list[str]:
    """Words and signs of a line."""
    return re.findall(r"[\w']+|[^\w\s]", line)


def lines_of(path: Path, limit: int | None = None) -> list[str]:
    """Lines of a text file, also of a compressed one."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as stream:
        return [line.rstrip("\n") for line in itertools.islice(stream, limit)]


def band_of(count: int) -> str:
    """The band of a word that occurs so often."""
    return next(name for name, (low, high) in BANDS.items() if low <= count < (high or count + 1))


def by_band(
    hypotheses: list[str], references: list[str], counts: collections.Counter[str]
) -> dict[str, dict[str, float]]:
    """Recall of reference words, and words written for each of them, by band."""
    recalled, wanted, written = (dict.fromkeys(BANDS, 0) for _ in range(3))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        have = collections.Counter(words(hypothesis))
        for word, number in have.items():
            written[band_of(counts[word])] += number
        for word, number in collections.Counter(words(reference)).items():
            wanted[band_of(counts[word])] += number
            recalled[band_of(counts[word])] += min(number, have[word])
    return {
        name: {
            "recall": recalled[name] / max(1, wanted[name]),
            "written": written[name] / max(1, wanted[name]),
        }
        for name in BANDS
    }


def main() -> None:
    """Train two arms, translate with all, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="--out of run_tatoeba.py")
    parser.add_argument("--lr", type=float, default=2.8e-3, help="the rate that won there")
    parser.add_argument("--quick", action="store_true", help="after run_tatoeba.py --quick")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    args = parser.parse_args()
    given = ["--out", str(args.runs), *["--quick"] * args.quick]
    run_args = shortened(parser_of_run().parse_args(given))
    setting = find_setting(args.runs / "data")
    out = args.runs / "explain"
    better = out / "cache"
    corpus = ["--corpus.fields.src", str(setting.train[0])]
    corpus += ["--corpus.fields.tgt", str(setting.train[1]), "--corpus.limit", str(run_args.pairs)]
    teacher = ["--dump.teacher.path", str(args.runs / "no-kd" / "best")]
    kdcache("dump", "word-level", "--out", str(better), *corpus, *teacher)
    shared = train_arguments(setting, run_args, args.lr, 0.1, run_args.epochs)
    arms = {
        "better-teacher": ["--cache", str(better)],
        "temperature-0.5": [
            "--cache", str(args.runs / "cache"), "--train.objective.1.temperature", "0.5",
        ],
    }  # fmt: skip
    translators = {
        "teacher": setting.teacher,
        "no-kd": args.runs / "no-kd",
        "word-level": args.runs / "word-level",
        **{name: out / name for name in arms},
    }
    dev = [str(word) for pair in zip(
        ("--evaluate.corpus.fields.src", "--evaluate.corpus.fields.tgt"), setting.dev, strict=True
    ) for word in pair]  # fmt: skip

    def train(name: str) -> None:
        kdcache("train", "word-level", *arms[name], "--out", str(out / name), *shared)

    def translate(name: str) -> None:
        place = out / f"dev-{name}"
        if not (place / "evaluation.json").is_file():
            against = [] if name in ("teacher", "no-kd") else ["--against", str(out / "dev-no-kd")]
            kdcache("evaluate", str(translators[name]), "--out", str(place), *against, *dev)

    with ThreadPoolExecutor(run_args.jobs) as pool:
        list(pool.map(train, arms))
        translate("no-kd")
        list(pool.map(translate, translators))
    counts = collections.Counter(
        word for line in lines_of(setting.train[1], run_args.pairs) for word in words(line)
    )
    references = lines_of(setting.dev[1])
    result: dict[str, Any] = {}
    for name in translators:
        scores = json.loads((out / f"dev-{name}" / "evaluation.json").read_text())
        hypotheses = lines_of(out / f"dev-{name}" / "hypotheses.txt")
        bleu = sacrebleu.corpus_bleu(hypotheses, [references])
        result[name] = {
            "bleu": bleu.score,
            "chrf": sacrebleu.corpus_chrf(hypotheses, [references]).score,
            "precisions": bleu.precisions,
            "length_ratio": bleu.sys_len / bleu.ref_len,
            "loss_nats": scores["loss_nats"],
            "p_bleu_against_no_kd": scores.get("against", {}).get("bleu", {}).get("p_value"),
            "bands": by_band(hypotheses, references, counts),
        }
        log(f"{name}: {result[name]}")
    report(
        {
            "benchmark": "explain_tatoeba",
            "generated_data": setting.generated,
            "quick": args.quick,
            "models": result,
        },
        "explain_tatoeba",
        save=args.save,
    )


if __name__ == "__main__":
    main()
