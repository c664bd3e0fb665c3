"""`kdcache compile`: make one cache of others."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kdcache.commands.command import Overrides, add_bleu_tokenizer, add_command, add_filter
from kdcache.commands.output import print_summary
from kdcache.commands.values import number, told
from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.compile.options import CompileOptions


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "compile",
        run,
        "make one cache of others, without a teacher",
        "kdcache compile caches/a caches/b --out caches/both",
    )
    _add_arguments(command)


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Make one cache of others."""
    if arguments.compress or arguments.expand or arguments.level is not None:
        return print_summary(arguments, _transfer(arguments))
    from kdcache.compile.compiler import compile_caches

    options = options_of(arguments)
    return print_summary(arguments, compile_caches(arguments.caches, arguments.out, options))


def _add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        command: the parser of the command.
    """
    command.usage = "kdcache compile CACHE [CACHE ...] --out CACHE [options]"  # all fit no screen
    _add_choices(command)
    _add_changes(command)
    add = command.add_argument
    add("--shard-tokens", type=int, metavar="N", help="most tokens of a shard (default: as it is)")
    add_bleu_tokenizer(command)
    wire = command.add_mutually_exclusive_group()
    wire.add_argument(
        "--compress",
        action="store_true",
        help="copy one cache, its data files compressed; the copy can be read as it is",
    )
    wire.add_argument(
        "--expand", action="store_true", help="make the ordinary cache of a compressed one again"
    )
    add("--level", type=int, metavar="N", help="with --compress: Zstandard's, 1 to 22 (default 3)")


def _add_choices(command: argparse.ArgumentParser) -> None:
    """Declare what says which samples and signals are kept."""
    add = command.add_argument
    add("caches", nargs="+", metavar="CACHE", help="finished caches, directories or URLs")
    add("--out", required=True, metavar="CACHE", help="the new cache; an unfinished one goes on")
    add("--signals", nargs="*", metavar="NAME", help="keep these signals alone (default: all)")
    add(
        "--missing",
        choices=("refuse", "drop"),
        default="refuse",
        help="samples without a signal that others have (default refuse)",
    )
    add_filter(command)
    add("--ids", metavar="FILE", help="keep the samples listed: a sample_id or row a line")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--fraction", type=number, metavar="X", help="keep this share of samples")
    size.add_argument("--count", type=int, metavar="N", help="keep this many samples")
    add("--seed", type=int, default=0, metavar="N", help="of choices and draws (default 0)")


def _add_changes(command: argparse.ArgumentParser) -> None:
    """Declare what says how samples and signals are changed."""
    add = command.add_argument
    add(
        "--mix",
        nargs="+",
        type=number,
        metavar="W",
        help="take each cache's samples so often; merged else",
    )
    add(
        "--targets",
        type=told(_targets),
        metavar="BEAMS=CHOICE",
        help="make hypotheses the targets: best, reference (closest to it by BLEU) or sampled",
    )
    add(
        "--codec",
        action="append",
        default=[],
        type=told(_codec),
        metavar="SIGNAL=CODEC",
        help="re-encode a logits signal, as logits='{name: threshold, c: 1/8}'",
    )
    add(
        "--rename",
        action="append",
        default=[],
        type=told(_rename),
        metavar="OLD=NEW",
        help="call a signal otherwise in the new cache",
    )


def options_of(arguments: argparse.Namespace) -> CompileOptions:
    """The options that parsed arguments stand for."""
    from kdcache.compile.options import CompileOptions

    return CompileOptions(
        signals=arguments.signals,
        missing=arguments.missing,
        filters=arguments.filter,
        ids=arguments.ids,
        fraction=arguments.fraction,
        count=arguments.count,
        seed=arguments.seed,
        mix=arguments.mix,
        targets=arguments.targets,
        codecs=dict(arguments.codec),
        rename=dict(arguments.rename),
        shard_tokens=arguments.shard_tokens,
        bleu_tokenizer=arguments.bleu_tokenizer,
    )


def _transfer(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress or expand one cache."""
    from kdcache.compile.options import CompileOptions
    from kdcache.formats.stores.transfer import compress_cache, expand_cache
    from kdcache.formats.stores.zstd import DEFAULT_LEVEL

    if arguments.level is not None and not arguments.compress:
        raise RecipeError("compile: --level is of --compress; add that, or leave it out")
    if len(arguments.caches) > 1 or options_of(arguments) != CompileOptions(filters=[]):
        raise RecipeError(
            "compile: --compress and --expand take one cache and do nothing else; do the rest first"
        )
    [cache] = arguments.caches
    if arguments.expand:
        return expand_cache(cache, arguments.out)
    return compress_cache(cache, arguments.out, arguments.level or DEFAULT_LEVEL)


# What parses is imported when there is something to parse: other commands start without it.


def _targets(text: str) -> object:
    from kdcache.compile.options import parse_targets

    return parse_targets(text)


def _codec(text: str) -> tuple[str, object]:
    """A signal and its codec, checked."""
    from kdcache.compile.options import parse_codec, split_pair
    from kdcache.recipe.tree import read_yaml

    name, words = split_pair(text, "codec", "logits='{name: threshold, c: 1/8}'")
    tree = read_yaml(words)
    parse_codec(name, tree)
    return name, tree


def _rename(text: str) -> tuple[str, str]:
    from kdcache.compile.options import split_pair

    return split_pair(text, "rename", "best_logits=logits")
