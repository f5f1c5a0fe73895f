"""`twostroke chat`: a conversation in the terminal.

It owns the loop that reads, answers and remembers, and the meaning of Ctrl-C: while an answer is
being written it ends that answer and nothing else. What was shown of a stopped answer stays in the
conversation, as both sides have seen it; a turn that was refused leaves no trace.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Protocol

from twostroke.cli.answer import AnswerWriter, build_params
from twostroke.cli.compose import LLM
from twostroke.cli.options import MachineOptions, SamplingOptions
from twostroke.cli.settings import get_machine_settings
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.params import SamplingParams
from twostroke.errors import InvalidRequest

HELP = "/reset forgets the conversation, /quit leaves; Ctrl-C stops an answer, Ctrl-D leaves."


class Answerer(Protocol):
    """What a conversation needs of an engine."""

    def stream_chat(
        self, messages: list[Mapping[str, str]], params: SamplingParams
    ) -> Iterator[OutputDelta]: ...


def run_chat(model: str, sampling: SamplingOptions, on: MachineOptions) -> None:
    """Talk until the user leaves. Raises TwostrokeError."""
    params = build_params(sampling)
    # One reader waits for one answer, which often repeats what was said: guesses cost little.
    with LLM(model, **get_machine_settings(on), max_rows=1, drafts=True) as llm:
        print(f"{model}. {HELP}", file=sys.stderr)
        # Gives input() line editing and history, where the interpreter was built with it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        converse(llm, params)


def converse(answerer: Answerer, params: SamplingParams) -> None:
    """Read lines, answer each, until /quit or the end of input."""
    messages: list[Mapping[str, str]] = []
    while (line := read_line()) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages.clear()
            print("(forgotten)", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}. {HELP}", file=sys.stderr)
        elif line:
            take_turn(answerer, params, messages, line)


def take_turn(
    answerer: Answerer, params: SamplingParams, messages: list[Mapping[str, str]], text: str
) -> None:
    """Show the answer to `text` and add both to `messages`; a refused turn adds nothing."""
    question = {"role": "user", "content": text}
    writer = AnswerWriter(sys.stdout)
    try:
        for delta in answerer.stream_chat([*messages, question], params):
            writer.take(delta)
        writer.end_line()
        answer = writer.get_completion()
        if answer.finish_reason == "length":
            print(f"(cut after {len(answer.tokens)} tokens)", file=sys.stderr)
    except KeyboardInterrupt:
        # Leaving the iteration has ended the request; the engine runs on.
        writer.end_line()
        print("(stopped)", file=sys.stderr)
    except InvalidRequest as error:
        print(f"error: {error} (/reset starts a new conversation)", file=sys.stderr)
        return
    messages += [question, {"role": "assistant", "content": writer.text}]


def read_line() -> str | None:
    """The next line, stripped; empty after Ctrl-C, None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
