"""Wall time of a dump over the bare teacher forward on the same batches.

A is the teacher alone: the planned batches lie in memory as tensors and only the forward is
timed, output projection included, at valid positions, as the dump itself runs it. B is a whole
dump into an empty directory: reading, tokenising, batching, forward, selection, coding,
writing, committing; loading the model is left out of both. A and B alternate.

With KDCACHE_DATA the teacher is models/tatoeba-deen and the pairs are data/tatoeba_deen;
without it both are generated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kdcache.dump.batches import pad, plan_batches
from kdcache.dump.runner import dump
from kdcache.dump.teacher import Teacher
from kdcache.dump.tokenize import train_sentencepiece
from kdcache.dump.versions import library_versions
from kdcache.formats.cache import open_cache
from kdcache.formats.plan import plan_parts
from kdcache.formats.ragged import Ragged
from kdcache.formats.schema import join_ids, max_bytes_per_token
from kdcache.recipe import Recipe, SentencePieceTokenizer, parse_recipe

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def generated(root: Path, pairs: int) -> tuple[Path, Path, Path]:
    """A random teacher of the shared one's shape (4,000 of its ids unused), and made-up text."""
    from transformers import MarianConfig, MarianMTModel

    source = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(source.choices(syllables, k=source.randint(1, 4))) for _ in range(20000)]
    for side in ("src", "tgt"):
        lines = [" ".join(source.choices(words, k=source.randint(3, 14))) for _ in range(pairs)]
        (root / side).write_text("".join(line + "\n" for line in lines))
    texts = (root / "src").read_text().splitlines() + words
    tokenizer = train_sentencepiece(texts, SentencePieceTokenizer(vocab_size=4000), "bench")
    teacher = root / "teacher"
    teacher.mkdir()
    for name, data in tokenizer.files().items():
        (teacher / name).write_bytes(data)
    torch.manual_seed(1)
    config = MarianConfig(
        vocab_size=8000,
        decoder_vocab_size=8000,
        d_model=256,
        encoder_layers=6,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        max_position_embeddings=256,
        activation_function="relu",
        scale_embedding=True,
        init_std=0.06,
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
    )
    MarianMTModel(config).save_pretrained(teacher)
    return teacher, root / "src", root / "tgt"


def make_recipe(
    teacher: Path, src: Path, tgt: Path, pairs: int, codec: str, device: str, batch_tokens: int
) -> Recipe:
    """What is dumped."""
    return parse_recipe(
        {
            "name": "bench-dump",
            "corpus": {"fields": {"src": str(src), "tgt": str(tgt)}, "limit": pairs},
            "dump": {
                "teacher": {"path": str(teacher), "device": device},
                "batch_tokens": batch_tokens,
                "signals": {"logits": {"codec": json.loads(codec)}},
            },
        }
    )


def planned_batches(recipe: Recipe, path: Path, teacher: Teacher) -> list[Batch]:
    """The batches of a dump, as tensors on the teacher's device."""
    cache, section = open_cache(path), recipe.dump.signals["logits"]
    most = max_bytes_per_token(section.codec, teacher.vocab_size, section.temperatures)
    batches = []
    for number in range(cache.num_shards):
        streams = cache.samples(number).streams
        src, tgt = (
            Ragged(s.offsets, {"id": join_ids(s.fields)}) for s in (streams["src"], streams["tgt"])
        )
        for start, stop in plan_parts(tgt.lengths, most):
            lengths = src.lengths[start:stop], tgt.lengths[start:stop]
            for rows in plan_batches(*lengths, recipe.dump.batch_tokens):
                arrays = (
                    array for s in (src, tgt) for array in pad(s, rows + start, teacher.pad_id)
                )
                batches.append(tuple(torch.from_numpy(a).to(teacher.device) for a in arrays))
    return batches


def forward_seconds(teacher: Teacher, batches: list[Batch]) -> float:
    """Seconds of the bare forward over all batches."""
    began = time.perf_counter()
    for src_ids, src_mask, labels, label_mask in batches:
        teacher.logits(src_ids, src_mask, labels, label_mask)
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def run(recipe: Recipe, root: Path, rounds: int) -> dict[str, object]:
    """Alternate A and B."""
    first = dump(recipe, root / "warm-up")  # also gives the plan
    assert recipe.dump.teacher is not None
    teacher = Teacher.load(recipe.dump.teacher)
    batches = planned_batches(recipe, root / "warm-up", teacher)
    forward_seconds(teacher, batches[: max(1, len(batches) // 4)])
    forwards, walls, stages = [], [], []
    for number in range(rounds):
        forwards.append(forward_seconds(teacher, batches))
        seconds = dump(recipe, root / f"round-{number}")["seconds"]
        walls.append(seconds["total"] - seconds["load"])
        stages.append(seconds)
        print(
            f"round {number}: forward {forwards[-1]:.2f} s, dump {walls[-1]:.2f} s (tokenise "
            f"{seconds['tokenise']:.2f}, teacher {seconds['teacher']:.2f})",
            file=sys.stderr,
        )
    ratios = [wall / forward for wall, forward in zip(walls, forwards, strict=True)]
    signal = [s["teacher"] / forward for s, forward in zip(stages, forwards, strict=True)]
    sizes = np.array([[b[0].numel() + b[2].numel(), b[1].sum() + b[3].sum()] for b in batches])
    return {
        "wall_over_forward": statistics.median(ratios),
        "wall_over_forward_rounds": ratios,
        "signal_stage_over_forward": statistics.median(signal),
        "forward_seconds": forwards,
        "wall_seconds": walls,
        "tokenise_seconds": [s["tokenise"] for s in stages],
        "samples": first["samples"],
        "tokens": first["tokens"],
        "batches": len(batches),
        "padding": float(1 - sizes[:, 1].sum() / sizes[:, 0].sum()),
        "target_tokens_per_second": first["tokens"]["tgt"] / statistics.median(walls),
        "bytes_per_token": first["signals"]["logits"]["bytes_per_token"],
    }


def main() -> None:
    """Print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes on 2 cores")
    parser.add_argument("--pairs", type=int, help="pairs of the corpus (default 12000, quick 1500)")
    parser.add_argument("--rounds", type=int, help="times A and B alternate (default 5, quick 3)")
    parser.add_argument("--codec", default='{"name": "threshold"}', help="codec as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, help="torch threads; torch's default without it")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pairs = arguments.pairs or (1500 if arguments.quick else 12000)
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    data = os.environ.get("KDCACHE_DATA")
    with tempfile.TemporaryDirectory(prefix="kdcache-bench-") as directory:
        root = Path(directory)
        if data:
            corpus = Path(data) / "data" / "tatoeba_deen"
            places = (
                Path(data) / "models" / "tatoeba-deen",
                corpus / "train.de.gz",
                corpus / "train.en.gz",
            )
        else:
            print("KDCACHE_DATA is not set: generated teacher and corpus", file=sys.stderr)
            places = generated(root, pairs)
        recipe = make_recipe(
            *places, pairs, arguments.codec, arguments.device, arguments.batch_tokens
        )
        result = run(recipe, root, rounds)
    print(
        json.dumps(
            {
                "benchmark": "dump",
                "data": "shared" if data else "generated",
                "codec": json.loads(arguments.codec),
                **result,
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "device": arguments.device,
                "versions": library_versions(),
            }
        )
    )


if __name__ == "__main__":
    main()
