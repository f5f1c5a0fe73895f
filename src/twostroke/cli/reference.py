"""Writes docs/reference/cli.md from the commands themselves: `make docs`, or `python -m` this.

Nothing is said here that the commands do not say; a test fails when the page is not current.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from twostroke.cli.app import build_app

_HEAD = """# Command line

Made from the commands by `make docs`; edit their help instead.
"""


def build_reference() -> str:
    """The page, as Markdown."""
    root: Any = typer.main.get_command(build_app())
    lines = [_HEAD]
    for name, command in sorted(root.commands.items()):
        lines += _describe_command(name, command)
    return "\n".join(lines)


def _describe_command(name: str, command: Any) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    words = [name, *(each.metavar for each in arguments), *(["[OPTIONS]"] if options else [])]
    yield f"## `twostroke {' '.join(words)}`\n"
    yield f"{command.help}\n"
    for argument in arguments:
        yield f"- `{argument.metavar}`: {argument.help}\n"
    if options:
        yield "| option | default | meaning |\n|---|---|---|"
        for option in options:
            names = ", ".join(f"`{each}`" for each in [*option.opts, *option.secondary_opts])
            yield f"| {names} | {_describe_default(option)} | {option.help} |"
        yield ""


def _describe_default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.default is None or option.default is False:
        return ""
    return f"`{option.default}`"


if __name__ == "__main__":
    print(build_reference(), end="")
