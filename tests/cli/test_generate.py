"""Laws of showing one answer."""

from __future__ import annotations

import io
import json

import pytest

from twostroke.cli.answer import AnswerWriter, build_params
from twostroke.cli.generate import describe_answer, read_prompt
from twostroke.cli.options import SamplingOptions
from twostroke.cli.strokes import Measured, get_strokes
from twostroke.core.types import Finished
from twostroke.engine.outputs import OutputDelta
from twostroke.errors import InvalidParameter


class Terminal(io.StringIO):
    """Standard input with nobody piping into it."""

    def isatty(self) -> bool:
        """True: a person sits there."""
        return True


def write(pieces: list[str], output: io.StringIO | None) -> AnswerWriter:
    """Take one delta a piece, and end."""
    writer = AnswerWriter(output)
    for number, piece in enumerate(pieces):
        ending = Finished("length") if number == len(pieces) - 1 else None
        writer.take(OutputDelta(0, piece, (number,), ending=ending))
    writer.end_line()
    return writer


def test_a_given_prompt_goes_before_what_is_piped_in() -> None:
    assert read_prompt("given", io.StringIO("piped")) == "given"
    assert read_prompt(None, io.StringIO("piped\n")) == "piped"


@pytest.mark.parametrize(
    ("given", "piped"), [(None, Terminal()), (None, io.StringIO("\n")), ("", io.StringIO("piped"))]
)
def test_without_a_prompt_nobody_is_left_waiting(given: str | None, piped: io.StringIO) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_prompt(given, piped)
    assert caught.value.parameter == "prompt"


def test_an_answer_is_shown_whole_and_ends_its_line_once() -> None:
    for pieces in (["a", "", "b"], ["a", "b\n"]):
        output = io.StringIO()
        completion = write(pieces, output).get_completion()
        assert output.getvalue() == completion.text.removesuffix("\n") + "\n"
        assert completion.tokens == tuple(range(len(pieces)))
        assert completion.finish_reason == "length"


def test_an_answer_for_json_shows_nothing_by_itself() -> None:
    completion = write(["a", "b"], None).get_completion()
    strokes = get_strokes(Measured(3, 2, 0.1, 0.1, 0.2), None, None)
    reply = json.loads(json.dumps(describe_answer("m", completion, strokes)))
    assert (reply["text"], reply["token_ids"], reply["finish_reason"]) == ("ab", [0, 1], "length")
    assert (reply["prefill"]["tokens"], reply["decode"]["tokens"]) == (3, 1)


def test_bad_sampling_options_are_refused_by_name() -> None:
    with pytest.raises(InvalidParameter) as caught:
        build_params(SamplingOptions(top_p=2.0))
    assert caught.value.parameter == "top_p"
