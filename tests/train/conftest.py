"""A corpus, a tiny random Marian teacher, and caches dumped with it, made once."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import MarianConfig, MarianMTModel

from kdcache.dump.runner import dump
from kdcache.dump.tokenize import train_sentencepiece
from kdcache.recipe import SentencePieceTokenizer, parse_recipe
from kdcache.train.batches.growth import Growth
from tests.train.growing import Growing

STUDENT = {
    "model_type": "marian",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "scale_embedding": True,
    "activation_function": "relu",
}
CODECS = {
    "threshold": {"name": "threshold", "c": "1/8"},
    "sampled": {"name": "sampled", "n": 20},
    "full": {"name": "full", "values": "float32"},
}

#: What the sweep of the tests varies.
GRID = [("sweep.grid.train.objective.1.temperature", "1, 3"), ("sweep.grid.train.seed", "1,2")]


def make_lines(count: int) -> tuple[list[str], list[str]]:
    """Source and target lines of different lengths."""
    nouns = ["cat", "dog", "bird", "fish", "horse", "mouse", "crow"]
    verbs = ["sees", "hears", "likes", "hunts"]
    src, tgt = [], []
    for i in range(count):
        a, b, v = nouns[i % 7], nouns[(i // 7) % 7], verbs[i % 4]
        more = [nouns[(i + j) % 7] for j in range(i % 5)]
        src.append(" ".join(["the", a, v, "the", b, *more]))
        tgt.append(" ".join(["ein", b, "wird", "von", a, v, *more[: i % 3]]))
    return src, tgt


def make_teacher(directory: Path, lines: list[str]) -> None:
    """A tiny random Marian whose distributions are not flat."""
    tokenizer = train_sentencepiece(lines, SentencePieceTokenizer(vocab_size=36), "test")
    directory.mkdir()
    for name, data in tokenizer.files().items():
        (directory / name).write_bytes(data)
    config = MarianConfig(
        **STUDENT,
        vocab_size=tokenizer.vocab_size,
        decoder_vocab_size=tokenizer.vocab_size,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
        decoder_start_token_id=0,
        forced_eos_token_id=3,
    )
    model = MarianMTModel(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
    model.save_pretrained(directory)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Paths of corpus files, dev files and teacher, and of one cache with several signals."""
    root = tmp_path_factory.mktemp("train")
    src, tgt = make_lines(120)
    dev_src, dev_tgt = src[100:], tgt[100:]
    for name, lines in [("src", src), ("tgt", tgt), ("dev.src", dev_src), ("dev.tgt", dev_tgt)]:
        (root / name).write_text("".join(line + "\n" for line in lines))
    make_teacher(root / "teacher", [*src, *tgt])
    fields = {"src": str(root / "src"), "tgt": str(root / "tgt")}
    recipe = parse_recipe(
        {
            "name": "test",
            "corpus": {"fields": fields, "limit": 100},
            "dump": {
                "teacher": {"path": str(root / "teacher"), "device": "cpu"},
                "shard_tokens": 700,
                "batch_tokens": 300,
                "signals": {name: {"codec": codec} for name, codec in CODECS.items()},
            },
        }
    )
    cache = root / "cache"
    dump(recipe, cache)
    return SimpleNamespace(root=root, cache=cache, teacher=root / "teacher", src=src, tgt=tgt)


@pytest.fixture(scope="session")
def make_recipe(world):
    """Training recipes over the world's cache; keywords replace keys of the train section."""

    def make(signal: str | None = "threshold", student: dict | None = None, dev=True, **train):
        objective = [{"loss": "cross_entropy", "weight": 0.5}]
        if signal is not None:
            objective.append({"loss": "forward_kl", "weight": 0.5, "signal": signal})
        tree = {
            "student": {"config": STUDENT | (student or {})},
            "objective": objective,
            "device": "cpu",
            "max_steps": 12,
            "batch_tokens": 120,
            "window_shards": 2,
            "log_every": 1,
            "schedule": {"warmup_steps": 5},
            "optimizer": {"lr": 0.005},
            "checkpoints": {"every_steps": 4, "average_last": 2},
        }
        if dev:
            fields = {side: str(world.root / f"dev.{side}") for side in ("src", "tgt")}
            tree["validation"] = {"corpus": {"fields": fields}, "every_steps": 6}
        return parse_recipe({"name": "test", "train": tree | train})

    return make


@pytest.fixture(scope="session")
def recipe_file(make_recipe, world, tmp_path_factory):
    """A recipe of six steps, with a test set."""
    made = make_recipe(max_steps=6, checkpoints={"every_steps": 3, "average_last": 0})
    tree = made.model_dump(mode="json")
    del tree["sweep"]
    tree["evaluate"]["corpus"] = {**tree["train"]["validation"]["corpus"], "limit": 3}
    tree["evaluate"] |= {"num_beams": 1, "latency_sentences": 0, "device": "cpu"}
    path = tmp_path_factory.mktemp("sweep") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.fixture(scope="session")
def swept(recipe_file, world, tmp_path_factory):
    """A sweep of four runs, done as the tasks of an array, and what is said of each."""
    from kdcache.sweep.runner import plan_sweep, run_one

    out = tmp_path_factory.mktemp("swept") / "out"
    planned = plan_sweep(recipe_file, str(world.cache), out, GRID)
    return planned, [run_one(planned, index) for index in range(4)]


@pytest.fixture(scope="module")
def growing(world, tmp_path_factory):
    return Growing(world.cache, tmp_path_factory.mktemp("growing"))


@pytest.fixture
def by_epoch(growing, monkeypatch):
    """Has the cache grow to so many shards just before each epoch looks."""

    real = Growth.prefix

    def plan(counts):
        left = iter(counts)

        def prefix(self):
            count = next(left, None)
            if count is not None:
                growing.show(count)
            found = real(self)
            assert found, "nothing is committed: this would wait for ever"
            return found

        monkeypatch.setattr(Growth, "prefix", prefix)
        return growing

    growing.show(0)
    yield plan
    monkeypatch.undo()
    growing.show(growing.num_shards)
