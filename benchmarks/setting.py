"""What benchmarks share: the data and teacher they run on, and how they report.

`KDCACHE_DATA` names a directory with `data/tatoeba_deen/{train.de.gz, train.en.gz, dev.*, test.*}`
and `models/tatoeba-deen`. Without it the benchmarks make a corpus from the quickstart's grammar
and train a small teacher on it for a minute or two, and say so in every result.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Pair = tuple[Path, Path]


@dataclass(frozen=True)
class Setting:
    """A teacher and the text it translates: source and target files of each split."""

    teacher: Path
    train: Pair
    dev: Pair
    test: Pair
    generated: bool


def find_setting(work: Path) -> Setting:
    """The setting of `KDCACHE_DATA`, or one generated into the folder `work`."""
    root = os.environ.get("KDCACHE_DATA")
    if root is None:
        log("KDCACHE_DATA is not set: the data are generated, the teacher is trained on them")
        return _generated(work)
    # Absolute, since recipes that name them are run from other folders too.
    data, teacher = Path(root).resolve() / "data/tatoeba_deen", Path(root).resolve() / "models"
    pairs = {
        "train": (data / "train.de.gz", data / "train.en.gz"),
        "dev": (data / "dev.de", data / "dev.en"),
        "test": (data / "test.de", data / "test.en"),
    }
    for path in (teacher / "tatoeba-deen", *(path for pair in pairs.values() for path in pair)):
        if not path.exists():
            sys.exit(f"KDCACHE_DATA={root}: found no {path}; unset it to run on generated data")
    return Setting(teacher=teacher / "tatoeba-deen", generated=False, **pairs)


def _generated(work: Path) -> Setting:
    """Corpus of the quickstart's grammar and a teacher trained on it, made once per folder."""
    from kdcache.dump.runner import dump
    from kdcache.quickstart.grammar import corpus
    from kdcache.recipe import parse_recipe
    from kdcache.train.runs.loop import train

    work.mkdir(parents=True, exist_ok=True)
    pairs: dict[str, Pair] = {}
    for split, rows in corpus({"train": 6000, "dev": 500, "test": 500}).items():
        pairs[split] = (work / f"{split}.src", work / f"{split}.tgt")
        for path, texts in zip(pairs[split], zip(*rows, strict=True), strict=True):
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    src, tgt = (str(path) for path in pairs["train"])
    shape = {"d_model": 96, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.1}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_attention_heads": 4, f"{side}_ffn_dim": 256}
    recipe = parse_recipe(
        {
            "name": "generated-teacher",
            "corpus": {"fields": {"src": src, "tgt": tgt}},
            "dump": {
                "tokenizers": {"joint": {"kind": "sentencepiece", "vocab_size": 500}},
                "streams": {
                    "src": {"field": "src", "tokenizer": "joint"},
                    "tgt": {"field": "tgt", "tokenizer": "joint", "target": True},
                },
            },
            "train": {
                "student": {"config": {"model_type": "marian", "scale_embedding": True, **shape}},
                "objective": [{"loss": "cross_entropy"}],
                "batch_tokens": 2048,
                "max_steps": 600,
                "optimizer": {"lr": 3e-3},
                "schedule": {"warmup_steps": 100},
                "checkpoints": {"every_steps": 600, "average_last": 0},
            },
        }
    )
    dump(recipe, work / "samples")
    train(recipe, work / "samples", work / "teacher")
    return Setting(teacher=work / "teacher/last", generated=True, **pairs)


def log(line: str) -> None:
    """One line to stderr."""
    print(line, file=sys.stderr, flush=True)


def report(
    result: dict[str, Any],
    name: str,
    *,
    save: bool,
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Print the result as the last line of stdout; keep it, and its picture, if asked.

    Args:
        result: figures, plain values.
        name: of the files in benchmarks/results.
        save: whether to write them.
        draw: draws the picture of a result into a file.
    """
    result = {
        **result,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("torch", "transformers", "pyarrow", "numpy")},
    }
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        if draw is not None:
            draw(json.loads(json.dumps(result)), RESULTS / f"{name}.png")
    print(json.dumps(result), flush=True)


def hardware() -> dict[str, Any]:
    """Processor, cores and accelerator."""
    import torch

    found: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        found["processor"] = models[0] if models else platform.processor()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
