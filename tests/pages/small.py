"""A page's command made small: its own words, and overrides that shrink models and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdcache.cli import make_parser, split_overrides
from kdcache.recipe import Recipe, load_recipe
from kdcache.usage import parse

#: Sizes of a student, by the key of its config; numbers of layers stay.
SIZES = {
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "n_embd": 16,
    "n_head": 2,
}
TRAIN = {
    "max_steps": 2,
    "max_epochs": "null",
    "batch_tokens": 150,
    "log_every": 1,
    "schedule.warmup_steps": 1,
    "checkpoints.every_steps": 1,
    "checkpoints.average_last": 2,
    "device": "cpu",
}
DUMP = {"shard_tokens": 400, "batch_tokens": 400}
EVALUATE = {
    "corpus.limit": 4,
    "num_beams": 2,
    "max_length_ratio": 0.5,
    "device": "cpu",
    "bootstrap_samples": 10,
    "latency_sentences": 1,
}
PIECES = 30
MAX_TOKENS = 64  # as many as the teachers have positions
HYPOTHESIS = 12


def shrunk(words: list[str]) -> list[str]:
    """The words of a command with those behind them that make it small."""
    parser = make_parser()
    rest, overrides = split_overrides(words, parser)
    arguments = parse(parser, rest)
    if arguments.command == "dump":
        return [*words, *_dump(load_recipe(arguments.recipe, overrides))]
    if arguments.command in ("train", "sweep"):
        return [*words, *_train(load_recipe(arguments.recipe, overrides), dict(overrides))]
    if arguments.command == "evaluate":
        run = Path(arguments.run_path) / "recipe.yaml"
        corpus = load_recipe(str(run)).evaluate.corpus if run.is_file() else None
        several = corpus is not None and bool(corpus.tasks)  # which have limits of their own
        values = {k: v for k, v in EVALUATE.items() if not (several and k == "corpus.limit")}
        return [*words, *_overrides("evaluate", values)]
    return words


def _overrides(section: str, values: dict[str, Any]) -> list[str]:
    return [word for key, value in values.items() for word in (f"--{section}.{key}", str(value))]


def _dump(recipe: Recipe) -> list[str]:
    words = _overrides("dump", DUMP)
    if recipe.dump.max_tokens is not None:
        words += _overrides("dump", {"max_tokens": min(recipe.dump.max_tokens, MAX_TOKENS)})
    for name, tokenizer in recipe.dump.tokenizers.items():
        if tokenizer.kind == "sentencepiece":
            words += _overrides(f"dump.tokenizers.{name}", {"vocab_size": PIECES})
    for name, signal in recipe.dump.signals.items():
        if signal.kind == "beams":
            words += _overrides(f"dump.signals.{name}", {"max_length": HYPOTHESIS})
    return words


def _train(recipe: Recipe, given: dict[str, str]) -> list[str]:
    values = {key: value for key, value in TRAIN.items() if f"train.{key}" not in given}
    words = _overrides("train", values)
    student = [recipe, *recipe.stages.values()][-1].train.student
    config = getattr(student, "config", None) or {}
    sizes = {key: value for key, value in SIZES.items() if key in config}
    words += _overrides("train.student.config", sizes)
    if recipe.train.validation is not None:
        words += _overrides("train.validation", {"every_steps": 2})
    return words
