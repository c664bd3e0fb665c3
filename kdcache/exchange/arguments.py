"""The arguments of `kdcache import` and `kdcache export`, and the options they stand for."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.compile.arguments import condition as parsed_condition
from kdcache.compile.arguments import told

IMPORTS = ("distillkit", "vllm", "axolotl", "nemo")
EXPORTS = ("parquet", "text", "distillkit", "vllm")


def add_import_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kdcache import`.

    Args:
        command: the parser of the command.
    """
    add = command.add_argument
    add("format", choices=IMPORTS, metavar="FORMAT", help=f"whose files: {', '.join(IMPORTS)}")
    add("files", nargs="+", metavar="FILE", help="Parquet (distillkit) or JSONL files, in order")
    add("--out", required=True, metavar="CACHE", help="the new cache; an unfinished one goes on")
    add("--tokenizer", required=True, metavar="PATH", help="of the teacher: a directory or hub id")
    add("--teacher", metavar="NAME", help="what the cache calls the teacher (default: the format)")
    add("--vocab-size", type=int, metavar="V", help="ids of the teacher (default: the tokenizer's)")
    add("--top-k", type=int, metavar="K", help="keep the K most probable ids (default: all given)")
    add(
        "--values",
        choices=("uint8", "float16", "float32"),
        default="uint8",
        metavar="TYPE",
        help="of a stored log-prob: uint8 (default), float16, float32",
    )
    add("--text", metavar="KEY", help="key or column of the text (vllm: prompt)")
    add("--messages", metavar="KEY", help="axolotl: key of the messages")
    add("--logprobs", metavar="KEY", help="axolotl: key of the log-probs")
    add("--packing", metavar="FILE", help="distillkit: its compression_config.yaml, if elsewhere")
    add("--max-tokens", type=int, metavar="N", help="leave out longer rows (default: none)")
    add("--shard-tokens", type=int, default=1 << 20, metavar="N", help="most tokens of a shard")
    add(
        "--trust-ids",
        action="store_true",
        help="do not compare the files' token ids with the tokenizer's",
    )
    add(
        "--no-gold-check",
        action="store_true",
        help="do not ask whether labels fit their tokens",
    )


def run_import(arguments: argparse.Namespace) -> dict[str, Any]:
    """Import as the arguments say.

    Returns:
        The summary of `import_files`.
    """
    for name in ("vocab_size", "top_k", "max_tokens", "shard_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            arguments.error(f"argument --{option}: {value} is given, expected at least 1")
    from kdcache.exchange.importer import ImportOptions, import_files

    options = ImportOptions(
        format=arguments.format,
        tokenizer=arguments.tokenizer,
        teacher=arguments.teacher,
        vocab_size=arguments.vocab_size,
        top_k=arguments.top_k,
        values=arguments.values,
        trust_ids=arguments.trust_ids,
        gold_check=not arguments.no_gold_check,
        text_field=arguments.text,
        messages_field=arguments.messages,
        logprobs_field=arguments.logprobs,
        compression_config=arguments.packing,
        max_tokens=arguments.max_tokens,
        shard_tokens=arguments.shard_tokens,
    )
    return import_files(arguments.files, arguments.out, options)


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kdcache export`.

    Args:
        command: the parser of the command.
    """
    add = command.add_argument
    add("format", choices=EXPORTS, metavar="FORMAT", help=f"one of {', '.join(EXPORTS)}")
    add("cache", metavar="CACHE", help="a finished cache, a directory or URL")
    add("--out", required=True, metavar="DIR", help="a new folder; it appears when it is whole")
    add("--signals", nargs="*", metavar="NAME", help="write these signals (default: all that fit)")
    add(
        "--filter",
        action="append",
        default=[],
        type=told(parsed_condition),
        metavar="CONDITION",
        help="keep samples that fulfil it, as 'logits.loss < 3' or 'beams.bleu >= 20'; again and "
        "again",
    )
    add(
        "--top-k",
        type=int,
        metavar="K",
        help="at most K exact entries of a label (default: all; of codec full 64)",
    )
    text = command.add_argument_group("text: pairs of lines for Marian, fairseq and OpenNMT")
    text.add_argument(
        "--choice",
        choices=("best", "reference", "all"),
        metavar="WHICH",
        help="which hypotheses become targets: the best (default), the closest to the reference by "
        "BLEU, or all",
    )
    text.add_argument(
        "--n-best", type=int, metavar="N", help="write also N hypotheses a source in Moses' form"
    )
    text.add_argument("--min-score", type=float, metavar="X", help="least score of a hypothesis")
    text.add_argument("--name", metavar="STEM", help="of the files' names (default train)")
    text.add_argument(
        "--suffixes", nargs=2, metavar=("SRC", "TGT"), help="of their names (default src tgt)"
    )
    text.add_argument("--gzip", action="store_true", default=None, help="compress the files")
    text.add_argument(
        "--bleu-tokenizer", default="13a", metavar="NAME", help="sacrebleu's (default 13a)"
    )


def run_export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Export as the arguments say.

    Returns:
        The summary of `export_cache`.
    """
    own = {
        "choice": "choice",
        "n_best": "n_best",
        "min_score": "min_score",
        "name": "name",
        "suffixes": "suffixes",
        "gzip": "zipped",
    }
    given = {key: getattr(arguments, name) for name, key in own.items()}
    given = {key: value for key, value in given.items() if value is not None}
    if arguments.format != "text" and given:
        option = next(name for name, key in own.items() if key in given).replace("_", "-")
        arguments.error(f"argument --{option}: goes with the format text")
    for name in ("top_k", "n_best"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            arguments.error(f"argument --{option}: {value} is given, expected at least 1")
    names = [arguments.name or "train", *(arguments.suffixes or ("src", "tgt")), "nbest"]
    if any("/" in name or not name for name in names) or len(set(names[1:])) < 3:
        arguments.error(f"argument --suffixes: {names[1:3]} give no two names of files")
    if "suffixes" in given:
        given["suffixes"] = tuple(given["suffixes"])
    from kdcache.exchange.exporter import ExportOptions, export_cache

    options = ExportOptions(
        format=arguments.format,
        signals=arguments.signals,
        filters=arguments.filter,
        top_k=arguments.top_k,
        bleu_tokenizer=arguments.bleu_tokenizer,
        **given,
    )
    return export_cache(arguments.cache, arguments.out, options)
