"""`kdcache audit`: compare a cache with its teacher."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_json
from kdcache.errors import AuditError


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "audit",
        run,
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


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Compare a cache with its teacher; what does not pass is an error after it is shown."""
    if not 0 < arguments.fraction <= 1:
        arguments.error(f"argument --fraction: {arguments.fraction} is not within 0 and 1")
    from kdcache.dump.audit import AuditPlan, audit, verdicts
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
    result = audit(arguments.cache, plan)
    if arguments.json:
        print_json(result)
    else:
        print(audit_text(result))
    faults = list(verdicts(result))
    if not result["passed"]:
        raise AuditError(f"{arguments.cache}: {'; '.join(faults)}")
    for fault in faults:
        print(f"kdcache: {fault}", file=sys.stderr)
    return 0
