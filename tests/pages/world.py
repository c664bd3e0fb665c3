"""The folder that a reader of the pages has: text, teachers, recipes, all of them tiny."""

from __future__ import annotations

import gzip
import math
import shutil
from collections import Counter
from pathlib import Path

import torch
from transformers import MarianConfig, MarianMTModel

from kdcache.dump.tokenize import train_sentencepiece
from kdcache.recipe import SentencePieceTokenizer
from tests.dump import zoo
from tests.dump.world import make_lines
from tests.exchange import peers
from tests.pages.blocks import ROOT, blocks

VOCAB_SIZE = 36
SIDES = {"src": "src", "tgt": "tgt", "de": "src", "en": "tgt"}


def make_world(root: Path, more: bool = False) -> None:
    """Write corpus files and a translation teacher of 6 + 6 layers.

    Args:
        root: an empty directory.
        more: also models and files that the README does not need.
    """
    src, tgt = make_lines(48)
    splits = {"train": slice(0, 40), "dev": slice(40, 44), "test": slice(44, 48)}
    for split, rows in splits.items():
        for ending, side in SIDES.items():
            lines = src if side == "src" else tgt
            _write(root / f"{split}.{ending}", lines[rows])
    _marian(root / "models" / "deen", src, tgt)
    _peers(root)
    if not more:
        return
    _write(root / "mono.de", [f"{line} again" for line in src[:12]])
    for name in ("english", "task", "dev", "test"):
        _write(root / f"{name}.txt", src)
    _write(root / "both.txt", [*src, *tgt])
    rows = [f"{line}\t{('no', 'yes')[len(line) % 2]}" for line in src[:20]]
    _write(root / "task.tsv", ["sentence\tlabel", *rows])
    _write(root / "wanted.txt", ["1", "3", "8"])
    zoo.make("bert", "lm", root / "models" / "bert", [*src, *tgt])
    _tasks(root / "data", src)
    for ending in ("de", "en"):
        packed = root / "data" / "tatoeba_deen" / f"train.{ending}.gz"
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(gzip.compress((root / f"train.{ending}").read_bytes()))
    shutil.copytree(root / "models" / "deen", root / "models" / "tatoeba-deen")
    for name in ("tour.yaml", "tour_seventh.yaml"):
        shutil.copy(ROOT / "docs" / name, root)
    for block in blocks("docs/systems.md"):
        if "name: monolingual" in block.text:
            (root / "monolingual.yaml").write_text(block.text, encoding="utf-8")
    (root / "deen.yaml").write_text(
        "extends: word-level\nname: deen\n"
        "corpus: {fields: {src: train.de, tgt: train.en}}\n"
        "dump: {teacher: {path: models/deen}}\n",
        encoding="utf-8",
    )


def _tasks(data: Path, lines: list[str]) -> None:
    """The files of the recipes mkd: a few rows of each task."""
    single = {"banking77": ["train", "test"], "clinc150": ["train", "dev", "test"]}
    pairs = {
        "snli_10k": (["train", "dev"], ["entailment", "neutral", "contradiction"]),
        "qnli_10k": (["train", "dev", "glue_dev"], ["entailment", "not_entailment"]),
        "stsb_ccbysa": (["train", "dev", "test"], ["0.5", "2", "4.5"]),
    }
    rows = [[line, "in" if n % 2 else "out"] for n, line in enumerate(lines[:9])]
    files = {
        (name, split): (["sentence", "label"], rows) for name in single for split in single[name]
    }
    for name, (splits, labels) in pairs.items():
        head = ["sentence1", "sentence2", "score" if name.startswith("stsb") else "label"]
        both = zip(lines[:9], lines[9:18], strict=True)
        rows = [[*pair, labels[n % len(labels)]] for n, pair in enumerate(both)]
        files |= {(name, split): (head, rows) for split in splits}
    for (name, split), (head, rows) in files.items():
        (data / name).mkdir(parents=True, exist_ok=True)
        _write(data / name / f"{split}.tsv", ["\t".join(row) for row in [head, *rows]])


def _peers(root: Path) -> None:
    """What others dumped with a causal teacher, whose tokenizer is kept."""
    data = peers.dumped(root)
    (root / "tokenizer").rename(root / "models" / "teacher")
    peers.write_distillkit(data, root / "capture", kind="curve")
    peers.write_vllm(data, "prompt_logprobs.jsonl.gz")
    peers.write_vllm(data, "prompts.jsonl", k=10)
    peers.write_axolotl(data, "chats.jsonl")
    peers.write_nemo(data, "train_with_logits_0.jsonl")


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _marian(directory: Path, src: list[str], tgt: list[str]) -> None:
    """A Marian that knows how often each piece stands, and nothing else."""
    tokenizer = train_sentencepiece(
        [*src, *tgt], SentencePieceTokenizer(vocab_size=VOCAB_SIZE), "pages"
    )
    directory.mkdir(parents=True)
    for name, data in tokenizer.files().items():
        (directory / name).write_bytes(data)
    size, sides = VOCAB_SIZE, ("encoder", "decoder")
    config = MarianConfig(
        d_model=16,
        **{f"{side}_layers": 6 for side in sides},
        **{f"{side}_attention_heads": 4 for side in sides},
        **{f"{side}_ffn_dim": 32 for side in sides},
        vocab_size=size,
        decoder_vocab_size=size,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
        decoder_start_token_id=0,
        forced_eos_token_id=3,
    )
    torch.manual_seed(1)
    model = MarianMTModel(config)
    counts = Counter(i for ids in tokenizer.encode(tgt, target=True) for i in ids)
    for silent in (3, tokenizer.tokens().index("▁")):
        counts[silent] //= 10  # so that hypotheses have text; they end where they must
    model.final_logits_bias.copy_(torch.tensor([[math.log(0.1 + counts[i]) for i in range(size)]]))
    model.save_pretrained(directory)
