"""Laws of the conversation in the terminal, over an answerer that is told what to say."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping

import pytest

from twostroke.cli.chat import converse
from twostroke.core.types import Finished
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.params import SamplingParams
from twostroke.errors import PromptTooLong

Turn = list[str] | BaseException


class FakeAnswerer:
    """Answers each turn with its script: pieces of text, or an exception when it begins.

    A piece "^C" is the user's interrupt. `asked` keeps the conversations it was given.
    """

    def __init__(self, turns: list[Turn]) -> None:
        self._turns = iter(turns)
        self.asked: list[list[Mapping[str, str]]] = []
        self.abandoned = 0

    def stream_chat(
        self, messages: list[Mapping[str, str]], params: SamplingParams
    ) -> Iterator[OutputDelta]:
        """The next turn of the script."""
        self.asked.append(list(messages))
        turn = next(self._turns)
        if isinstance(turn, BaseException):
            raise turn
        return self._speak(turn)

    def _speak(self, pieces: list[str]) -> Iterator[OutputDelta]:
        ended = False
        try:
            for number, piece in enumerate(pieces):
                if piece == "^C":
                    raise KeyboardInterrupt
                ending = Finished("stop") if number == len(pieces) - 1 else None
                yield OutputDelta(0, piece, (number,), ending=ending)
            ended = True
        finally:
            self.abandoned += not ended


def talk(monkeypatch: pytest.MonkeyPatch, lines: list[str], turns: list[Turn]) -> FakeAnswerer:
    """Hold a whole conversation of these lines; input ends after the last."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    answerer = FakeAnswerer(turns)
    converse(answerer, SamplingParams())
    return answerer


def test_every_turn_sees_the_conversation_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = talk(monkeypatch, ["one", "two"], [["A", "B"], ["C"]])
    assert answerer.asked[1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "AB"},
        {"role": "user", "content": "two"},
    ]
    assert capsys.readouterr().out == "AB\nC\n"


def test_reset_forgets_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = talk(monkeypatch, ["one", "/reset", "two"], [["A"], ["B"]])
    assert answerer.asked[1] == [{"role": "user", "content": "two"}]


def test_quit_leaves_without_answering_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert talk(monkeypatch, ["/quit", "one"], []).asked == []


def test_an_unknown_command_and_an_empty_line_are_not_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(monkeypatch, ["/nothing", "   "], []).asked == []
    assert "/nothing" in capsys.readouterr().err


def test_an_interrupt_stops_the_answer_and_not_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = talk(monkeypatch, ["one", "two"], [["A", "^C", "B"], ["C"]])
    assert answerer.abandoned == 1
    assert answerer.asked[1][:2] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "A"},
    ]
    assert capsys.readouterr().out == "A\nC\n"


def test_a_refused_turn_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = talk(monkeypatch, ["one", "two"], [PromptTooLong("too long", 5), ["A"]])
    assert answerer.asked[1] == [{"role": "user", "content": "two"}]
    assert "error: too long" in capsys.readouterr().err
