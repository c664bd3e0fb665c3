"""`kdcache import`: make a cache of another project's dump."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_summary
from kdcache.commands.values import positive

_FORMATS = ("distillkit", "vllm", "axolotl", "nemo")


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "import",
        run,
        "make a cache of the top-k log-probs that another project dumped",
        "kdcache import distillkit capture/*.parquet --tokenizer models/teacher \\\n"
        "      --out caches/captured",
    )
    _add_arguments(command)


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Make a cache of another project's dump."""
    summary = _import(arguments)
    limits = [] if arguments.json else summary.pop("limits")
    print_summary(arguments, summary)
    for line in limits:
        print(f"limit: {line}")
    return 0


def _add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kdcache import`.

    Args:
        command: the parser of the command.
    """
    add = command.add_argument
    add("format", choices=_FORMATS, metavar="FORMAT", help=f"whose files: {', '.join(_FORMATS)}")
    add("files", nargs="+", metavar="FILE", help="Parquet (distillkit) or JSONL files, in order")
    add("--out", required=True, metavar="CACHE", help="the new cache; an unfinished one goes on")
    add("--tokenizer", required=True, metavar="PATH", help="of the teacher: a directory or hub id")
    add("--teacher", metavar="NAME", help="what the cache calls the teacher (default: the format)")
    add(
        "--vocab-size",
        type=positive,
        metavar="V",
        help="ids of the teacher (default: the tokenizer's)",
    )
    add(
        "--top-k",
        type=positive,
        metavar="K",
        help="keep the K most probable ids (default: all given)",
    )
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
    add("--max-tokens", type=positive, metavar="N", help="leave out longer rows (default: none)")
    add(
        "--shard-tokens", type=positive, default=1 << 20, metavar="N", help="most tokens of a shard"
    )
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


def _import(arguments: argparse.Namespace) -> dict[str, Any]:
    """Import as the arguments say.

    Returns:
        The summary of `import_files`.
    """
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
