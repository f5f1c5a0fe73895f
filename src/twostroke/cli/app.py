"""The commands as typer shows them: help, complaints, and command lines that are not plain.

`as_command` gives typer one parameter for every field of a command's groups, so an option reaches
the command already packed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, get_type_hints

import typer

from twostroke.cli.commands import COMMANDS, run_with_code
from twostroke.cli.options import get_shown


def build_app() -> typer.Typer:
    """The command line, ready to run or to describe."""
    app = typer.Typer(
        name="twostroke",
        help="An LLM inference engine that takes prefill and decode seriously.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_show_version)
    for command in COMMANDS.values():
        app.command()(as_command(command.run, *command.groups))
    return app


def as_command(run: Callable[..., None], *groups: type[Any]) -> Callable[..., None]:
    """A typer callback with one parameter for each field of the groups, in order.

    `run` is called with one value of each group. It is named and documented like `run`.
    """
    parameters: list[inspect.Parameter] = []
    annotations: dict[str, Any] = {}
    for group in groups:
        hints = get_type_hints(group)
        for field in dataclasses.fields(group):
            default = inspect.Parameter.empty
            if field.default is not dataclasses.MISSING:
                default = field.default
            annotations[field.name] = Annotated[hints[field.name], _present(field)]
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=annotations[field.name],
                )
            )

    def callback(**values: Any) -> None:
        packed = [
            group(**{field.name: values[field.name] for field in dataclasses.fields(group)})
            for group in groups
        ]
        if code := run_with_code(partial(run, *packed)):
            raise typer.Exit(code)

    callback.__name__, callback.__doc__ = run.__name__, run.__doc__
    callback.__annotations__ = annotations
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return callback


def _present(field: dataclasses.Field[Any]) -> Any:
    """A field as typer describes parameters."""
    shown = get_shown(field)
    if shown.is_argument:
        return typer.Argument(help=shown.help, metavar=shown.metavar)
    return typer.Option(
        *shown.names,
        help=shown.help,
        metavar=shown.metavar,
        show_default=True if shown.default is None else shown.default,
        min=shown.least,
        max=shown.most,
    )


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"twostroke {version('twostroke')}")
        raise typer.Exit


def _show_version(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of the command itself; `version` has done its work by now."""
