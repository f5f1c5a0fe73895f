"""Laws of the line that shows how far loading is."""

from __future__ import annotations

import io

import pytest

from twostroke.cli import loading
from twostroke.cli.loading import LoadingLine


class Terminal(io.StringIO):
    """An output that a person looks at."""

    def isatty(self) -> bool:
        """True: it is one."""
        return True


def test_a_terminal_sees_how_far_it_is_and_nothing_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "_EVERY_S", 0.0)
    terminal = Terminal()
    line = LoadingLine(terminal)
    line(2**29, 2**30)
    assert terminal.getvalue() == "\r  loading weights: 512 MiB of 1 GiB"
    line(2**30, 2**30)
    assert terminal.getvalue().endswith("\r" + " " * 35 + "\r")


def test_what_is_quick_or_goes_to_a_file_says_nothing() -> None:
    for output in (Terminal(), io.StringIO()):
        line = LoadingLine(output)
        line(1, 2)
        line(2, 2)
        assert output.getvalue() == ""
