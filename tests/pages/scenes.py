"""Which commands of the pages are run, in what folder, and what is done with the others."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEEN = "--dump.teacher.path models/deen --corpus.fields.src train.de --corpus.fields.tgt train.en"
#: A teacher that knows its 40 sentences by heart, for filters that ask what a teacher knows.
TAUGHT = (
    f"kdcache dump no-kd --out caches/tokens {DEEN}",
    "kdcache train no-kd --cache caches/tokens --out runs/taught --train.max_steps 300 "
    "--train.batch_tokens 500 --train.checkpoints.every_steps 300 --train.optimizer.lr 0.01 "
    "--train.schedule.warmup_steps 30 --train.student.config.dropout 0",
)


@dataclass(frozen=True)
class Scene:
    """Commands of a page, or of one section of it, run one after another in one folder.

    Attributes:
        page: where they stand.
        section: the heading that they stand under; the whole page without it.
        before: commands that the page takes for done.
        dots: what `...` stands for in a dump.
        removed: start of a command, and what a reader has taken away before it.
        prepare: writes what else the reader has, into the folder.
        slow: whether it waits for `-m slow`.
    """

    page: str
    section: str | None = None
    before: tuple[str, ...] = ()
    dots: str = DEEN
    removed: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[Path], object] | None = None
    slow: bool = True


def _dump(recipe: str, out: str, words: str = DEEN) -> str:
    return f"kdcache dump {recipe} --out caches/{out} {words}"


def _part(out: str, *more: str) -> str:
    return f"kdcache compile caches/whole --out caches/{out} {' '.join(more)}"


#: Soft labels on references and on the best hypothesis, hypotheses, and hidden states.
WHOLE = _dump(
    "hybrid",
    "whole --dump.signals.logits_best "
    "'{kind: logits, source: src, stream: tgt, hypotheses: beams, hypothesis: 0}' "
    "--dump.signals.encoder '{kind: hidden, side: encoder, stream: src}'",
    DEEN.replace("models/deen", "runs/taught/best"),
)
SYSTEMS = "docs/systems.md"
SCENES = [
    Scene(
        "README.md",
        before=(_dump("word-level", "news"), _dump("word-level", "talks --corpus.limit 20")),
        slow=False,
    ),
    Scene("docs/machines.md", dots=DEEN, before=(_dump("word-level", "deen"),)),
    Scene("docs/repair.md", before=(_dump("word-level", "deen"),)),
    Scene("docs/recipes.md", before=(_dump("word-level", "deen"),)),
    Scene("docs/stores.md"),
    Scene("docs/training.md", before=(_dump("word-level", "deen"),)),
    Scene("docs/while_dumping.md"),
    Scene("docs/sweeps.md", before=(_dump("word-level", "deen"),)),
    Scene(
        "docs/reports.md",
        before=(
            _dump("word-level", "deen"),
            "kdcache train word-level --cache caches/deen --out runs/word-level",
            "kdcache train no-kd --cache caches/deen --out runs/no-kd",
            "kdcache sweep word-level --cache caches/deen --out sweeps/deen "
            "--sweep.grid.train.seed 1,2",
        ),
    ),
    Scene("docs/tour.md"),
    Scene(
        "docs/compile.md",
        before=(
            *TAUGHT,
            WHOLE,
            *(_part(name) for name in ("deen", "a", "clean")),
            *(_part(f"{name} --fraction 0.5") for name in ("b", "noisy")),
            *(_part(f"part{n} --count {8 * n} --seed {n}") for n in (1, 2, 3)),
            _part("logits --signals logits"),
            _part("hidden --signals encoder"),
            _dump("word-level", "full --dump.signals.logits.codec '{name: full}'"),
            _dump("word-level", "fine"),
        ),
        removed=(("kdcache compile wire/deen", "caches/deen"),),
    ),
    Scene(
        "docs/exchange.md",
        before=(
            "kdcache dump nmt-all --out caches/deen --dump.teacher.path models/deen "
            "--corpus.fields.src train.de --corpus.fields.tgt train.en",
        ),
    ),
    Scene(SYSTEMS, "One dump for all"),
    Scene(SYSTEMS, "word-level"),
    Scene(SYSTEMS, "sequence-level"),
    Scene(SYSTEMS, "sequence-level-interpolation", before=(_dump("sequence-level", "seq"),)),
    Scene(SYSTEMS, "hybrid"),
    Scene(
        SYSTEMS,
        "distilbert",
        before=(
            _dump("no-kd", "tokens"),
            "kdcache train no-kd --cache caches/tokens --out runs/no-kd",
            "kdcache evaluate runs/no-kd --evaluate.corpus.fields.src test.src "
            "--evaluate.corpus.fields.tgt test.tgt",
        ),
    ),
    Scene(SYSTEMS, "regular-kd"),
    Scene(SYSTEMS, "pkd"),
    Scene(SYSTEMS, "ckd"),
    Scene(
        SYSTEMS,
        "mask-task",
        before=(
            "kdcache dump mask-task --out caches/plm --dump.teacher.path models/bert "
            "--corpus.fields.src train.src --corpus.fields.tgt train.tgt",
            "kdcache train mask-task --cache caches/plm --out runs/base "
            "--train.objective.1.weight 0",
            "kdcache evaluate runs/base --evaluate.checkpoint averaged "
            "--evaluate.corpus.fields.src test.src --evaluate.corpus.fields.tgt test.tgt",
        ),
    ),
    Scene(SYSTEMS, "masked-lm", dots="--corpus.fields.src train.src --corpus.fields.tgt train.tgt"),
    Scene(SYSTEMS, "causal-lm"),
    Scene(
        SYSTEMS,
        "LightPAFF",
        before=(
            "kdcache dump causal-lm-small --out caches/gpt2 --corpus.fields.text english.txt",
            "kdcache train causal-lm-small --cache caches/gpt2 --out runs/gpt2",
            "kdcache train causal-lm-small --cache caches/gpt2 --out runs/gpt2-task",
        ),
    ),
    Scene(SYSTEMS, "mkd"),
    Scene(
        SYSTEMS,
        "Ensembles and several teachers",
        before=(_dump("word-level", "a"), _dump("word-level", "b --corpus.limit 20")),
    ),
]

#: Commands of ours that no scene runs: how they begin, and why. They are parsed, and their
#: recipes and overrides resolved.
PARSED = {
    "kdcache quickstart": "tests/test_quickstart.py runs it; it takes minutes",
    "kdcache train word-level --cache caches/deen --out runs/deen --train.log tensorboard": (
        "needs a package; tests/train/test_report.py runs the like where it is there"
    ),
}
#: The same of whole sections.
PARSED_SECTIONS = {
    (SYSTEMS, "BERT students"): "tests/train/test_bert_students.py has the teachers they need",
    (SYSTEMS, "Bi-attentive BiLSTM"): "tests/train/test_bilstm_students.py trains them",
}
#: Other programs, and who answers for them.
NOT_OURS = {
    "pip": "installs from a package registry",
    "python -m venv": "makes an environment",
    "python benchmarks/": "benchmarks are run by hand",
    "python examples/": "tests/test_examples.py runs them",
    "python -c": "needs the S3 server of the line before; tests/s3 has its own",
    "ruff": "the checks run it",
    "export": "sets variables of the reader's shell",
    "moto_server": "tests/s3 starts one",
    "aws": "needs an account",
    "tensorboard": "a server of its own",
    "cat": "shows a file while a dump goes on",
    "find": "the shell's; the tour's test runs it",
    "sha256sum": "the shell's; the tour's test runs it",
}
#: Names on the pages, and what stands for them in a scene.
NAMES = {
    r"\bs3://(?:my-)?(?=b)": "memory://",
    r"\bs3://my-bucket/": "memory://bucket/",
    r"(?<= )/shared/": "shared/",
    r"\bTEACHER\b": "models/deen",
    r"\bBERT\b": "models/bert",
    r"--cache CACHE\b": "--cache caches/deen",
    r"--out CACHE\b": "--out caches/new",
    r"\bRUN\b": "runs/run",
    r"'\$SLURM_ARRAY_TASK_ID'": "0",
}
_LAUNCHER = re.compile(r"(?:torchrun|srun|sbatch) .*?(?=\bkdcache (?:dump|train) )")


def program_of(text: str) -> str | None:
    """The entry of `NOT_OURS` that a command is of."""
    return next((name for name in NOT_OURS if text.startswith(f"{name}"[: len(text)])), None)


def own_words(text: str) -> tuple[dict[str, str], list[str]] | None:
    """Variables and words of a command of ours; what launches it and `&` left out.

    Words are as they stand on the page. None for other programs.
    """
    if text.startswith("sbatch"):
        text = text.removesuffix('"')  # of --wrap
    text = re.sub(r'^eval "\$\((.*)\)"$', r"\1", _LAUNCHER.sub("", text))
    if not re.match(r"(?:[A-Z_]+=\S* )*(?:pip .* && )?kdcache ", text):
        return None
    words = shlex.split(text)
    variables = {}
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if "&&" in words:
        words = words[words.index("&&") + 1 :]
    return variables, [word for word in words[1:] if word != "&"]


def mapped(words: list[str], dots: str) -> list[str]:
    """Words with the scene's names in place of the page's, and `...` written out."""
    text = " ".join(shlex.quote(word) for word in words if word != "...")
    for pattern, name in NAMES.items():
        text = re.sub(pattern, name, text)
    found = [name for word in shlex.split(text) for name in _files(word)]
    if "..." in words and words[0] == "dump":
        more = shlex.split(dots)
        for option, value in zip(more[::2], more[1::2], strict=True):
            found += [] if option in found else [option, value]
    return found


def _files(word: str) -> list[str]:
    """What a shell makes of a word with a star: the files that are there."""
    return (sorted(glob.glob(word)) if word.endswith(".parquet") else []) or [word]
