"""The `twostroke` command: reads the command line the short way, or else through typer."""

from __future__ import annotations

import sys
from functools import partial

from twostroke.cli.arguments import read_arguments
from twostroke.cli.commands import COMMANDS, run_with_code


def main() -> None:
    """Run the command line and exit with its code."""
    words = sys.argv[1:]
    command = COMMANDS.get(words[0]) if words else None
    values = None if command is None else read_arguments(words[1:], command.groups)
    if command is not None and values is not None:
        sys.exit(run_with_code(partial(command.run, *values)))
    from twostroke.cli.app import build_app

    build_app()()
