"""`kdcache export`: write a cache in the form of others."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_bleu_tokenizer, add_command, add_filter
from kdcache.commands.output import print_summary
from kdcache.commands.values import positive

_FORMATS = ("parquet", "text", "distillkit", "vllm")


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "export",
        run,
        "write a cache's samples and labels, or its hypotheses, in the form of others",
        "kdcache export text caches/deen --out pseudo --choice reference --n-best 5",
    )
    _add_arguments(command)


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Write a cache in the form of others."""
    return print_summary(arguments, _export(arguments))


def _add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments of `kdcache export`.

    Args:
        command: the parser of the command.
    """
    add = command.add_argument
    add("format", choices=_FORMATS, metavar="FORMAT", help=f"one of {', '.join(_FORMATS)}")
    add("cache", metavar="CACHE", help="a finished cache, a directory or URL")
    add("--out", required=True, metavar="DIR", help="a new folder; it appears when it is whole")
    add("--signals", nargs="*", metavar="NAME", help="write these signals (default: all that fit)")
    add_filter(command)
    add(
        "--top-k",
        type=positive,
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
        "--n-best",
        type=positive,
        metavar="N",
        help="write also N hypotheses a source in Moses' form",
    )
    text.add_argument("--min-score", type=float, metavar="X", help="least score of a hypothesis")
    text.add_argument("--name", metavar="STEM", help="of the files' names (default train)")
    text.add_argument(
        "--suffixes", nargs=2, metavar=("SRC", "TGT"), help="of their names (default src tgt)"
    )
    text.add_argument("--gzip", action="store_true", default=None, help="compress the files")
    add_bleu_tokenizer(text)


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
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
    if arguments.name is not None and (not arguments.name or "/" in arguments.name):
        arguments.error(f"argument --name: {arguments.name!r} is no name of a file")
    suffixes = arguments.suffixes or ["src", "tgt"]
    if any("/" in name or not name for name in suffixes) or len({*suffixes, "nbest"}) < 3:
        arguments.error(f"argument --suffixes: {suffixes} give no two names of files")
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
