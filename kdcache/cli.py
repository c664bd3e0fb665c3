"""The command line: `kdcache COMMAND ...`.

Results go to stdout, progress and logs to stderr. Exit code 0 is success, 1 a failure that
is told in one line, 2 bad usage, 130 an interrupt, 143 a stop by SIGTERM. What a command needs
is imported when it runs, so that `--help`, `inspect` and `verify` start without torch and
transformers.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence

from kdcache import __version__
from kdcache.commands import (
    audit,
    compile,
    completion,
    dump,
    evaluate,
    export,
    import_,
    inspect,
    quickstart,
    recipes,
    report,
    sweep,
    train,
    verify,
)
from kdcache.commands.command import Overrides
from kdcache.errors import KDCacheError, StoppedError, one_line
from kdcache.usage import parse

#: In the order of `kdcache --help`.
_COMMANDS = (
    dump,
    train,
    evaluate,
    sweep,
    report,
    inspect,
    verify,
    audit,
    compile,
    import_,
    export,
    quickstart,
    recipes,
    completion,
)
_OVERRIDE = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad usage leaves by SystemExit(2)."""
    parser = make_parser()
    words, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv), parser)
    arguments = parse(parser, words)
    if overrides and not arguments.takes_overrides:
        parser.error(f"{arguments.command} takes no overrides, found --{overrides[0][0]}")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("kdcache").setLevel(logging.INFO)
    # Marian's tokenizer recommends a package that it does not tokenise with.
    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
    try:
        code: int = arguments.run(arguments, overrides)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader of a pipe has left; the interpreter must not complain when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except StoppedError as error:
        print(f"kdcache: {one_line(error)}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (KDCacheError, OSError) as error:
        print(f"kdcache: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kdcache: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def split_overrides(
    words: list[str], parser: argparse.ArgumentParser
) -> tuple[list[str], Overrides]:
    """Take `--a.b value` and `--a.b=value` out of the words; argparse gets the rest.

    Args:
        words: what stood behind `kdcache`.
        parser: of the whole command line.

    Raises:
        SystemExit: with code 2, where the last has no value.
    """
    rest: list[str] = []
    overrides: Overrides = []
    queue = iter(words)
    for word in queue:
        match = _OVERRIDE.fullmatch(word)
        if not match:
            rest.append(word)
            continue
        value = match[2] if match[2] is not None else next(queue, None)
        if value is None:
            parser.error(f"--{match[1]} needs a value")
        overrides.append((match[1], value))
    return rest, overrides


def make_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(
        prog="kdcache",
        description="Run the teacher once; train students for ever after.",
        epilog="`kdcache COMMAND --help` shows a command's arguments and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kdcache {__version__}")
    parsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    for command in _COMMANDS:
        command.add(parsers)
    return parser
