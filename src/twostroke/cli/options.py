"""The options of the commands, as frozen groups that commands share.

A command is a function of such groups; `as_command` shows typer one parameter for every field, so
an option is written once, with its help, and reaches the command already packed. It also is the
one place where an error becomes an exit code: 2 for what the caller must change, 1 for everything
else that is ours to report, 130 after Ctrl-C, 141 when nobody reads the output any more.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from twostroke.errors import InvalidRequest, TwostrokeError, UnknownModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelOption:
    """Which model."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A known name (see `twostroke models`), org/name from the Hugging Face hub, a "
            ".gguf file or a Hugging Face folder.",
        ),
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """On what it runs."""

    threads: Annotated[
        int | None,
        typer.Option(help="Threads that compute.", show_default="physical cores"),
    ] = None
    backend: Annotated[
        str,
        typer.Option(help='"cpu" (native kernels) or "reference" (NumPy, slow, reads like paper).'),
    ] = "cpu"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is drawn, and when to stop."""

    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most new tokens.")] = 512
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 is greedy: the same answer every time.")
    ] = 0.0
    top_k: Annotated[int, typer.Option(help="Draw from the k most likely tokens; 0 is off.")] = 0
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that sum to p; 1 is off.")
    ] = 1.0
    min_p: Annotated[
        float, typer.Option(help="Drop tokens below this share of the likeliest; 0 is off.")
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that were used less likely; 1 is off.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option(help="Of the draws.", show_default="a fresh one")] = (
        None
    )
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
    ] = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What to generate from, and how to show it."""

    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The prompt; else standard input is read.")
    ] = None
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt through the model's chat template, or take it as it is.",
            show_default="--chat where the model has a template",
        ),
    ] = None
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming text.")
    ] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the settings and why they were chosen.")
    ] = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where to listen, and how much to take on."""

    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any.")] = 8000
    max_rows: Annotated[
        int | None,
        typer.Option(help="Most sequences computed in one step.", show_default="64"),
    ] = None
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Size of the KV pool, such as 512MiB.",
            show_default="what the rows can fill, at most a quarter of available memory",
        ),
    ] = None
    step_tokens: Annotated[
        int | None,
        typer.Option(help="Token budget of one step.", show_default="512"),
    ] = None


def as_command(run: Callable[..., None], *groups: type[Any]) -> Callable[..., None]:
    """A typer callback with one parameter for each field of the groups, in order.

    `run` is called with one value of each group. It is named and documented like `run`.
    """
    parameters: list[inspect.Parameter] = []
    annotations: dict[str, Any] = {}
    for group in groups:
        hints = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            default = inspect.Parameter.empty
            if field.default is not dataclasses.MISSING:
                default = field.default
            parameter = inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=hints[field.name],
            )
            parameters.append(parameter)
            annotations[field.name] = hints[field.name]

    def callback(**values: Any) -> None:
        packed = [
            group(**{field.name: values[field.name] for field in dataclasses.fields(group)})
            for group in groups
        ]
        _exit_with_code(lambda: run(*packed))

    callback.__name__, callback.__doc__ = run.__name__, run.__doc__
    callback.__annotations__ = annotations
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return callback


def _exit_with_code(run: Callable[[], None]) -> None:
    try:
        run()
        sys.stdout.flush()
    except TwostrokeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, InvalidRequest | UnknownModel) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The interpreter flushes standard output once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
