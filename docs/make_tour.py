"""Run the tour and write docs/tour.md as it ran: `KDCACHE_DATA=DIR python docs/make_tour.py`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "tour.md"
INTRODUCTION = """\
# A tour: six signals of one teacher, and a seventh later

What follows ran as it stands (`docs/make_tour.py`, on 2 cores without a GPU), over the first
5,000 sentence pairs of Tatoeba De-En with a Marian teacher of 10 M parameters. The recipe is
[tour.yaml](tour.yaml): soft labels twice, hidden states of encoder and decoder, attention, and
the two best hypotheses of a beam search, side by side in one cache.
"""
#: What is said before each command.
STEPS: list[tuple[str, str]] = [
    (
        "## Before it is made\n\nA pilot of 400 sentences says what the cache will weigh, how long "
        "it takes here, and what each codec would cost and keep on this teacher.",
        "kdcache dump tour.yaml --plan --budget 300MB",
    ),
    (
        "## The dump\n\nOne command makes all signals, those first that others may be made from. "
        "Killed at any time, it goes on where it was.",
        "kdcache dump tour.yaml --out cache",
    ),
    (
        "## What is in it",
        "kdcache inspect cache --samples 1",
    ),
    (
        "## Is every byte as it was written?",
        "kdcache verify cache",
    ),
    (
        "## Does it say what the teacher says?\n\nThe audit runs the teacher again on a part of "
        "the samples. It tells apart whether the stored labels are the teacher's (beside the "
        "teacher's own float noise between two batch shapes), and what coding has cut off.",
        "kdcache audit cache",
    ),
    (
        "## A seventh signal\n\nHybrid distillation wants soft labels on the teacher's own best "
        "translation. [tour_seventh.yaml](tour_seventh.yaml) names the same corpus and that one "
        "signal; nothing else is touched: the checksums of all files that stood before are taken "
        "before and after.",
        "find cache -type f ! -path '*/.status/*' | sort | xargs sha256sum > before.txt",
    ),
    ("", "kdcache dump tour_seventh.yaml --out cache"),
    ("", "sha256sum --check --quiet before.txt && echo unchanged: $(wc -l < before.txt) files"),
    ("", "kdcache audit cache --signal soft_best"),
]


def main() -> int:
    """Run every step in a fresh directory and write the page."""
    root = os.environ.get("KDCACHE_DATA")
    if root is None:
        print("set KDCACHE_DATA to a directory with data/ and models/", file=sys.stderr)
        return 1
    parts = [INTRODUCTION]
    with tempfile.TemporaryDirectory(prefix="kdcache-tour-") as folder:
        for name in ("data", "models"):
            (Path(folder) / name).symlink_to(Path(root).resolve() / name)
        for recipe in ("tour.yaml", "tour_seventh.yaml"):
            shutil.copy(HERE / recipe, folder)
        for text, command in STEPS:
            print(f"$ {command}", file=sys.stderr)
            done = subprocess.run(
                ["bash", "-c", f'set -o pipefail; kdcache() {{ {_kdcache()} "$@"; }}; {command}'],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
            lines = [line.rstrip() for line in done.stdout.splitlines()]
            parts += [text] if text else []
            parts.append("\n".join(["```", f"$ {command}", *lines, "```"]))
    PAGE.write_text("\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n", encoding="utf-8")
    return 0


def _kdcache() -> str:
    """How this interpreter runs kdcache."""
    return f"{shlex.quote(sys.executable)} -m kdcache"


if __name__ == "__main__":
    sys.exit(main())
