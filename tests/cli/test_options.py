"""Laws of the command line's options and exit codes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from twostroke.cli.app import as_command, build_app
from twostroke.cli.options import (
    MachineOptions,
    ModelOption,
    SamplingOptions,
    SchedulingOptions,
    ServeOptions,
)
from twostroke.cli.question_options import (
    SimulatedMachineOptions,
)
from twostroke.errors import (
    CorruptModel,
    InvalidParameter,
    PromptTooLong,
    TwostrokeError,
    UnknownModel,
)

RUNNER = CliRunner()


def run_command(error: BaseException | None = None, arguments: tuple[str, ...] = ("m",)) -> object:
    """Run a command of three groups that keeps what it was given and raises `error`."""
    seen: list[object] = []

    def command(model: ModelOption, sampling: SamplingOptions, serving: ServeOptions) -> None:
        seen.extend((model, sampling, serving))
        if error is not None:
            raise error

    app = typer.Typer()
    app.command()(as_command(command, ModelOption, SamplingOptions, ServeOptions))
    result = RUNNER.invoke(app, list(arguments))
    return result if error is not None else seen


def test_options_reach_a_command_packed_in_their_groups() -> None:
    arguments = ("m", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--port", "1")
    assert run_command(arguments=arguments) == [
        ModelOption(model="m"),
        SamplingOptions(temperature=0.5, stop=["a", "b"]),
        ServeOptions(port=1),
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidParameter("top_p", "must be at most 1"), 2),
        (PromptTooLong("too long", 7), 2),
        (UnknownModel("no such model"), 2),
        (CorruptModel("truncated"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_becomes_its_exit_code(error: BaseException, code: int) -> None:
    result = run_command(error)
    assert result.exit_code == code  # type: ignore[attr-defined]


def test_an_error_is_one_line_on_standard_error() -> None:
    result = run_command(TwostrokeError("the thing, and the fix"))
    assert result.stderr == "error: the thing, and the fix\n"  # type: ignore[attr-defined]
    assert result.stdout == ""  # type: ignore[attr-defined]


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    code = (
        "from twostroke.cli.app import as_command\n"
        "import typer\n"
        "def command() -> None:\n"
        "    for _ in range(100_000):\n"
        "        print('line')\n"
        "app = typer.Typer()\n"
        "app.command()(as_command(command))\n"
        "app()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_every_option_of_every_command_has_its_help() -> None:
    root = typer.main.get_command(build_app())
    missing = [
        f"{name} {parameter.name}"
        for name, command in root.commands.items()  # type: ignore[attr-defined]
        for parameter in command.params
        if not parameter.help
    ]
    assert missing == []


# What an engine, a server or a simulated one is set to, once, when it starts. The other groups say
# what is asked of it: a prompt, a load, a file to write.
SETTINGS = (MachineOptions, ServeOptions, SimulatedMachineOptions, SchedulingOptions)


def test_users_can_set_at_most_forty_things() -> None:
    names = {field.name for group in SETTINGS for field in dataclasses.fields(group)}
    assert len(names) <= 40


def test_option_groups_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelOption(model="m").model = "n"  # type: ignore[misc]


def test_the_version_is_shown() -> None:
    result = RUNNER.invoke(build_app(), ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("twostroke ")
