"""`kdcache verify`: check a cache, or repair it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_json
from kdcache.commands.values import positive
from kdcache.errors import FormatError, IntegrityError

if TYPE_CHECKING:
    from kdcache.formats.checks.verify import VerifyReport


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "verify",
        run,
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
        type=positive,
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


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Check a cache, or repair it; faults are an error after they are listed."""
    if arguments.repair:
        return _repair(arguments, overrides)
    given = {"--mirror": arguments.mirror, "--recipe": arguments.recipe}
    given |= {f"--{dotted}": text for dotted, text in overrides}
    for option, value in given.items():
        if value is not None:
            arguments.error(f"argument {option}: goes with --repair")
    from kdcache.formats.checks.verify import verify_cache
    from kdcache.processes import num_cores

    processes = arguments.processes or num_cores()
    report = verify_cache(arguments.cache, quick=arguments.quick, processes=processes)
    return _print_verified(arguments, report, {})


def _repair(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Put back what is broken; what is broken still is an error after it is listed."""
    if arguments.quick:
        arguments.error("argument --quick: a repair reads everything")
    if arguments.mirror is not None and (arguments.recipe is not None or overrides):
        arguments.error("argument --mirror: what it has is not made again; give no recipe for it")
    from kdcache.repair import repair_cache

    report = repair_cache(arguments.cache, arguments.mirror, arguments.recipe, overrides)
    if not arguments.json:
        for line in [*report.repaired, *report.failed]:
            print(line)
    said = {"found": report.faults, "repaired": report.repaired, "failed": report.failed}
    return _print_verified(arguments, report.verified, said)


def _print_verified(
    arguments: argparse.Namespace, report: VerifyReport, more: dict[str, list[str]]
) -> int:
    """What a check found, in text or with `more` as JSON; faults are an error then."""
    from kdcache.report.text import size

    state = "broken" if report.faults else "unfinished" if report.unfinished else "sound"
    if arguments.json:
        document = {
            "path": arguments.cache,
            "ok": state == "sound",
            "quick": arguments.quick,
            "files": report.files,
            "bytes": report.bytes,
            "faults": report.faults,
            "unfinished": report.unfinished,
            "leftovers": report.leftovers,
        }
        print_json({**document, **more})
    else:
        for line in [*report.faults, *report.unfinished]:
            print(line)
        for path in report.leftovers:
            print(f"{path}: left over from an interrupted dump; the next dump removes it")
        how = f"{state} (sizes alone)" if arguments.quick else state
        print(f"{arguments.cache}: {how}, {report.files:,} files, {size(report.bytes)} checked")
    if report.faults:
        word = "fault" if len(report.faults) == 1 else "faults"
        raise IntegrityError(f"{arguments.cache}: {len(report.faults)} {word} found")
    if report.unfinished:
        raise FormatError(f"{arguments.cache}: nothing is broken, but its dump is unfinished")
    return 0
