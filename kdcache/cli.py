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
from collections.abc import Callable, Sequence
from typing import Any

from kdcache import __version__, commands
from kdcache.commands import Overrides
from kdcache.compile import arguments as compile_arguments
from kdcache.dump.ranks import Ranks, parse_ranks
from kdcache.errors import KDCacheError, StoppedError, one_line
from kdcache.exchange import arguments as exchange_arguments
from kdcache.usage import parse

_OVERRIDE = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)
_HOW_TO_OVERRIDE = (
    "overrides:\n"
    "  Any value of the recipe is set by its dotted path: --train.max_steps 200;\n"
    "  items of a list by number: --train.objective.0.weight 0.3. All values:\n"
    "  {command} --print-recipe      (docs/recipes.md: their meaning)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad usage leaves by SystemExit(2)."""
    parser = _parser()
    words, overrides = _split_overrides(list(sys.argv[1:] if argv is None else argv), parser)
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


def _split_overrides(
    words: list[str], parser: argparse.ArgumentParser
) -> tuple[list[str], Overrides]:
    """Take `--a.b value` and `--a.b=value` out of the words; argparse gets the rest."""
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


def _parser() -> argparse.ArgumentParser:
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
    for add in (
        _add_dump,
        _add_train,
        _add_evaluate,
        _add_sweep,
        _add_report,
        _add_inspect,
        _add_verify,
        _add_audit,
        _add_compile,
        _add_import,
        _add_export,
        _add_quickstart,
        _add_recipes,
        _add_completion,
    ):
        add(parsers)
    return parser


def _add_dump(parsers: Any) -> None:
    """Run a teacher."""
    command = _command(
        parsers,
        "dump",
        commands.dump,
        "run the teacher over a corpus and write a cache",
        "kdcache dump word-level --out caches/deen \\\n      --dump.teacher.path models/deen \\\n"
        "      --corpus.fields.src train.de --corpus.fields.tgt train.en",
        overrides="kdcache dump word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument(
        "--out", metavar="CACHE", help="the cache, a directory or URL; an unfinished one goes on"
    )
    command.add_argument(
        "--rank",
        type=_rank,
        metavar="R/WORLD",
        help="make the shards R, R + WORLD, ...; else what torchrun or SLURM says",
    )
    command.add_argument(
        "--processes",
        type=_count,
        metavar="N",
        help="that tokenise a large corpus (default: one for each processor core)",
    )
    command.add_argument(
        "--plan",
        action="store_true",
        help="dump a pilot of some hundred samples, say what the whole will cost, and stop",
    )
    command.add_argument(
        "--budget", type=_bytes, metavar="SIZE", help="with --plan: the cache may have 200GB, say"
    )
    command.add_argument(
        "--report", metavar="FILE", help="with --plan: write a page with pictures there"
    )
    command.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe, and stop"
    )


def _add_train(parsers: Any) -> None:
    """Train a student."""
    command = _command(
        parsers,
        "train",
        commands.train,
        "train a student from a cache",
        "kdcache train word-level --cache caches/deen --out runs/word-level",
        overrides="kdcache train word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument(
        "--cache",
        action="append",
        metavar="CACHE",
        help="the cache to train from, a directory or URL; of a recipe with stages given once for "
        "each, as STAGE=CACHE",
    )
    command.add_argument(
        "--out", metavar="RUN", help="the run directory; an unfinished one goes on"
    )
    command.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe, and stop"
    )


def _add_evaluate(parsers: Any) -> None:
    """Score a model."""
    command = _command(
        parsers,
        "evaluate",
        commands.evaluate,
        "translate and score a run or any encoder-decoder model",
        "kdcache evaluate runs/word-level --against runs/no-kd \\\n"
        "      --evaluate.corpus.fields.src test.de --evaluate.corpus.fields.tgt test.en",
        overrides="kdcache train word-level",
    )
    command.add_argument("run_path", metavar="RUN", help="a run, or a transformers directory")
    command.add_argument("--recipe", metavar="RECIPE", help="score as it says; the run's own else")
    command.add_argument("--against", metavar="RUN2", help="an evaluated run to compare with")
    command.add_argument("--out", metavar="DIR", help="where results go; the run itself else")


def _add_sweep(parsers: Any) -> None:
    """Train many students."""
    command = _command(
        parsers,
        "sweep",
        commands.sweep,
        "train a student for every point of a grid or list",
        "kdcache sweep word-level --cache caches/deen --out sweeps/deen \\\n"
        "      --sweep.grid.train.objective.1.temperature 1,2,4 \\\n"
        "      --sweep.grid.train.seed 1,2,3",
        overrides="kdcache train word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument(
        "--cache", metavar="CACHE", help="the cache to train from, a directory or URL"
    )
    command.add_argument(
        "--out", required=True, metavar="DIR", help="where all goes; finished runs stay as they are"
    )
    command.add_argument(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="runs side by side, one GPU each where there are GPUs (default 1)",
    )
    command.add_argument(
        "--metric", metavar="NAME", help="that the table is sorted by (default dev_loss)"
    )
    only = command.add_mutually_exclusive_group()
    only.add_argument(
        "--list", action="store_true", help="print each run's commands, one run a line, and stop"
    )
    only.add_argument(
        "--index", type=_count, metavar="N", help="do this run alone, from 0, as an array's task"
    )


def _add_report(parsers: Any) -> None:
    """Draw a report."""
    command = _command(
        parsers,
        "report",
        commands.report,
        "draw a page with pictures of a run, a sweep or a cache",
        "kdcache report sweeps/temperature",
    )
    command.add_argument("path", metavar="PATH", help="a run, a sweep, or a cache (or its URL)")
    command.add_argument(
        "--out",
        metavar="FILE",
        help="the page; its Markdown twin goes beside it (default report.html in a run or sweep, "
        "NAME-report.html here of a cache)",
    )
    command.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="RUN",
        help="a run to show beside, as one without KD; may be given again",
    )
    command.add_argument(
        "--cache", metavar="CACHE", help="where a run's cache lies now; as the run says else"
    )


def _add_inspect(parsers: Any) -> None:
    """Show a cache."""
    command = _command(
        parsers,
        "inspect",
        commands.inspect,
        "show what a cache holds and how it was made",
        "kdcache inspect caches/deen --samples 5",
    )
    command.add_argument("cache", metavar="CACHE", help="the cache, a directory or URL")
    command.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="decoded samples shown (default 3)"
    )


def _add_verify(parsers: Any) -> None:
    """Check a cache."""
    command = _command(
        parsers,
        "verify",
        commands.verify,
        "check every byte and every structural promise of a cache",
        "kdcache verify caches/deen --repair --mirror s3://backup/caches/deen",
        overrides="kdcache dump word-level",
    )
    command.add_argument("cache", metavar="CACHE", help="the cache, a directory or URL")
    command.add_argument(
        "--quick", action="store_true", help="check records and sizes alone; no data is read"
    )
    command.add_argument(
        "--processes",
        type=_count,
        metavar="N",
        help="that work on a large cache (default: one for each processor core)",
    )
    command.add_argument(
        "--repair",
        action="store_true",
        help="put back what is broken: from a mirror, or made again by the teacher",
    )
    command.add_argument(
        "--mirror", metavar="CACHE", help="with --repair: a copy of the cache, directory or URL"
    )
    command.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="with --repair: how to make things again; as the cache's own records say else",
    )


def _add_audit(parsers: Any) -> None:
    """Compare a cache with its teacher."""
    command = _command(
        parsers,
        "audit",
        commands.audit,
        "run the teacher again on a part of a cache and compare",
        "kdcache audit caches/deen --fraction 0.01",
    )
    command.add_argument("cache", metavar="CACHE", help="the cache, a directory or URL")
    command.add_argument(
        "--fraction",
        type=float,
        default=0.005,
        metavar="X",
        help="share of the samples (default 0.005, at least 32 samples)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice")
    command.add_argument(
        "--signal",
        action="append",
        default=[],
        metavar="NAME",
        help="look at this signal; may be given again (default: all)",
    )
    command.add_argument(
        "--teacher",
        action="append",
        default=[],
        metavar="PATH",
        help="where the teacher lies now; once for each member of an ensemble",
    )
    command.add_argument("--device", metavar="DEVICE", help="where it runs; the recipe's else")
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="largest difference that passes, or 4 x the teacher's own noise if that is more; "
        "each kind has its own",
    )
    command.add_argument(
        "--truncation",
        type=float,
        metavar="X",
        help="largest loss by coding that passes; each kind has its own",
    )


def _add_compile(parsers: Any) -> None:
    """Make a cache of others."""
    command = _command(
        parsers,
        "compile",
        commands.compile_,
        "make one cache of others, without a teacher",
        "kdcache compile caches/a caches/b --out caches/both",
    )
    compile_arguments.add_arguments(command)


def _add_import(parsers: Any) -> None:
    """Take in another project's dump."""
    command = _command(
        parsers,
        "import",
        commands.import_,
        "make a cache of the top-k log-probs that another project dumped",
        "kdcache import distillkit capture/*.parquet --tokenizer models/teacher \\\n"
        "      --out caches/captured",
    )
    exchange_arguments.add_import_arguments(command)


def _add_export(parsers: Any) -> None:
    """Write what others read."""
    command = _command(
        parsers,
        "export",
        commands.export,
        "write a cache's samples and labels, or its hypotheses, in the form of others",
        "kdcache export text caches/deen --out pseudo --choice reference --n-best 5",
    )
    exchange_arguments.add_export_arguments(command)


def _add_quickstart(parsers: Any) -> None:
    """Tell the whole story."""
    command = _command(
        parsers,
        "quickstart",
        commands.quickstart,
        "the whole story on a generated corpus, in minutes on a CPU",
        "kdcache quickstart --out story",
    )
    command.add_argument(
        "--out",
        default="kdcache-quickstart",
        metavar="DIR",
        help="where everything goes (default kdcache-quickstart)",
    )


def _add_recipes(parsers: Any) -> None:
    """List recipes."""
    _command(parsers, "recipes", commands.recipes, "list the built-in recipes", "kdcache recipes")


def _add_completion(parsers: Any) -> None:
    """Complete words in a shell."""
    command = _command(
        parsers,
        "completion",
        commands.completion,
        "print a script that completes words in a shell",
        'eval "$(kdcache completion bash)"    # in ~/.bashrc; zsh in ~/.zshrc the same\n'
        "  kdcache completion fish | source     # in ~/.config/fish/config.fish",
    )
    command.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    command.set_defaults(parser=_parser)


def _command(
    parsers: Any,
    name: str,
    run: Callable[[argparse.Namespace, Overrides], int],
    summary: str,
    example: str,
    overrides: str | None = None,
) -> argparse.ArgumentParser:
    """Add one command with its example, `--json`, and how to override where it can be."""
    how = f"\n\n{_HOW_TO_OVERRIDE.format(command=overrides)}" if overrides else ""
    command: argparse.ArgumentParser = parsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}{how}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--json", action="store_true", help="print one JSON document")
    command.set_defaults(run=run, takes_overrides=overrides is not None, error=command.error)
    return command


def _count(text: str) -> int:
    """A number of things, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples")
    return int(text)


def _positive(text: str) -> int:
    """A number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def _rank(text: str) -> Ranks:
    """One of several processes, for argparse."""
    try:
        return parse_ranks(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> float:
    """A size such as 200GB or 1.5TiB, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 200GB")
    power = "kmgtp".index(match[2]) + 1 if match[2] else 0
    return float(match[1]) * (1024 if match[3] else 1000) ** power
