"""`kdcache completion`: complete words in a shell."""

from __future__ import annotations

import argparse
from typing import Any

from kdcache.commands.command import Overrides, add_command
from kdcache.commands.output import print_json


def add(parsers: Any) -> None:
    """Declare the command.

    Args:
        parsers: of the command line.
    """
    command = add_command(
        parsers,
        "completion",
        run,
        "print a script that completes words in a shell",
        'eval "$(kdcache completion bash)"    # in ~/.bashrc; zsh in ~/.zshrc the same\n'
        "  kdcache completion fish | source     # in ~/.config/fish/config.fish",
    )
    command.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")


def run(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Print a shell's completion script."""
    from kdcache.cli import make_parser  # which holds this command too
    from kdcache.commands.completion_script import script

    text = script(make_parser(), arguments.shell)
    if arguments.json:
        print_json({"shell": arguments.shell, "script": text})
    else:
        print(text, end="")
    return 0
