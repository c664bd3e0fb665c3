"""The command line: `kdcache COMMAND ...`.

Results go to stdout, progress and logs to stderr. Exit code 0 is success, 1 a failure that
is told in one line, 2 bad usage, 130 an interrupt. What a command needs is imported when it
runs, so that `--help`, `inspect` and `verify` start without torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdcache import __version__
from kdcache.errors import IntegrityError, KDCacheError

Overrides = list[tuple[str, str]]

_OVERRIDE = re.compile(r"--([A-Za-z_]\w*(?:\.\w+)+)(?:=(.*))?", re.DOTALL)
_HOW_TO_OVERRIDE = (
    "overrides:\n"
    "  Any value of the recipe can be set by its dotted path, as in --train.max_steps 200,\n"
    "  items of a list by number: --train.objective.0.weight 0.3. To list all values:\n"
    "  {command} --print-recipe\n"
    "  docs/recipes.md says what each means."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad usage leaves by SystemExit(2)."""
    parser = _parser()
    words, overrides = _split_overrides(list(sys.argv[1:] if argv is None else argv), parser)
    arguments = parser.parse_args(words)
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
    except (KDCacheError, OSError) as error:
        print(f"kdcache: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kdcache: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    """The message of an error without line breaks, an OSError's with its file first."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split()) or type(error).__name__


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
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    _recipe_commands(commands)
    command = _command(
        commands,
        "inspect",
        _inspect,
        "show what a cache holds and how it was made",
        "kdcache inspect caches/deen --samples 5",
    )
    command.add_argument("cache", metavar="CACHE", help="the cache directory")
    command.add_argument(
        "--samples", type=_count, default=3, metavar="N", help="decoded samples shown (default 3)"
    )
    command = _command(
        commands,
        "verify",
        _verify,
        "check every byte and every structural promise of a cache",
        "kdcache verify caches/deen",
    )
    command.add_argument("cache", metavar="CACHE", help="the cache directory")
    command = _command(
        commands,
        "quickstart",
        _quickstart,
        "the whole story on a generated corpus, in minutes on a CPU",
        "kdcache quickstart --out story",
    )
    command.add_argument(
        "--out",
        default="kdcache-quickstart",
        metavar="DIR",
        help="where everything goes (default kdcache-quickstart)",
    )
    _command(commands, "recipes", _recipes, "list the built-in recipes", "kdcache recipes")
    return parser


def _recipe_commands(commands: Any) -> None:
    """The commands that take a recipe and overrides of it: dump, train, evaluate."""
    command = _command(
        commands,
        "dump",
        _dump,
        "run the teacher over a corpus and write a cache",
        "kdcache dump word-level --out caches/deen \\\n      --dump.teacher.path models/deen \\\n"
        "      --corpus.fields.src train.de --corpus.fields.tgt train.en",
        overrides="kdcache dump word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument(
        "--out", metavar="CACHE", help="the cache directory; an unfinished one goes on"
    )
    command.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe, and stop"
    )
    command = _command(
        commands,
        "train",
        _train,
        "train a student from a cache",
        "kdcache train word-level --cache caches/deen --out runs/word-level",
        overrides="kdcache train word-level",
    )
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file or a built-in name")
    command.add_argument("--cache", metavar="CACHE", help="the cache to train from")
    command.add_argument(
        "--out", metavar="RUN", help="the run directory; an unfinished one goes on"
    )
    command.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe, and stop"
    )
    command = _command(
        commands,
        "evaluate",
        _evaluate,
        "translate and score a run or any encoder-decoder model",
        "kdcache evaluate runs/word-level --against runs/no-kd \\\n"
        "      --evaluate.corpus.fields.src test.de --evaluate.corpus.fields.tgt test.en",
        overrides="kdcache train word-level",
    )
    command.add_argument("run_path", metavar="RUN", help="a run, or a transformers directory")
    command.add_argument("--recipe", metavar="RECIPE", help="score as it says; the run's own else")
    command.add_argument("--against", metavar="RUN2", help="an evaluated run to compare with")
    command.add_argument("--out", metavar="DIR", help="where results go; the run itself else")


def _command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace, Overrides], int],
    summary: str,
    example: str,
    overrides: str | None = None,
) -> argparse.ArgumentParser:
    """Add one command with its example, `--json`, and how to override where it can be."""
    how = f"\n\n{_HOW_TO_OVERRIDE.format(command=overrides)}" if overrides else ""
    command: argparse.ArgumentParser = commands.add_parser(
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


def _needs(arguments: argparse.Namespace, option: str) -> str:
    """An option that is required unless the recipe is only printed."""
    value = getattr(arguments, option)
    if value is None:
        arguments.error(f"the following arguments are required: --{option}")
    return str(value)


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=1, ensure_ascii=False))


def _print_summary(arguments: argparse.Namespace, summary: dict[str, Any]) -> int:
    """One JSON document, or a listing."""
    from kdcache.report.text import listing

    if arguments.json:
        _print_json(summary)
    else:
        print(listing(summary))
    return 0


def _print_recipe(arguments: argparse.Namespace, recipe: Any) -> int:
    """The resolved recipe as YAML, or as JSON."""
    from kdcache.recipe import dump_recipe

    if arguments.json:
        _print_json(recipe.model_dump(mode="json"))
    else:
        print(dump_recipe(recipe), end="")
    return 0


def _dump(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_recipe:
        return _print_recipe(arguments, recipe)
    out = _needs(arguments, "out")
    from kdcache.dump.runner import dump

    return _print_summary(arguments, dict(dump(recipe, out)))


def _train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_recipe:
        return _print_recipe(arguments, recipe)
    cache, out = _needs(arguments, "cache"), _needs(arguments, "out")
    from kdcache.train.loop import train

    return _print_summary(arguments, train(recipe, cache, out))


def _evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.recipe import load_recipe, parse_recipe
    from kdcache.recipe_tree import override

    section = None
    own = Path(arguments.run_path) / "recipe.yaml"
    if arguments.recipe or (overrides and own.is_file()):
        section = load_recipe(arguments.recipe or str(own), overrides).evaluate
    elif overrides:
        tree: dict[str, Any] = {"name": "evaluate"}
        for dotted, text in overrides:
            override(tree, dotted, text)
        section = parse_recipe(tree, where="overrides").evaluate
    from kdcache.train.evaluate import evaluate

    result = evaluate(
        arguments.run_path, section=section, against=arguments.against, out=arguments.out
    )
    return _print_summary(arguments, result)


def _inspect(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.report.inspect import inspect_cache
    from kdcache.report.inspection_text import inspection_text

    inspection = inspect_cache(arguments.cache, num_samples=arguments.samples)
    if arguments.json:
        _print_json(inspection)
    else:
        print(inspection_text(inspection))
    return 0


def _verify(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.formats.verify import verify_cache
    from kdcache.report.text import size

    report = verify_cache(arguments.cache)
    if arguments.json:
        document = {
            "path": arguments.cache,
            "ok": not report.faults,
            "files": report.files,
            "bytes": report.bytes,
            "faults": report.faults,
            "leftovers": report.leftovers,
        }
        _print_json(document)
    else:
        for fault in report.faults:
            print(fault)
        for path in report.leftovers:
            print(f"{path}: left over from an interrupted dump; the next dump removes it")
        state = "sound" if not report.faults else "broken"
        print(f"{arguments.cache}: {state}, {report.files:,} files, {size(report.bytes)} checked")
    if report.faults:
        word = "fault" if len(report.faults) == 1 else "faults"
        raise IntegrityError(f"{arguments.cache}: {len(report.faults)} {word} found")
    return 0


def _quickstart(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.quickstart.outcome import summary_text
    from kdcache.quickstart.story import run

    result = run(arguments.out)
    if arguments.json:
        _print_json(result)
    else:
        print(summary_text(result))
    return 0


def _recipes(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from kdcache.recipe import builtin_names, load_recipe
    from kdcache.report.text import table

    rows = [(name, load_recipe(name).description) for name in builtin_names()]
    if arguments.json:
        _print_json([{"name": name, "description": text} for name, text in rows])
    else:
        print(table(("name", "description"), rows))
    return 0
