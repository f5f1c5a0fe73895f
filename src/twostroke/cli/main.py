"""The `twostroke` command: names its sub-commands and imports each only when it runs.

A command's options are the groups of `options.py`; its work is in the module of its own name. No
engine, tokenizer or server library may be imported here: `--help` and errors must come at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from twostroke.cli.options import (
    GenerateOptions,
    MachineOptions,
    ModelOption,
    SamplingOptions,
    ServeOptions,
    as_command,
)


def pull(model: ModelOption) -> None:
    """Fetch a model into the cache and check it."""
    from twostroke.cli.models import run_pull

    run_pull(model.model)


def models() -> None:
    """List models and what each costs in memory."""
    from twostroke.cli.models import run_models

    run_models()


def generate(
    model: ModelOption, generation: GenerateOptions, sampling: SamplingOptions, on: MachineOptions
) -> None:
    """Answer one prompt and show both strokes."""
    from twostroke.cli.generate import run_generate

    run_generate(model.model, generation, sampling, on)


def chat(model: ModelOption, sampling: SamplingOptions, on: MachineOptions) -> None:
    """Talk with a model."""
    from twostroke.cli.chat import run_chat

    run_chat(model.model, sampling, on)


def serve(model: ModelOption, serving: ServeOptions, on: MachineOptions) -> None:
    """Serve a model over an OpenAI-compatible API."""
    from twostroke.cli.serve import run_serve

    run_serve(model.model, serving, on)


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
    app.command()(as_command(pull, ModelOption))
    app.command()(as_command(models))
    app.command()(
        as_command(generate, ModelOption, GenerateOptions, SamplingOptions, MachineOptions)
    )
    app.command()(as_command(chat, ModelOption, SamplingOptions, MachineOptions))
    app.command()(as_command(serve, ModelOption, ServeOptions, MachineOptions))
    return app


def main() -> None:
    """Run the command line and exit with its code."""
    build_app()()


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
