"""Tries grammars out in a process of its own, where they can do no harm.

The library compiles in native code that nothing can interrupt, and a text made for it may run for
minutes or overflow a stack. So each is compiled, and followed for some tokens at random, in a
helper process first, which ends itself when its time is over; the next text begins another.

Run as a module this file is that process: it reads a TokenBytes and then texts from its standard
input, and answers each with the fields of a Checked. It ends with its input, so it never outlives
its parent by more than the time limit, whatever becomes of that.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from twostroke.text.grammar_limits import (
    TokenBytes,
    build_matcher,
    get_mask_allowance_ns,
    open_library,
    shorten,
    write_library_grammar,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher

CHECK_SECONDS = 4.0
MAX_MEMORY_BYTES = 4 * 2**30
TRIED_TOKENS = 48
NICENESS = 10  # below what serves


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a text: the library's grammar, or its fault.

    is_lasting: the same text would have it again.
    """

    grammar: str = ""
    fault: str = ""
    is_lasting: bool = True


class GrammarChecker:
    """The parent's side; one thread uses it, and another may close it."""

    def __init__(
        self, tokens: Sequence[bytes], control: Sequence[int], stops: Sequence[int]
    ) -> None:
        self._vocabulary = TokenBytes(tokens, control, stops)
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, text: str) -> Checked:
        """Whether a canonical text (see grammar.py) can be used; takes up to CHECK_SECONDS."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, text)
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            return _describe_end(process.wait())
        return Checked(*answer)

    def close(self) -> None:
        """End the process, if there is one; a check that waits for it hears that it failed."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            _end(self._process)
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it ended already, which the next read tells
            _send(process.stdin, self._vocabulary)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was still to be written has no reader
                pipe.close()


def _describe_end(status: int) -> Checked:
    if status == -signal.SIGALRM:
        return Checked(fault=f"the grammar takes longer than {CHECK_SECONDS:g} s to compile")
    if status == -signal.SIGKILL:
        return Checked(fault="the grammar could not be compiled now", is_lasting=False)
    return Checked(fault="the grammar is too complex: it ended the compiler")


def _send(pipe: object, message: object) -> None:
    pickle.dump(message, pipe)  # type: ignore[arg-type]
    pipe.flush()  # type: ignore[attr-defined]


# ---- the process ---------------------------------------------------------------------------------


def main() -> None:
    """Answer texts until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    texts: BinaryIO = sys.stdin.buffer
    library = open_library(pickle.load(texts))
    while True:
        try:
            text = pickle.load(texts)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, CHECK_SECONDS)  # then the process ends
        try:
            grammar = write_library_grammar(text)
            fault = _try_out(build_matcher(library, grammar))
        except (ValueError, RecursionError) as error:
            grammar, fault = "", shorten(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, (grammar, fault))  # this module has another name here, and so its classes


def _try_out(matcher: LLMatcher) -> str:
    """Follow a grammar for some random tokens; what is wrong with it, or nothing."""
    choices = random.Random(0)
    begin_ns = time.thread_time_ns()
    for done in range(TRIED_TOKENS + 1):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            error = shorten(matcher.get_error())
            return "the grammar matches no text" if error.startswith("NoExtension") else error
        spent_ns = time.thread_time_ns() - begin_ns
        if spent_ns > get_mask_allowance_ns(done):
            return f"the grammar is too costly: {done + 1} masks took {spent_ns / 1e6:.0f} ms"
        allowed = int.from_bytes(mask, "little")
        start = choices.randrange(allowed.bit_length())
        above = allowed >> start
        token = start + (above & -above).bit_length() - 1
        if not matcher.consume_token(token):
            return shorten(matcher.get_error())
        if matcher.is_stopped():
            return ""
    return ""


if __name__ == "__main__":
    main()
