"""Command lines read without typer mean what typer reads in them."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from twostroke.cli.app import as_command
from twostroke.cli.arguments import read_arguments
from twostroke.cli.commands import COMMANDS
from twostroke.cli.options import GenerateOptions, MachineOptions, ModelOption, SamplingOptions

VALUES = [
    "m",
    "7",
    "0",
    "0.5",
    "1e3",
    "-1",
    "",
    "a b",
    "cpu",
    "--",
    "007",
    "1_0",
    "٣",
    ".5",
    "70000",
]
NAMES = [
    "--max-tokens",
    "-n",
    "--temperature",
    "-t",
    "--top-k",
    "--seed",
    "--stop",
    "--prompt",
    "-p",
]
NAMES += [
    "--chat",
    "--raw",
    "--json",
    "-v",
    "--threads",
    "--port",
    "--host",
    "--max-rows",
    "--tp",
    "--rate",
    "--tpot-target-ms",
    "--output",
    "--help",
]
WORDS = st.one_of(
    st.sampled_from(VALUES),
    st.sampled_from(NAMES),
    st.builds("{}={}".format, st.sampled_from(NAMES), st.sampled_from(VALUES)),
    st.builds("{}{}".format, st.sampled_from(["-n", "-t", "-p"]), st.sampled_from(VALUES)),
)
LINES = st.lists(
    st.one_of(WORDS.map(lambda word: [word]), st.tuples(st.sampled_from(NAMES), WORDS).map(list)),
    max_size=5,
).map(lambda parts: [word for part in parts for word in part])


def read_with_typer(name: str, words: list[str]) -> list[Any] | None:
    """What typer hands to the command, or None where it refuses or helps."""
    seen: list[Any] = []
    command = COMMANDS[name]

    def run(*values: Any) -> None:
        seen.extend(values)

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(as_command(run, *command.groups))
    result = CliRunner().invoke(app, words)
    return seen if result.exit_code == 0 and (seen or not command.groups) else None


@pytest.mark.parametrize("name", ["generate", "serve", "simulate"])
@settings(max_examples=300, deadline=None)
@given(words=LINES)
def test_what_is_read_here_is_what_typer_reads(name: str, words: list[str]) -> None:
    values = read_arguments(words, COMMANDS[name].groups)
    if values is not None:
        assert values == read_with_typer(name, words)


def test_plain_command_lines_are_read_here() -> None:
    groups = COMMANDS["generate"].groups
    words = [
        "m",
        "--raw",
        "--prompt",
        "a b",
        "--max-tokens=3",
        "-t",
        "0.5",
        "--stop",
        "x",
        "--json",
    ]
    assert read_arguments([*words, "--stop", "y", "--threads", "2"], groups) == [
        ModelOption(model="m"),
        GenerateOptions(prompt="a b", chat=False, json=True),
        SamplingOptions(max_tokens=3, temperature=0.5, stop=["x", "y"]),
        MachineOptions(threads=2),
    ]
    assert read_arguments(["m"], groups) == [
        ModelOption(model="m"),
        GenerateOptions(),
        SamplingOptions(),
        MachineOptions(),
    ]


@pytest.mark.parametrize(
    "line",
    ["", "m --help", "m n", "m --no-such", "m -n", "m -n x", "m -n -1", "m -n5", "m --json=1"],
)
def test_all_else_is_left_to_typer(line: str) -> None:
    assert read_arguments(line.split(), COMMANDS["generate"].groups) is None
