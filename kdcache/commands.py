"""What each command does with its arguments: run, print, and say how it went.

Everything is imported when it is needed, so that `inspect` and `verify` start without torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import AuditError, FormatError, IntegrityError

if TYPE_CHECKING:
    from kdcache.formats.checks.verify import VerifyReport

Overrides = list[tuple[str, str]]


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
    from kdcache.recipe import dump_recipe, recipe_tree

    if arguments.json:
        _print_json(recipe_tree(recipe))
    else:
        print(dump_recipe(recipe), end="")
    return 0


def dump(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Write a cache, show the recipe, or plan."""
    from kdcache.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_recipe:
        return _print_recipe(arguments, recipe)
    if arguments.plan:
        return _plan(arguments, recipe)
    for option in ("budget", "report"):
        if getattr(arguments, option) is not None:
            arguments.error(f"argument --{option}: goes with --plan")
    out = _needs(arguments, "out")
    from kdcache.dump.ranks import ranks_from
    from kdcache.dump.runner import dump as run
    from kdcache.processes import num_cores

    ranks = arguments.rank or ranks_from(os.environ)
    processes = arguments.processes or num_cores()
    return _print_summary(arguments, dict(run(recipe, out, ranks=ranks, processes=processes)))


def _plan(arguments: argparse.Namespace, recipe: Any) -> int:
    from kdcache.dump.plan import plan
    from kdcache.report.plan_text import plan_page, plan_text

    if arguments.report is not None:
        Path(arguments.report).touch()  # a page that cannot be written should fail before a pilot
    result = plan(recipe, arguments.budget)
    if arguments.json:
        _print_json(result)
    else:
        print(plan_text(result))
    if arguments.report is not None:
        Path(arguments.report).write_text(plan_page(result, recipe.name), encoding="utf-8")
    return 0


def train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Train a student."""
    from kdcache.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_recipe:
        return _print_recipe(arguments, recipe)
    given = arguments.cache or []
    if not recipe.stages:
        if len(given) > 1:
            arguments.error("argument --cache: given twice; train.caches in a recipe takes several")
        if not recipe.train.caches:
            _needs(arguments, "cache")
    out = _needs(arguments, "out")
    from kdcache.train.runs.loop import train as run
    from kdcache.train.runs.stages import caches_of_stages, train_stages

    if recipe.stages:
        summary = train_stages(recipe, caches_of_stages(recipe, given), out)
    else:
        summary = run(recipe, given[0] if given else None, out)
    from kdcache.train.runs.parallel import is_main

    return _print_summary(arguments, summary) if is_main() else 0


def evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Score a run or a model."""
    from kdcache.recipe import load_recipe, parse_recipe
    from kdcache.recipe.tree import override
    from kdcache.train.runs.run import last_stage

    section, path = None, last_stage(Path(arguments.run_path))
    own = path / "recipe.yaml"
    if arguments.recipe or (overrides and own.is_file()):
        section = load_recipe(arguments.recipe or str(own), overrides).single().evaluate
    elif overrides:
        tree: dict[str, Any] = {"name": "evaluate"}
        for dotted, text in overrides:
            override(tree, dotted, text)
        section = parse_recipe(tree, where="overrides").evaluate
    from kdcache.train.evaluation.evaluate import evaluate as run

    result = run(path, section=section, against=arguments.against, out=arguments.out)
    return _print_summary(arguments, result)


def sweep(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Train a student for every point of a grid or list."""
    from kdcache.sweep.runner import check_failures, plan_sweep, run_one, run_sweep
    from kdcache.sweep.runner import commands as commands_of
    from kdcache.sweep.table import outcome_text

    planned = plan_sweep(
        arguments.recipe, arguments.cache, arguments.out, overrides, arguments.metric
    )
    if arguments.list:
        lines = commands_of(planned)
        if arguments.json:
            _print_json(
                [
                    {"name": run.name, "settings": run.settings, "command": line}
                    for run, line in zip(planned.runs, lines, strict=True)
                ]
            )
        else:
            print("\n".join(lines))
        return 0
    if arguments.index is not None:
        return _print_summary(arguments, run_one(planned, arguments.index))
    found = run_sweep(planned, arguments.jobs)
    if arguments.json:
        _print_json(found)
    else:
        print(outcome_text(found))
    check_failures(found)
    return 0


def report(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Draw a report of a run, a sweep or a cache."""
    from kdcache.report.report import write_report

    written = write_report(
        arguments.path, out=arguments.out, beside=arguments.beside, cache=arguments.cache
    )
    return _print_summary(arguments, written)


def inspect(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Show what a cache holds."""
    from kdcache.report.inspect import inspect_cache
    from kdcache.report.inspection_text import inspection_text

    inspection = inspect_cache(arguments.cache, num_samples=arguments.samples)
    if arguments.json:
        _print_json(inspection)
    else:
        print(inspection_text(inspection))
    return 0


def verify(arguments: argparse.Namespace, overrides: Overrides) -> int:
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
        _print_json({**document, **more})
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


def audit(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Compare a cache with its teacher; what does not pass is an error after it is shown."""
    if not 0 < arguments.fraction <= 1:
        arguments.error(f"argument --fraction: {arguments.fraction} is not within 0 and 1")
    from kdcache.dump.audit import AuditPlan, verdicts
    from kdcache.dump.audit import audit as run
    from kdcache.report.audit_text import audit_text

    moved = arguments.teacher
    plan = AuditPlan(
        fraction=arguments.fraction,
        seed=arguments.seed,
        signals=tuple(arguments.signal),
        teacher=moved[0] if len(moved) == 1 else moved or None,
        device=arguments.device,
        tolerance=arguments.tolerance,
        truncation=arguments.truncation,
    )
    result = run(arguments.cache, plan)
    if arguments.json:
        _print_json(result)
    else:
        print(audit_text(result))
    faults = list(verdicts(result))
    if not result["passed"]:
        raise AuditError(f"{arguments.cache}: {'; '.join(faults)}")
    for fault in faults:
        print(f"kdcache: {fault}", file=sys.stderr)
    return 0


def compile_(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Make one cache of others."""
    from kdcache.compile.arguments import run

    return _print_summary(arguments, run(arguments))


def import_(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Make a cache of another project's dump."""
    from kdcache.exchange.arguments import run_import

    summary = run_import(arguments)
    limits = [] if arguments.json else summary.pop("limits")
    _print_summary(arguments, summary)
    for line in limits:
        print(f"limit: {line}")
    return 0


def export(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Write a cache in the form of others."""
    from kdcache.exchange.arguments import run_export

    return _print_summary(arguments, run_export(arguments))


def quickstart(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """The whole story on a generated corpus."""
    from kdcache.quickstart.outcome import summary_text
    from kdcache.quickstart.story import run

    result = run(arguments.out)
    if arguments.json:
        _print_json(result)
    else:
        print(summary_text(result))
    return 0


def recipes(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """List the built-in recipes."""
    from kdcache.recipe import builtin_names, load_recipe
    from kdcache.report.text import table

    rows = [(name, load_recipe(name).description) for name in builtin_names()]
    if arguments.json:
        _print_json([{"name": name, "description": text} for name, text in rows])
    else:
        print(table(("name", "description"), rows))
    return 0


def completion(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Print a shell's completion script."""
    from kdcache.completion import script

    text = script(arguments.parser(), arguments.shell)
    if arguments.json:
        _print_json({"shell": arguments.shell, "script": text})
    else:
        print(text, end="")
    return 0
